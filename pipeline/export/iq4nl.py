"""Weights as llama.cpp's IQ4_NL: blocks of 32 neighbours in a row share a 16-bit scale, codes index 16 uneven levels.

The ``gguf`` package reads this type and cannot write it. A block takes 18 bytes, 4.5 bits a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.compress import codes
from pipeline.compress.codes import Fit, Grid

BLOCK = 32  # neighbours in a row that share a scale
# ggml's kvalues_iq4nl. The scale may be negative: either end of the levels can take the largest weight.
LEVELS = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
GRID = Grid(LEVELS, BLOCK, ends=(-127.0, 113.0), scale_dtype=torch.float16)
FIT = Fit(factors=(1.05, 1.02, 0.99, 0.96, 0.93, 0.9, 0.87))  # above 1 the largest weight is cut off least of all
_ROWS = 1 << 13  # blocks encoded at once: what they need stays in the processor's cache


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix in IQ4_NL, each weight at its nearest level: [out, in / 32 * 18] uint8.

    Args:
        weight: [out, in], fp32; ``in`` is a multiple of 32.
    """
    blocks = weight.reshape(-1, BLOCK)
    index, scales = torch.empty(blocks.shape, dtype=torch.uint8), torch.empty(len(blocks))
    for start in range(0, len(blocks), _ROWS):
        here = slice(start, start + _ROWS)
        scales[here] = codes.best_scales(blocks[here], torch.ones_like(blocks[here]), GRID, FIT.factors)
        index[here] = GRID.nearest(blocks[here], scales[here, None])
    return packed(index.view(weight.shape), scales)


def calibrated(weights: Sequence[torch.Tensor], gram: torch.Tensor) -> list[torch.Tensor]:
    """Return matrices in IQ4_NL whose outputs change least: [out, in / 32 * 18] uint8 each, in CPU memory.

    Args:
        weights: Each [out, in], of linears that receive the same inputs; ``in`` is a multiple of 32.
        gram: X^T X of these inputs X, or a multiple of it: [in, in].
    """
    grid = replace(GRID, levels=LEVELS.to(weights[0].device))
    index, scales = codes.fitted(weights, gram, grid, FIT)
    return list(packed(index.cpu(), scales.cpu()).split([len(weight) for weight in weights]))


def packed(index: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return codes, [out, in] uint8, and scales, [out * in / 32], as ggml stores them: [out, in / 32 * 18] uint8."""
    outputs, inputs = index.shape
    halves = index.view(outputs, inputs // BLOCK, 2, BLOCK // 2)
    both = halves[:, :, 0] | halves[:, :, 1] << 4  # the first half of a block in the low bits
    head = scales.to(torch.float16).view(torch.uint8).view(outputs, inputs // BLOCK, 2)
    return torch.cat([head, both], 2).view(outputs, -1)
