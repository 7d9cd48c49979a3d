"""Calibration text: what the model writes itself follows its own distribution, seeded, without special tokens."""

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_model, write_jsonl

from pipeline import alpaca, calibration

SPECIAL = [0, 1]  # of the tiny tokenizer: <s> and </s>
HELD_OUT, SEED = 2, 3


@pytest.fixture
def rows(tmp_path):
    write_jsonl(
        tmp_path / "rows.jsonl",
        [{"instruction": "Count.", "input": "", "output": "one two three " * i} for i in range(1, 12)],
    )
    return tmp_path / "rows.jsonl"


def test_what_it_writes_is_what_it_finds_likely(tokenizer):
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)  # so sure of each token that a draw is the likeliest one
    model.generation_config.repetition_penalty = 9.0  # is left aside
    found, other = calibration.written(model, tokenizer, 2, 12, SEED)
    assert found == other
    tokens = [tokenizer.bos_token_id, *found.tokens]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[:-1]])).logits[0]
    logits[:, SPECIAL] = -torch.inf
    assert logits.argmax(-1).tolist() == list(found.tokens)
    assert found.response == 1


def test_the_first_token_is_drawn_from_the_whole_distribution(tokenizer, monkeypatch):
    monkeypatch.setattr(calibration, "_AT_ONCE", 5000)
    model = tiny_model()
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 3  # are left aside
    drawn = [example.tokens[0] for example in calibration.written(model, tokenizer, 20000, 1, SEED)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, 0]
    logits[SPECIAL] = -torch.inf
    expected = logits.softmax(-1)
    seen = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY) / len(drawn)
    chance = (2 * expected * (1 - expected) / torch.pi / len(drawn)).sqrt().sum() / 2  # of the distance, by drawing
    assert (seen - expected).abs().sum() / 2 < 1.5 * chance
    assert (1 / VOCABULARY - expected).abs().sum() / 2 > 2 * chance  # the test could tell another distribution


def test_texts_stand_end_to_end_in_the_windows(tokenizer, monkeypatch):
    model = tiny_model()
    one = calibration.written(model, tokenizer, 3, 5, SEED)
    monkeypatch.setattr(calibration, "_TEXT", 5)
    found = calibration.written(model, tokenizer, 2, 7, SEED)  # 14 tokens: three texts of five, the last one cut
    whole = [token for text in one for token in text.tokens]
    assert [token for window in found for token in window.tokens] == whole[:14]
    assert [len(window.tokens) for window in found] == [7, 7]


def test_no_token_without_probability_is_drawn(tokenizer, monkeypatch):
    draws = iter([0.0, 1 - 2**-24])  # the ends of what torch.rand gives
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, next(draws)))
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[torch.arange(VOCABULARY) != 7] = 0  # every other token is alike
        model.lm_head.weight[7] = 1e30 * torch.randn(model.config.hidden_size)
    (found,) = calibration.written(model, tokenizer, 1, 2, SEED)
    assert not set(found.tokens) & set(SPECIAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_full_seeded_and_without_special_tokens(family, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration, "_AT_ONCE", 4)
    model = tiny_model(family)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found = calibration.written(model, tokenizer, 7, 40, SEED)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(one.tokens) for one in found] == [40] * 7
    assert not {token for one in found for token in one.tokens} & set(SPECIAL)
    assert len({one.tokens for one in found}) == 7
    assert found == calibration.written(model, tokenizer, 7, 40, SEED)
    assert found != calibration.written(model, tokenizer, 7, 40, SEED + 1)


@pytest.mark.parametrize(("text", "samples", "own"), [("rows", 5, 0), ("responses", 3, 4), ("packed", 0, 6)])
def test_the_asked_text_is_used(text, samples, own, rows, tokenizer, default):
    asked = {"text": text, "samples": samples, "own_samples": own, "max_length": 96}
    model = tiny_model()
    parts = calibration.batches(model, tokenizer, rows, default.prune.model_copy(update=asked), HELD_OUT, SEED, size=1)
    expected = alpaca.SOURCES[text](rows, tokenizer, HELD_OUT, samples, 96, SEED)
    assert len(expected) == samples
    expected += calibration.written(model, tokenizer, own, 96, SEED)
    found = sorted(part.tokens[0, : part.length].tolist() for part in parts)
    assert found == sorted(list(one.tokens) for one in expected)
    assert all((part.labels[0, 1 : part.length] == part.tokens[0, 1 : part.length]).all() for part in parts)


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_nothing_is_written_where_nothing_is_calibrated(importance, rows, tokenizer, default, monkeypatch):
    asked = {"importance": importance, "samples": 3, "own_samples": 4, "max_length": 96}
    read = default.prune.model_copy(update=asked | {"compensate": True})
    assert calibration.batches(tiny_model(), tokenizer, rows, read, HELD_OUT, SEED)
    monkeypatch.setattr(calibration, "written", None)
    unread = default.prune.model_copy(update=asked | {"compensate": False})
    assert calibration.batches(tiny_model(), tokenizer, rows, unread, HELD_OUT, SEED) == []


def test_a_document_starts_after_the_token_that_separates_them(tokenizer):
    assert calibration._start(tokenizer) == tokenizer.bos_token_id

    class Separated:
        bos_token_id, eos_token_id = 5, 6

        def get_vocab(self):
            return {"a": 0, "<|endoftext|>": 3}

    assert calibration._start(Separated()) == 3

    class Bare(Separated):
        bos_token_id = None

        def get_vocab(self):
            return {"a": 0}

    assert calibration._start(Bare()) == 6
