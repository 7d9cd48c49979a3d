"""Alpaca rows as tokens: the prompt template, the held-out split, batches of similar length."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from pipeline.data.prompts import prompt
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

ROUND = 32  # lengths are padded to a multiple: few distinct shapes let matrix kernels be reused
IGNORED = -100  # label of a position that the loss leaves out


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        tokens: Token ids of prompt, response and end of text, truncated.
        response: Position of the response's first token.
    """

    tokens: tuple[int, ...]
    response: int


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


def read(path: str | Path) -> list[dict[str, str]]:
    """Read the rows that ``fetch`` wrote."""
    # Not splitlines: JSON strings may hold other line separators, such as U+2028.
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def split(rows: Sequence[T], held_out: int, seed: int) -> tuple[list[T], list[T]]:
    """Return (rows for training, ``held_out`` rows for validation), shuffled by the seed."""
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def encode(rows: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Tokenize rows; those whose prompt alone fills ``max_length`` are left out."""
    return list(_encoded(rows, tokenizer, max_length))


def _encoded(rows: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    for row in rows:
        start = tokenizer.encode(prompt(row["instruction"], row["input"]))
        answer = tokenizer.encode(row["output"], add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(start) < max_length:
            yield Example(tuple((start + answer)[:max_length]), len(start))


def padded(length: int) -> int:
    """Return the length that rows of at most this length are padded to."""
    return -(-length // ROUND) * ROUND


def batch(examples: Sequence[Example], padding: int, whole: bool) -> Batch:
    """Pad examples into one batch.

    Args:
        examples: The rows.
        padding: Token id for the padded positions.
        whole: Predict every token but the first; else the response only.
    """
    length = padded(max(len(example.tokens) for example in examples))
    tokens = torch.full((len(examples), length), padding, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.tokens)
        tokens[row, : len(ids)] = ids
        first = 1 if whole else example.response
        labels[row, first : len(ids)] = ids[first:]
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
    return _windows(sorted((row["output"] for row in train), key=len, reverse=True), tokenizer, samples, length)


def _text(row: Mapping[str, str]) -> str:
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
