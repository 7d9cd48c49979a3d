import pytest
import torch
from conftest import ROOT, write_jsonl

from pipeline.data import alpaca
from pipeline.data.alpaca import IGNORED, Example
from pipeline.errors import UserError

SAMPLE = ROOT / "data/sample/alpaca.jsonl"
ROWS = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Greet.", "input": "", "output": "Hi!"}]


class Letters:
    """One token a letter; like Llama's tokenizer, it starts a text with a special token unless told otherwise."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text, add_special_tokens=True):
        return [self.bos_token_id] * add_special_tokens + [10 + ord(letter) for letter in text]


def test_prompt_without_input():
    assert alpaca.prompt("Name a tree.").split("\n") == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "",
        "### Instruction:",
        "Name a tree.",
        "",
        "### Response:",
        "",
    ]


def test_prompt_with_input():
    assert alpaca.prompt("Translate.", "Good\nday").split("\n") == [
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.",
        "",
        "### Instruction:",
        "Translate.",
        "",
        "### Input:",
        "Good",
        "day",
        "",
        "### Response:",
        "",
    ]


def test_read_gives_every_line_with_its_letters(tmp_path):
    rows = [*ROWS, {"instruction": "a\nb\u2028c", "input": "", "output": "ü×"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert alpaca.read(tmp_path / "rows.jsonl") == rows


def test_read_takes_unescaped_line_separators_within_a_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"instruction": "a\u2028b", "input": "", "output": "\x85"}\n', encoding="utf-8"
    )
    assert alpaca.read(tmp_path / "rows.jsonl") == [{"instruction": "a\u2028b", "input": "", "output": "\x85"}]


def test_encoded_row_is_prompt_answer_and_end():
    for row, example in zip(ROWS, alpaca.encode(ROWS, Letters(), 1000), strict=True):
        text = alpaca.prompt(row["instruction"], row["input"])
        assert example.response == 1 + len(text)
        assert example.tokens[: example.response] == (1, *(10 + ord(letter) for letter in text))
        assert example.tokens[example.response :] == (*(10 + ord(letter) for letter in row["output"]), 2)


def test_encoding_decodes_to_the_row(tokenizer):
    rows = alpaca.read(SAMPLE)[:20]
    for row, example in zip(rows, alpaca.encode(rows, tokenizer, 10_000), strict=True):
        assert tokenizer.decode(example.tokens[: example.response]) == alpaca.prompt(row["instruction"], row["input"])
        assert tokenizer.decode(example.tokens[example.response :]) == row["output"] + "</s>"


@pytest.mark.parametrize(("beyond", "found"), [(-1, 0), (0, 0), (1, 1), (3, 3), (4, 4), (5, 4)])
def test_encode_truncates_answers_and_drops_rows_without_one(beyond, found):
    row = ROWS[1]  # the answer is 3 letters and the end
    start = 1 + len(alpaca.prompt(row["instruction"]))
    (whole,) = alpaca.encode([row], Letters(), 1000)
    examples = alpaca.encode([row], Letters(), start + beyond)
    assert [len(example.tokens) - example.response for example in examples] == [found][: found > 0]
    for example in examples:
        assert example.tokens == whole.tokens[: start + beyond]


@pytest.mark.parametrize(
    ("whole", "labels"),
    [
        (True, [[IGNORED, 6, 7, 8, 9], [IGNORED, 4, 3, IGNORED, IGNORED]]),
        (False, [[IGNORED, IGNORED, IGNORED, 8, 9], [IGNORED, IGNORED, 3, IGNORED, IGNORED]]),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_batch_pads_on_the_right_and_labels_what_is_predicted(whole, labels, padding):
    found = alpaca.batch([Example((5, 6, 7, 8, 9), 3), Example((5, 4, 3), 2)], padding, whole)
    assert found.tokens.shape == found.labels.shape == (2, alpaca.ROUND)
    assert found.tokens[:, :5].tolist() == [[5, 6, 7, 8, 9], [5, 4, 3, padding, padding]]
    assert found.labels[:, :5].tolist() == labels
    assert (found.tokens[:, 5:] == padding).all() and (found.labels[:, 5:] == IGNORED).all()
    assert found.tokens.dtype == found.labels.dtype == torch.long


def test_batches_hold_every_row_once_sorted_by_length():
    examples = [Example(tuple(range(100 * i, 100 * i + length)), 1) for i, length in enumerate((7, 2, 9, 4, 3, 8, 5))]
    found = list(alpaca.batches(examples, 3, -1, True))
    assert [len(part.tokens) for part in found] == [3, 3, 1]
    assert {part.tokens.shape[1] for part in found} == {alpaca.ROUND}
    rows = [tuple(token for token in row if token != -1) for part in found for row in part.tokens.tolist()]
    assert rows == sorted((example.tokens for example in examples), key=len)


def test_batches_pad_less_than_rows_in_their_own_order():
    lengths = [33, 300, 34, 290, 35, 320]
    examples = [Example(tuple(range(length)), 1) for length in lengths]
    cells = sum(part.tokens.numel() for part in alpaca.batches(examples, 2, 0, True))
    assert cells == 2 * (64 + 320 + 320)
    assert cells < sum(2 * max(lengths[i : i + 2]) for i in (0, 2, 4))


@pytest.mark.parametrize("held_out", [0, 1, 13, 40])
def test_split_parts_are_disjoint_and_complete(held_out):
    train, validation = alpaca.split(range(40), held_out, 7)
    assert len(validation) == held_out
    assert sorted(train + validation) == list(range(40))


def test_split_is_shuffled_by_its_seed_alone():
    rows = list(range(40))
    first, again, other = (alpaca.split(rows, 10, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[1] not in (rows[:10], rows[-10:])
    assert rows == list(range(40))


@pytest.mark.parametrize("samples", [1, 8])
def test_calibration_rows_are_the_first_training_rows(samples, tokenizer):
    train, validation = alpaca.split(alpaca.read(SAMPLE), 32, 42)
    found = alpaca.rows(SAMPLE, tokenizer, 32, samples, 1000, 42)
    assert found == alpaca.encode(train[:samples], tokenizer, 1000)
    assert not set(found) & set(alpaca.encode(validation, tokenizer, 1000))


def test_calibration_looks_for_rows_until_it_has_them(tmp_path):
    long = {"instruction": "x" * 900, "input": "", "output": "y"}
    write_jsonl(tmp_path / "rows.jsonl", [long] * 30 + [ROWS[1]] * 2)
    assert len(alpaca.rows(tmp_path / "rows.jsonl", Letters(), 0, 2, 500, 0)) == 2


def test_calibration_replaces_rows_that_are_too_long(tmp_path):
    long = {"instruction": "x" * 900, "input": "", "output": "y"}
    write_jsonl(tmp_path / "rows.jsonl", [row for i in range(20) for row in (long, ROWS[1] | {"output": str(i)})])
    found = alpaca.rows(tmp_path / "rows.jsonl", Letters(), 2, 3, 500, 0)
    assert len(found) == 3


def test_windows_are_the_training_rows_texts_end_to_end(tmp_path, tokenizer):
    rows = [{"instruction": f"Name {i}.", "input": "red" * (i % 2), "output": f"It is {i}."} for i in range(6)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train, _ = alpaca.split(rows, 2, 3)
    text = "".join(
        "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part) + "\n\n" for row in train
    )
    found = alpaca.packed(tmp_path / "rows.jsonl", tokenizer, 2, 3, 9, 3)
    assert [len(one.tokens) for one in found] == [9, 9, 9]
    assert text.startswith(tokenizer.decode([token for one in found for token in one.tokens]))
    assert {one.response for one in found} == {1}  # all but the first token of a window is predicted


def test_windows_of_too_few_texts_are_fewer(tmp_path, tokenizer):
    rows = [{"instruction": "Add one and one.", "input": "", "output": "Two."}] * 3
    write_jsonl(tmp_path / "rows.jsonl", rows)
    every = alpaca.packed(tmp_path / "rows.jsonl", tokenizer, 1, 1000, 5, 0)
    text = tokenizer.encode("Add one and one.\nTwo.\n\n") * 2
    assert [token for one in every for token in one.tokens][: len(text) - 1] == text[: len(text) - 1]
    assert len(every) in (len(text) // 5, len(text) // 5 + 1)


def test_snippets_are_pieces_of_different_texts_that_are_long_enough(tmp_path):
    rows = [{"instruction": chr(97 + i) * 3, "input": "", "output": "".join(map(str, range(i)))} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    texts = [Letters().encode(f"{row['instruction']}\n{row['output']}", False) for row in rows if row["output"]]
    found = alpaca.snippets(tmp_path / "rows.jsonl", Letters(), 2, 6, 12, 3)
    assert len(found) == 6 and all(len(one.tokens) == 12 for one in found)
    whole = ["".join(chr(token - 10) for token in text) for text in texts]
    pieces = ["".join(chr(token - 10) for token in one.tokens) for one in found]
    owners = [[index for index, text in enumerate(whole) if piece in text] for piece in pieces]
    assert all(owners)
    assert any(not whole[own[0]].startswith(piece) for piece, own in zip(pieces, owners, strict=True))
    assert found == alpaca.snippets(tmp_path / "rows.jsonl", Letters(), 2, 6, 12, 3)
    with pytest.raises(UserError, match="lower max_length"):
        alpaca.snippets(tmp_path / "rows.jsonl", Letters(), 2, 6, 100, 3)


def test_responses_are_the_longest_ones_end_to_end(tmp_path, tokenizer):
    rows = [{"instruction": "Count.", "input": "", "output": f"{i} " * i} for i in range(1, 9)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train, _ = alpaca.split(rows, 2, 3)
    outputs = sorted((row["output"] for row in train), key=len, reverse=True)
    text = "".join(f"{one}\n\n" for one in outputs)
    found = alpaca.responses(tmp_path / "rows.jsonl", tokenizer, 2, 3, 7, 3)
    assert [len(one.tokens) for one in found] == [7, 7, 7]
    assert text.startswith(tokenizer.decode([token for one in found for token in one.tokens]))
