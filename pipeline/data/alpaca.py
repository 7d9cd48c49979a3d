"""Rows as tokens: Alpaca's in its prompt, conversations by the chat template; the held-out split, batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline import storage
from pipeline.data import chat
from pipeline.data.prompts import prompt
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
TextRow = dict[str, Any]  # instruction, input and output, or messages

ROUND = 32  # lengths are padded to a multiple: few distinct shapes let matrix kernels be reused
IGNORED = -100  # label of a position that the loss leaves out


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        tokens: Token ids of prompt, response and end of text, truncated.
        response: Position of the response's first token.
        gaps: (start, end) of what stands after it and is no response: the later questions of a conversation.
    """

    tokens: tuple[int, ...]
    response: int
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def responses(self) -> list[tuple[int, int]]:
        """Return (start, end) of each response."""
        edges = [self.response, *(edge for gap in self.gaps for edge in gap), len(self.tokens)]
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, to a multiple of ``ROUND``. Causal attention never looks right, so it needs no mask.

    Attributes:
        tokens: [B, L].
        labels: [B, L]; ``IGNORED`` where a position is not predicted. Position t holds the token at t itself.
        length: Tokens of the rows, padding left out.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    length: int = 0

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device))

    def told(self, device: torch.device) -> dict[str, object]:
        """Return what a model must be told besides the tokens: nothing of padded rows."""
        return {}


def read(path: str | Path) -> list[TextRow]:
    """Read the rows that ``fetch`` wrote.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return storage.read_lines(Path(path), "fetch")


def split(rows: Sequence[T], held_out: int, seed: int) -> tuple[list[T], list[T]]:
    """Return (rows for training, ``held_out`` rows for validation), shuffled by the seed."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def encode(rows: Iterable[TextRow], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Tokenize rows; those whose prompt alone fills ``max_length`` are left out."""
    return list(_encoded(rows, tokenizer, max_length))


def asked(row: TextRow, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Return a row's prompt up to the first response, as text and as tokens."""
    if "messages" not in row:
        text = prompt(row["instruction"], row["input"])
        return text, tokenizer.encode(text)
    text, _ = chat.passages(row["messages"], tokenizer)[0][0]
    return text, tokenizer.encode(text, add_special_tokens=False)  # the template has them


def _encoded(rows: Iterable[TextRow], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    for row in rows:
        if "messages" in row:
            for pieces in chat.passages(row["messages"], tokenizer):
                yield from _passage(pieces, tokenizer, max_length)
            continue
        start = tokenizer.encode(prompt(row["instruction"], row["input"]))
        answer = tokenizer.encode(row["output"], add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(start) < max_length:
            yield Example(tuple((start + answer)[:max_length]), len(start))


def _passage(pieces: Sequence[chat.Piece], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    """Yield a passage as an example, cut after the last response token within ``max_length``; nothing without one."""
    text, tokens, spans = "", list[int](), list[tuple[int, int]]()
    for piece, said in pieces:
        start, text = len(tokens), text + piece
        whole = tokenizer.encode(text, add_special_tokens=False)
        # As the model would go on: its own tokens after those that it was given, not one that is half of each.
        joined = whole[:start] == tokens
        tokens = whole if joined else tokens + tokenizer.encode(piece, add_special_tokens=False)
        if said and start < max_length:
            spans.append((start, min(len(tokens), max_length)))
    if spans:
        gaps = tuple((end, start) for (_, end), (start, _) in pairwise(spans))
        yield Example(tuple(tokens[: spans[-1][1]]), spans[0][0], gaps)


def padded(length: int) -> int:
    """Return the length that rows of at most this length are padded to."""
    return -(-length // ROUND) * ROUND


def batch(examples: Sequence[Example], padding: int, whole: bool) -> Batch:
    """Pad examples into one batch.

    Args:
        examples: The rows.
        padding: Token id for the padded positions.
        whole: Predict every token but the first; else the responses only.
    """
    length = padded(max(len(example.tokens) for example in examples))
    tokens = torch.full((len(examples), length), padding, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.tokens)
        tokens[row, : len(ids)] = ids
        for start, end in [(1, len(ids))] if whole else example.responses:
            labels[row, start:end] = ids[start:end]
    return Batch(tokens, labels, sum(len(example.tokens) for example in examples))


def batches(examples: Sequence[Example], size: int, padding: int, whole: bool) -> Iterator[Batch]:
    """Yield batches of rows of similar length, so that little is padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(0, len(ordered), size):
        yield batch(ordered[start : start + size], padding, whole)


def rows(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, held_out: int, samples: int, max_length: int, seed: int
) -> list[Example]:
    """Return the first ``samples`` training rows, tokenized, for calibration.

    Raises:
        UserError: In every row the prompt alone fills ``max_length``.
    """
    train, _ = split(read(path), held_out, seed)
    examples = list(islice(_encoded(train, tokenizer, max_length), samples))
    if samples and not examples:
        raise UserError(f"no row's prompt leaves room for a response within max_length {max_length}; raise max_length")
    return examples


def packed(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, held_out: int, samples: int, length: int, seed: int
) -> list[Example]:
    """Return up to ``samples`` windows of ``length`` tokens from the training rows' texts, end to end, without prompts.

    The prompt's fixed words are nearly half of a short row's tokens; calibration on them fits little else.
    """
    train, _ = split(read(path), held_out, seed)
    return _windows(map(_text, train), tokenizer, samples, length)


def snippets(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, held_out: int, samples: int, length: int, seed: int
) -> list[Example]:
    """Return up to ``samples`` windows of ``length`` tokens, each from a random place of one row's text.

    How LLM-Pruner draws its calibration samples: shorter texts are passed over, prompts are left out.

    Raises:
        UserError: No text is long enough.
    """
    train, _ = split(read(path), held_out, seed)
    generator = random.Random(seed)
    pieces: list[Example] = []
    for row in train:
        if len(pieces) == samples:
            break
        tokens = tokenizer.encode(_text(row), add_special_tokens=False)
        if len(tokens) >= length:
            start = generator.randrange(len(tokens) - length + 1)
            pieces.append(Example(tuple(tokens[start : start + length]), 1))
    if samples and not pieces:
        raise UserError(f"no row's text has max_length {length} tokens; lower max_length")
    return pieces


def responses(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, held_out: int, samples: int, length: int, seed: int
) -> list[Example]:
    """Return windows as ``packed`` does, of the training rows' longest responses.

    They are running prose; the short ones are names, numbers and lists, and most instructions are alike.
    """
    train, _ = split(read(path), held_out, seed)
    answers = (answer for row in train for answer in _answers(row))
    return _windows(sorted(answers, key=len, reverse=True), tokenizer, samples, length)


def _answers(row: TextRow) -> list[str]:
    if "messages" not in row:
        return [row["output"]]
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def _text(row: TextRow) -> str:
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"] if message["role"] != "system")
    return "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)


def _windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int) -> list[Example]:
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= samples * length:
            break
        tokens += tokenizer.encode(f"{text}\n\n", add_special_tokens=False)
    starts = range(0, min(len(tokens), samples * length) - 1, length)
    return [Example(tuple(tokens[start : start + length]), 1) for start in starts]


SOURCES = {"rows": rows, "snippets": snippets, "packed": packed, "responses": responses}  # of ``prune.text``
