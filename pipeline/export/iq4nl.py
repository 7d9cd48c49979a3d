"""Weights as llama.cpp's IQ4_NL: blocks of 32 neighbours in a row share a 16-bit scale, codes index 16 uneven levels.

The ``gguf`` package reads this type and cannot write it. A block takes 18 bytes, 4.5 bits a weight.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 32  # neighbours in a row that share a scale
# ggml's kvalues_iq4nl. The scale may be negative: either end of the levels can take the largest weight.
LEVELS = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
_TRIED = range(-6, 7, 4)  # steps around an end of the levels that the largest weight is put at; more gain nothing
_ROWS = 1 << 13  # blocks encoded at once: what they need stays in the processor's cache

# The middles between levels are multiples of a half, so that the code is looked up in a table of halves, from -256 on.
_HALVES = torch.arange(-512, 512) / 2 + 0.25
_CODES = torch.bucketize(_HALVES, (LEVELS[1:] + LEVELS[:-1]) / 2).to(torch.uint8)
_NEAREST = LEVELS[_CODES.int()]


def encode(weight: torch.Tensor, importance: torch.Tensor | None = None) -> np.ndarray:
    """Return a matrix in IQ4_NL: [out, in / 32 * 18] bytes.

    Args:
        weight: [out, in], fp32; ``in`` is a multiple of 32.
        importance: What a squared error counts in each column, [in], positive; None: the same in all.
    """
    return packed(*quantized(weight, importance))


def quantized(weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes, [out, in] uint8, and the scales, [out, in / 32] fp16, of the least squared errors found."""
    outputs, inputs = weight.shape
    blocks = weight.reshape(-1, BLOCK)
    counts = torch.ones(inputs) if importance is None else importance.float()
    weights = counts.view(-1, BLOCK)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    scales = torch.empty(len(blocks), dtype=torch.float16)
    step = max(_ROWS // len(weights), 1) * len(weights)  # whole rows
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step].float()
        scale = _scales(part, weights.repeat(len(part) // len(weights), 1)).to(torch.float16)
        scales[start : start + step] = scale
        codes[start : start + step] = nearest(part, scale.float())
    return codes.view(outputs, inputs), scales.view(outputs, -1)


def nearest(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the index of the level nearest to each weight: [blocks, 32] and [blocks] -> [blocks, 32] uint8."""
    return _looked_up(_CODES, blocks, torch.where(scales == 0, 0.0, 1 / scales))


def _looked_up(table: torch.Tensor, blocks: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    halves = (blocks * (2 * inverse[:, None])).add_(512).clamp_(0, 1023)
    return table.index_select(0, halves.int().view(-1)).view(blocks.shape)


def _scales(blocks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return for each block the best scale found, fp32: [blocks, 32] -> [blocks].

    For given codes with levels L the squared error is least at s = sum(w x L) / sum(w L^2), and falls by
    sum(w x L)^2 / sum(w L^2). Codes are those of the largest weight near either end of the levels.
    """
    place = blocks.abs().argmax(1, keepdim=True)
    largest = blocks.gather(1, place)[:, 0]
    inverse = torch.where(largest == 0, 0.0, 1 / largest)
    weighted = weights * blocks
    best, most = torch.zeros_like(largest), torch.zeros_like(largest)
    for end in (LEVELS[0], LEVELS[-1]):
        for tried in _TRIED:
            levels = _looked_up(_NEAREST, blocks, (end + tried) * inverse)
            product = torch.einsum("bi,bi->b", weighted, levels)
            square = torch.einsum("bi,bi->b", weights, levels * levels)
            gain = product * product / square
            best, most = torch.where(gain > most, product / square, best), torch.maximum(gain, most)
    return best


def packed(codes: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Return codes, [out, in], and scales, [out, in / 32] fp16, as ggml stores them: [out, in / 32 * 18] bytes."""
    outputs, inputs = codes.shape
    halves = codes.view(outputs, inputs // BLOCK, 2, BLOCK // 2)
    both = halves[:, :, 0] | halves[:, :, 1] << 4  # the first half of a block in the low bits
    head = scales.contiguous().view(torch.uint8).view(outputs, inputs // BLOCK, 2)
    return torch.cat([head, both], 2).view(outputs, -1).numpy()


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weights that codes and scales stand for: [out, in], fp32."""
    outputs, inputs = codes.shape
    values = LEVELS[codes.int()].view(outputs, -1, BLOCK) * scales.float()[:, :, None]
    return values.view(outputs, inputs)
