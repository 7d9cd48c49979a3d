"""Calibration text: Alpaca's, and the same with a share of random tokens for what layers receive."""

import random
import re

import pytest
import torch
from conftest import VOCABULARY, batches, tiny_model, write_jsonl

from pipeline.compress import prune, saliency, surgeon
from pipeline.data import alpaca, calibration
from pipeline.settings import pruning
from pipeline.stages import prune as stage

HELD_OUT, SEED = 2, 3


@pytest.fixture
def rows(tmp_path):
    write_jsonl(
        tmp_path / "rows.jsonl",
        [{"instruction": "Count.", "input": "", "output": "one two three " * i} for i in range(1, 12)],
    )
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(("text", "samples"), [("rows", 5), ("responses", 3), ("packed", 0)])
def test_the_asked_text_is_used(text, samples, rows, tokenizer):
    asked = {"text": text, "samples": samples, "max_length": 96}
    parts = calibration.batches(tokenizer, rows, HELD_OUT, SEED, **asked, size=1)
    expected = alpaca.SOURCES[text](rows, tokenizer, HELD_OUT, samples, 96, SEED)
    assert len(expected) == samples
    assert sorted(part.tokens[0, : part.length].tolist() for part in parts) == sorted(
        list(example.tokens) for example in expected
    )
    assert all((part.labels[0, 1 : part.length] == part.tokens[0, 1 : part.length]).all() for part in parts)


class Words:
    """One token a word or line break; as Llama's does, it starts a text with a special token unless told otherwise."""

    pad_token_id, bos_token_id, eos_token_id = range(3)

    def __init__(self):
        self.words = ["<pad>", "<s>", "</s>"]

    def encode(self, text, add_special_tokens=True):
        found = words(text)
        self.words += dict.fromkeys(word for word in found if word not in self.words)
        return [self.bos_token_id] * add_special_tokens + [self.words.index(word) for word in found]


def words(text):
    return re.findall(r"\n|\S+", text)


# Each word names its row; the longest is held out.
TOLD = [
    {
        "instruction": f"{row}.ask",
        "input": "" if row % 4 else f"{row}.given",
        "output": " ".join(f"{row}.{place}" for place in range(length)),
    }
    for row, length in enumerate((3, 14, 8, 20, 5, 26, 11, 2, 24))
]
ORDER = list(range(len(TOLD)))
random.Random(SEED).shuffle(ORDER)
TRAIN = ORDER[HELD_OUT:]


def texts():
    """The words of each training row without its prompt: instruction, input if there is one, output."""
    given = [[] if row % 4 else [f"{row}.given", "\n"] for row in TRAIN]
    return [
        [f"{row}.ask", "\n", *middle, *words(TOLD[row]["output"])] for row, middle in zip(TRAIN, given, strict=True)
    ]


@pytest.fixture
def drawn(tmp_path):
    """The calibration sequences as words, in the order of the batches; all but a first word has to be labelled."""
    write_jsonl(tmp_path / "told.jsonl", TOLD)

    def sequences(text, samples, length):
        tokenizer = Words()
        asked = {"text": text, "samples": samples, "max_length": length}
        return [
            [tokenizer.words[token] for token in [int(row[0]), *labels[labels != alpaca.IGNORED].tolist()]]
            for part in calibration.batches(tokenizer, tmp_path / "told.jsonl", HELD_OUT, SEED, **asked, size=2)
            for row, labels in zip(part.tokens, part.labels, strict=True)
        ]

    return sequences


def test_rows_are_the_first_training_rows_in_their_prompts(drawn):
    expected = [
        [
            "<s>",
            *words(alpaca.prompt(TOLD[row]["instruction"], TOLD[row]["input"])),
            *words(TOLD[row]["output"]),
            "</s>",
        ]
        for row in TRAIN[:3]
    ]
    assert sorted(drawn("rows", 3, 60)) == sorted(words[:60] for words in expected)


def test_packed_windows_run_through_the_training_rows_texts(drawn):
    stream = [word for text in texts() for word in [*text, "\n", "\n"]]
    assert drawn("packed", 5, 9) == [stream[start : start + 9] for start in (0, 9, 18, 27, 36)]


def test_response_windows_run_through_the_longest_answers_first(drawn):
    longest = sorted(TRAIN, key=lambda row: -len(words(TOLD[row]["output"])))
    stream = [word for row in longest for word in [*words(TOLD[row]["output"]), "\n", "\n"]]
    assert drawn("responses", 5, 9) == [stream[start : start + 9] for start in (0, 9, 18, 27, 36)]


def test_snippets_are_pieces_of_the_first_texts_that_are_long_enough(drawn):
    long = [text for text in texts() if len(text) >= 9]
    assert len(long) < len(TRAIN)
    places = []
    for piece, text in zip(drawn("snippets", 4, 9), long[:4], strict=True):
        places.append(text.index(piece[0]))
        assert piece == text[places[-1] : places[-1] + 9]
    assert len(set(places)) > 1


@pytest.mark.parametrize(("text", "length"), [("rows", 60), ("snippets", 4), ("packed", 9), ("responses", 9)])
def test_every_row_that_is_not_held_out_can_be_drawn_and_no_other(text, length, drawn):
    pieces = drawn(text, 100, length)
    assert {int(word[0]) for piece in pieces for word in piece if word[0].isdigit()} == set(TRAIN)


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_nothing_is_read_where_nothing_is_calibrated(importance, rows, tokenizer, default):
    def asked(compensate):
        settings = default.prune.model_copy(update={"importance": importance, "compensate": compensate, "text": "rows"})
        held_out = default.data.model_copy(update={"validation_rows": HELD_OUT})
        return default.model_copy(update={"prune": settings, "data": held_out})

    assert stage.calibration_set(asked(True), tokenizer, rows=rows)
    assert stage.calibration_set(asked(False), tokenizer, rows=rows.with_name("missing.jsonl")) == []


def test_noise_replaces_its_share_by_tokens_that_are_all_alike():
    text = batches(40, rows=8, length=32)
    share = 0.3
    before = torch.cat([part.tokens.flatten() for part in text])
    after = torch.cat([part.tokens.flatten() for part in calibration.noised(text, share, VOCABULARY, SEED)])
    changed = before != after
    count = len(before)
    # a drawn token is the old one once in a vocabulary
    expected = share * (1 - 1 / VOCABULARY)
    assert changed.float().mean().item() == pytest.approx(expected, abs=3 * (share * (1 - share) / count) ** 0.5)
    drawn = torch.bincount(after[changed], minlength=VOCABULARY).double()
    mean = drawn.mean().item()
    assert ((drawn - mean) ** 2 / mean).sum().item() < VOCABULARY + 5 * (2 * VOCABULARY) ** 0.5  # chi-squared


def test_noise_is_seeded_leaves_labels_and_0_changes_nothing():
    text = batches(3)
    one, same, other = (list(calibration.noised(text, 0.5, VOCABULARY, seed)) for seed in (SEED, SEED, SEED + 1))
    for index, part in enumerate(text):
        assert torch.equal(one[index].tokens, same[index].tokens)
        assert not torch.equal(one[index].tokens, other[index].tokens)
        assert torch.equal(one[index].labels, part.labels) and one[index].length == part.length
    none = calibration.noised(text, 0.0, VOCABULARY, SEED)
    assert all(torch.equal(part.tokens, left.tokens) for part, left in zip(text, none, strict=True))
    every = torch.cat([part.tokens for part in calibration.noised(text, 1.0, VOCABULARY, SEED)])
    assert (every == torch.cat([part.tokens for part in text])).float().mean() < 0.2


@pytest.mark.parametrize("importance", ["surgeon", "taylor1"])
def test_noise_is_for_what_layers_receive_not_for_gradients(importance, default, monkeypatch):
    seen = {"grams": [], "gradients": []}
    spied = [
        (prune, "input_grams", "grams"),
        (surgeon, "gradient_energy", "gradients"),
        (saliency, "gradients", "gradients"),
    ]
    for module, name, kept in spied:
        real = getattr(module, name)

        def spy(model, parts, *rest, real=real, kept=kept):
            seen[kept] += list(parts)
            return real(model, parts, *rest)

        monkeypatch.setattr(module, name, spy)
    text, model = batches(2), tiny_model()
    asked = {"importance": importance, "compensate": True, "noise": 0.5, "scope": "global", "ratio": 0.2}
    prune.run(model, text, pruning(default.prune.model_copy(update=asked)), SEED)
    whole = {part.tokens.numpy().tobytes() for part in text}
    assert {part.tokens.numpy().tobytes() for part in seen["gradients"]} <= whole and seen["gradients"]
    assert len(seen["grams"]) == len(text)
    assert not {part.tokens.numpy().tobytes() for part in seen["grams"]} & whole
