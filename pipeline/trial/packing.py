"""Rows of a recovery end to end in one sequence, without padding but at its end; each row sees itself alone.

Positions begin anew with each row. On CUDA attention is PyTorch's variable-length flash attention, which is told where
rows begin; elsewhere a mask of blocks along the diagonal, which the tests compare with rows that are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.data.alpaca import IGNORED, Batch, Example, padded
from pipeline.trial.loss import sent, unwrapped
from pipeline.trial.trees import additive

_NAME = "packed_rows"  # of this attention in transformers


@dataclass(frozen=True)
class Packed(Batch):
    """Rows in one sequence: ``tokens`` and ``labels`` are [1, T], and no row's first token is predicted.

    Attributes:
        positions: Position of each token in its row, [1, T].
        starts: Where each row begins, and T, in 32 bits. What fills the sequence up is a row of its own.
        longest: Tokens of the longest row, or more.
    """

    positions: torch.Tensor = torch.empty(0)
    starts: torch.Tensor = torch.empty(0)
    longest: int = 0

    def told(self, device: torch.device) -> dict[str, object]:
        """Return what a model must be told besides the tokens: positions for itself, the rest for ``attend``."""
        return {
            "position_ids": sent(self.positions, device),
            "cu_seq_lens_q": sent(self.starts, device),
            "max_length_q": self.longest,
        }


def parts(rows: Sequence[Example], micro_batch_size: int, max_length: int) -> list[list[Example]]:
    """Cut a batch into passes of no more tokens than ``micro_batch_size`` rows of full length have.

    As ``training.micro_batches`` does, but a row counts with its own tokens.
    """
    room = micro_batch_size * padded(max_length)
    cut: list[list[Example]] = [[]]
    taken = 0
    for row in rows:
        if cut[-1] and taken + len(row.tokens) > room:
            cut.append([])
            taken = 0
        cut[-1].append(row)
        taken += len(row.tokens)
    return cut


def pack(examples: Sequence[Example], padding: int, whole: bool, multiple: int | None = None) -> Packed:
    """Lay rows end to end.

    Args:
        examples: The rows.
        padding: Token id for what fills the sequence up.
        whole: Predict every token of a row but its first; else the response only.
        multiple: Of which the length is, so that few CUDA graphs do for all passes; None: as of padded rows.
    """
    ends = list(accumulate(len(example.tokens) for example in examples))
    length = padded(ends[-1]) if multiple is None else -(-ends[-1] // multiple) * multiple
    tokens = torch.full((1, length), padding, dtype=torch.long)
    labels = torch.full((1, length), IGNORED, dtype=torch.long)
    positions = torch.arange(length)[None] - ends[-1]  # of the filling; rows overwrite it
    for end, example in zip(ends, examples, strict=True):
        ids = torch.tensor(example.tokens)
        start, first = end - len(ids), 1 if whole else max(example.response, 1)
        tokens[0, start:end], positions[0, start:end] = ids, torch.arange(len(ids))
        labels[0, start + first : end] = ids[first:]
    starts = [0, *ends] if ends[-1] == length else [0, *ends, length]
    if multiple is not None:  # a graph has one number of rows: further ones are empty
        starts += [length] * (-len(starts) % 32)
    longest = max(len(example.tokens) for example in examples)
    return Packed(
        tokens,
        labels,
        ends[-1],
        positions,
        torch.tensor(starts, dtype=torch.int32),
        max(longest, length - ends[-1]) if multiple is None else length,
    )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within rows, as transformers calls it; without row starts as PyTorch's own attention does.

    Args:
        module: Not read.
        query: [B, heads, L, size]; B is 1 where rows are packed.
        key: [B, key/value heads, L, size].
        value: As ``key``.
        attention_mask: What is added to the scores, where no rows are packed; None: causal.
        scaling: Of the scores.
        cu_seq_lens_q: ``Packed.starts``.
        max_length_q: ``Packed.longest``.

    Returns:
        [B, L, heads, size], and no weights.
    """
    shared = query.shape[1] != key.shape[1]
    if cu_seq_lens_q is not None and query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        starts, longest = cu_seq_lens_q, max_length_q
        out = varlen_attn(
            q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=shared
        )
        return cast(torch.Tensor, out)[None], None
    if cu_seq_lens_q is not None:
        attention_mask = within_rows(cu_seq_lens_q, query.shape[2], query.dtype)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, scale=scaling, is_causal=attention_mask is None, enable_gqa=shared
    )
    return out.transpose(1, 2), None


def within_rows(starts: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask, [1, 1, T, T], under which a token sees the earlier ones of its own row."""
    row = torch.bucketize(torch.arange(length, device=starts.device), starts, right=True)
    earlier = torch.ones(length, length, dtype=torch.bool, device=starts.device).tril()
    return additive((earlier & (row[:, None] == row[None, :]))[None], dtype)


@contextmanager
def used(model: PeftModel) -> Iterator[None]:
    """Let a model attend within packed rows for a while."""
    AttentionInterface.register(_NAME, attend)
    base = cast(PreTrainedModel, unwrapped(model))
    before = base.config._attn_implementation
    base.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
