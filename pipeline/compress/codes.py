"""Calibrated codes: what rounding a weight loses is made up for by the weights that are rounded after it.

Error feedback (GPTQ, arXiv 2210.17323, algorithm 1) onto any grid, with a search for the scales: here NF4, FP4 and
int8, elsewhere llama.cpp's. Storage is bitsandbytes' own: only codes and scales differ from rounding to the nearest.
The loss of a linear W on its inputs X is ||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T), H = X^T X.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import bitsandbytes.functional as bnb
import torch
from torch import nn

from pipeline.compress.quantize import Stored

_BLOCK = 64  # neighbours in the flattened matrix that share one 4-bit scale
_SCALES_BLOCK = 256  # scales that share one scale of their own under double quantization
_INT8_UNIT = 7.874015718698502e-3  # 1 / 127, to the digits that bitsandbytes multiplies by
# Of a block of zeros, so that their code is the one nearest to zero; half of the type's least would be lost.
_LEAST_SCALES = {torch.float32: 1e-30, torch.float16: 2.0**-24}
_BINS = 4096  # of the table that the search for scales reads: it fits a core's nearest cache
_BLOCKS_AT_ONCE = 512  # whose scales are searched together: their weights fit a core's cache
_TILE = 64  # columns rounded before the rest of the matrix hears of it


@dataclass(frozen=True)
class Fit:
    """How codes are fitted to a Gram matrix.

    Attributes:
        damping: Share of the median of the Gram matrix's positive diagonal that is added to its diagonal.
        factors: A block's scale is the best of these times its largest weight.
        descending: Round the columns with the largest inputs first, while most of the others can still make up for it.
    """

    damping: float = 0.3
    factors: tuple[float, ...] = (1.0, 0.967, 0.933, 0.9, 0.867, 0.833, 0.8)
    descending: bool = True


@dataclass(frozen=True)
class Grid:
    """The values that a weight can take: ``levels[i] * scale * unit``, rounded to ``dtype``.

    Attributes:
        levels: Ascending, fp32, at most 256.
        block: Neighbours in the flattened matrix that share a scale.
        unit: Factor of all values, applied after the scale as bitsandbytes does.
        dtype: What bitsandbytes returns the values in.
        ends: Levels that a block's largest weight may stand at, its sign kept, so that scales have both signs; empty:
            its magnitude is the scale.
        scale_dtype: What scales are stored in.
    """

    levels: torch.Tensor
    block: int
    unit: float = 1.0
    dtype: torch.dtype = torch.float32
    ends: tuple[float, ...] = ()
    scale_dtype: torch.dtype = torch.float32

    @cached_property
    def bounds(self) -> torch.Tensor:
        """Return the middle between each level and the next one."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def nearest(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the index of the level nearest to each weight; any index where the scale is zero."""
        return torch.bucketize(weights / (scales * self.unit), self.bounds)

    @cached_property
    def table(self) -> torch.Tensor:
        """Return the level nearest to the middle of each of ``_BINS`` even parts of the levels' range."""
        least, most = self.levels[0], self.levels[-1]
        middles = least + (torch.arange(_BINS, device=self.levels.device) + 0.5) * ((most - least) / _BINS)
        return self.levels[torch.bucketize(middles, self.bounds)]

    def rounded(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return about what ``values`` gives for the nearest codes, several times faster.

        A weight within a bin of the middle between two levels may go to either; their errors are nearly equal.
        """
        least, most = float(self.levels[0]), float(self.levels[-1])
        step = _BINS / (most - least)
        bins = (weights * (step / (scales * self.unit))).sub_(least * step).clamp_(0, _BINS - 1)
        return self.table[bins.int()] * (scales * self.unit)

    def scales(self, weights: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
        """Return the scales to try for blocks of weights, as they are stored: [blocks, block] -> [tried, blocks].

        Args:
            weights: The blocks.
            factors: Of the scale that puts a block's largest weight at an end of the levels.
        """
        largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]
        whole = [largest / end for end in self.ends] or [largest.abs()]
        tried = torch.stack([factor * scales for scales in whole for factor in factors])
        tried = tried.to(self.scale_dtype).float()
        return torch.where(tried.abs() < _LEAST_SCALES[self.scale_dtype], _LEAST_SCALES[self.scale_dtype], tried)

    def values(self, index: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the weights that codes stand for, in fp32, equal to bitsandbytes' to the bit."""
        return (self.levels[index.long()] * scales * self.unit).to(self.dtype).float()


@dataclass(frozen=True)
class Problem:
    """A linear to round. Matrices are transposed, [in, out], so that a column of W lies together in memory.

    Attributes:
        dense: W^T, fp32.
        gram: H, damped, fp64: [in, in].
        grid: The values.
    """

    dense: torch.Tensor
    gram: torch.Tensor
    grid: Grid

    @property
    def blocks(self) -> int:
        """Return the number of scales."""
        return -(-self.dense.numel() // self.grid.block)

    @property
    def aligned(self) -> bool:
        """Return whether no block straddles two rows of W."""
        return len(self.dense) % self.grid.block == 0

    def tiles(self) -> Iterator[slice]:
        """Yield the columns that are rounded together, from the first on.

        Where blocks straddle rows, they begin at other columns in other rows; narrower tiles meet most beginnings.
        """
        width = _TILE if self.aligned else max(math.gcd(len(self.dense), self.grid.block), 16)
        for start in range(0, len(self.dense), width):
            yield slice(start, min(start + width, len(self.dense)))

    def block_of(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the block of each weight of some columns: [columns, out]."""
        inputs, outputs = self.dense.shape
        if self.aligned:
            first = torch.arange(outputs, device=self.dense.device) * (inputs // self.grid.block)
            return first + (columns // self.grid.block)[:, None]
        rows = torch.arange(outputs, device=self.dense.device) * inputs
        return (rows + columns[:, None]) // self.grid.block

    def members(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return column, row and existence (the last block may be short) of blocks' weights: [blocks, block] each."""
        inputs, outputs = self.dense.shape
        flat = blocks[:, None] * self.grid.block + torch.arange(self.grid.block, device=blocks.device)
        real = flat < inputs * outputs
        flat = flat.clamp(max=inputs * outputs - 1)
        return flat % inputs, flat // inputs, real


def calibrated(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    bits: int,
    four_bit: str = "nf4",
    double_quant: bool = False,
    fit: Fit = Fit(),  # noqa: B008  (frozen)
) -> list[Stored]:
    """Quantize matrices so that their outputs change least, as ``quantize.quantize`` stores them.

    Args:
        weights: Each W, [out, in], of linears that receive the same inputs. They are rounded as one matrix, which is
            several times faster than one after the other.
        gram: H = X^T X of their inputs or a multiple of it, [in, in], finite.
        bits: 4 or 8.
        four_bit: ``nf4`` or ``fp4``.
        double_quant: Quantize the 4-bit scales too. To fit the codes again to what comes back gains nothing.
        fit: How codes are fitted.
    """
    if bits == 4 and any(weight.numel() % _BLOCK for weight in weights[:-1]):  # a block would straddle two of them
        return [
            stored for weight in weights for stored in calibrated([weight], gram, bits, four_bit, double_quant, fit)
        ]
    grid, codes = grid_of(weights[0], bits, four_bit)
    index, scales = fitted(weights, gram, grid, fit)
    rows = [len(weight) for weight in weights]
    counts = rows if bits == 8 else [-(-weight.numel() // _BLOCK) for weight in weights]
    # Copies, as files hold no views of one tensor.
    scales_of = [part.clone() for part in scales.split(counts)]
    parts = zip([part.clone() for part in codes[index.long()].split(rows)], scales_of, strict=True)
    if bits == 8:
        return [
            {"weight": part, "SCB": row, "weight_format": torch.tensor(0, dtype=torch.uint8)} for part, row in parts
        ]
    result = []
    for number, (part, absmax) in enumerate(parts):
        more: dict[str, object] = {}
        if double_quant:
            absmax, more = _nested(absmax)
        table = bnb.get_4bit_type(four_bit, device=part.device)
        state = bnb.QuantState(absmax, part.shape, table, _BLOCK, four_bit, weights[number].dtype, **more)
        packed = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        result.append({"weight": _packed(part), **packed})
    return result


def fitted(
    weights: Sequence[torch.Tensor], gram: torch.Tensor, grid: Grid, fit: Fit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round matrices onto a grid so that their outputs change least.

    Args:
        weights: Each W, [out, in], of linears that receive the same inputs; but for the last one, a block of the grid
            ends where they do.
        gram: H = X^T X of their inputs or a multiple of it, [in, in], finite.
        grid: The grid.
        fit: How codes are fitted.

    Returns:
        Index of each weight's level, the matrices one below the other, [out, in] uint8, and the scales, [blocks].
    """
    dense = torch.cat([weight.float() for weight in weights]).T.contiguous()
    problem = Problem(dense, damped(gram.to(dense.device), fit.damping), grid)
    order = problem.gram.diagonal().argsort(descending=True) if fit.descending else None
    index, scales = feed_back(problem, fit.factors, order)
    return index.T.contiguous(), scales


def damped(gram: torch.Tensor, share: float) -> torch.Tensor:
    """Return a Gram matrix in fp64 with a share of the median of its positive diagonal added to its diagonal.

    The median, as the mean may be that of one massive activation.
    """
    result = gram.to(torch.float64, copy=True)
    diagonal = result.diagonal()
    positive = diagonal[diagonal > 0]
    # Without any input nothing tells weights apart.
    diagonal += share * positive.median() if len(positive) else 1.0
    return result


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular U with H^-1 = U^T U.

    H, its order reversed, has the Cholesky factor that reads R in H = R R^T, R upper triangular; U = R^-1. So the
    inverse itself, which would square the condition, is never formed.
    """
    upper = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(upper, unit, upper=True)


def feed_back(
    problem: Problem, factors: Sequence[float], order: torch.Tensor | None = None, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round column after column, each one's error spread over the columns that are not yet rounded (GPTQ).

    With H^-1 = U^T U, rounding column j by e moves column k > j by -e U_jk / U_jj, which makes up for e best. A tile of
    columns is rounded before the columns beyond it move.

    Args:
        problem: The linear.
        factors: A block's scale is the best of these times its largest weight when the first tile that holds a part of
            it begins, judged by the squared errors weighted with H's diagonal.
        order: In which columns are rounded, [in]; None: from the first to the last.
        scales: Scales to round to, [blocks]; None: they are chosen.

    Returns:
        Index of each weight's level, [in, out] uint8, and the scales, [blocks].
    """
    grid, device = problem.grid, problem.dense.device
    order = torch.arange(len(problem.dense), device=device) if order is None else order
    place = order.argsort()
    rest = problem.dense[order]
    factor, diagonal = inverse_factor(problem.gram[order][:, order]).float(), problem.gram.diagonal().float()
    known = torch.full((problem.blocks,), scales is not None, device=device)
    scales = torch.zeros(problem.blocks, device=device) if scales is None else scales
    index = torch.empty(rest.shape, dtype=torch.uint8, device=device)
    for here in problem.tiles():
        blocks = problem.block_of(order[here])
        begun = torch.zeros_like(known)
        begun[blocks] = True
        new = (begun & ~known).nonzero().flatten()
        if len(new):
            column, row, real = problem.members(new)
            scales[new] = best_scales(rest[place[column], row] * real, diagonal[column] * real, grid, factors)
            known[new] = True
        part, used, within = rest[here], scales[blocks], factor[here, here]
        errors = torch.empty_like(part)
        for j in range(len(part)):
            chosen = grid.nearest(part[j], used[j])
            errors[j] = (part[j] - grid.values(chosen, used[j])) / within[j, j]
            part[j + 1 :].addr_(within[j, j + 1 :], errors[j], alpha=-1)
            index[here.start + j] = chosen
        rest[here.stop :].addmm_(factor[here, here.stop :].T, errors, alpha=-1)
    return index[place], scales


def best_scales(weights: torch.Tensor, importance: torch.Tensor, grid: Grid, factors: Sequence[float]) -> torch.Tensor:
    """Return for each block the scale with the least squared error, weighted by importance.

    Args:
        weights: [blocks, block].
        importance: The same shape.
        grid: The values.
        factors: Scales tried, as parts of the block's largest weight.
    """
    best = []
    for start in range(0, len(weights), _BLOCKS_AT_ONCE):
        part, weighs = weights[start : start + _BLOCKS_AT_ONCE], importance[start : start + _BLOCKS_AT_ONCE]
        tried = grid.scales(part, factors)
        costs = [(weighs * (part - grid.rounded(part, scales[:, None])).square_()).sum(1) for scales in tried]
        best.append(tried.gather(0, torch.stack(costs).argmin(0)[None])[0])
    return torch.cat(best)


def grid_of(weight: torch.Tensor, bits: int, four_bit: str) -> tuple[Grid, torch.Tensor]:
    """Return the grid of a bit-width and the code of each of its levels."""
    if bits == 8:
        codes = torch.arange(-127, 128, device=weight.device)
        return Grid(codes.float(), weight.shape[1], _INT8_UNIT), codes.to(torch.int8)
    levels, codes = bnb.get_4bit_type(four_bit, device=weight.device).sort(stable=True)
    return Grid(levels, _BLOCK, dtype=weight.dtype), codes.to(torch.uint8)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes two a byte, the first one high; an odd last one stands alone: [bytes, 1]."""
    flat = codes.flatten()
    pairs = nn.functional.pad(flat, (0, len(flat) % 2)).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def _nested(scales: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
    """Quantize scales as ``bnb.quantize_4bit`` does; return their codes and how to undo it."""
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=_SCALES_BLOCK)
    return codes, {"offset": offset, "state2": state}
