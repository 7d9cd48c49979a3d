"""What pruning is calibrated on: Alpaca's texts, and the same with some of their tokens drawn at random.

Least squares makes up for what leaves a block on the text that it is fitted to. Random tokens among the words call up
much of what a model knows and Alpaca never asks for, so that the fit holds on other text (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.data import alpaca
from pipeline.data.alpaca import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def batches(
    tokenizer: PreTrainedTokenizerBase,
    rows: str | Path,
    held_out: int,
    seed: int,
    *,
    text: str,
    samples: int,
    max_length: int,
    device: torch.device | str = "cpu",
    size: int = 8,
) -> list[Batch]:
    """Return calibration batches, every position labelled.

    Args:
        tokenizer: The tokenizer of the model to prune.
        rows: File of Alpaca rows.
        held_out: Rows that calibration may not see.
        seed: For the draw of the rows.
        text: What of the rows is read, a key of ``alpaca.SOURCES``.
        samples: Rows, or windows of their texts.
        max_length: Tokens of each.
        device: Where they are put.
        size: Rows of a batch.
    """
    examples = alpaca.SOURCES[text](rows, tokenizer, held_out, samples, max_length, seed)
    return [part.to(device) for part in alpaca.batches(examples, size, tokenizer.pad_token_id, whole=True)]


def noised(calibration: Sequence[Batch], share: float, vocabulary: int, seed: int) -> Iterator[Batch]:
    """Yield the batches with a share of their tokens replaced by random ones, all tokens alike.

    Labels stay as they are and only tell what is padding: such a text is for what layers receive, not for its loss.

    Args:
        calibration: The batches.
        share: Probability of each token to be replaced.
        vocabulary: Number of tokens to draw from.
        seed: The same seed replaces the same tokens, on any device.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in calibration:
        shape, device = part.tokens.shape, part.tokens.device
        replaced = torch.rand(shape, generator=generator) < share
        drawn = torch.randint(vocabulary, shape, generator=generator)
        yield Batch(torch.where(replaced.to(device), drawn.to(device), part.tokens), part.labels, part.length)
