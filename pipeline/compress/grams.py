"""What the linears that read coupled structures receive, as Gram matrices: for refits and for the surgeon."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.architecture import KINDS
from pipeline.compress.modules import last_states
from pipeline.compress.structures import PruneError
from pipeline.console import progress
from pipeline.data.alpaca import IGNORED, Batch

Grams = list[dict[str, torch.Tensor]]  # of each block: X^T X of what reads each kind, and the energy of its output
_BLOCKS_AT_ONCE = 8  # whose Gram matrices a GPU holds; a pass over the text for each such lot
_TILE = 256  # columns of a Gram matrix computed at a time, from the diagonal on: the other half is the same


def input_grams(model: PreTrainedModel, calibration: Sequence[Batch]) -> Grams:
    """Return, for each block, X^T X of the inputs X of the reading linears, and the energy of the block's output.

    Padding is left out. Divided by the number of tokens. They are kept in the CPU's memory: those of a large model are
    more than the model, so a GPU holds them for a few blocks at a time.
    """
    model.eval()
    count = len(architecture.blocks(model))
    at_once = count if model.device.type == "cpu" else _BLOCKS_AT_ONCE
    grams: Grams = []
    for first in range(0, count, at_once):
        grams += _grams_of(model, calibration, range(first, min(first + at_once, count)))
    return grams


@torch.no_grad()
def _grams_of(model: PreTrainedModel, calibration: Sequence[Batch], blocks: range) -> Grams:
    halves: dict[tuple[int, str], torch.Tensor] = {}
    energy = torch.zeros(len(blocks), device=model.device)
    total = 0
    for part in progress(calibration, f"activations, blocks {blocks[0]} to {blocks[-1]}"):
        real = part.labels != IGNORED
        real[:, 0] = True
        total += int(real.sum())
        with reading(model, lambda value: value) as seen, architecture.block_outputs(model) as outputs:
            last_states(model, part.tokens)
        for place, block in enumerate(blocks):
            energy[place] += outputs[block][real].float().square().sum()
            for kind in KINDS:
                inputs = seen[block, kind][real].float()
                width = inputs.shape[1]
                half = halves.setdefault((block, kind), torch.zeros(width, width, device=model.device))
                for start in range(0, width, _TILE):
                    here = slice(start, start + _TILE)
                    half[here, start:].addmm_(inputs[:, here].T, inputs[:, start:])
    grams = [
        {kind: _whole(halves[block, kind] / total).cpu() for kind in KINDS} | {"output": (energy[place] / total).cpu()}
        for place, block in enumerate(blocks)
    ]
    for block, measured in zip(blocks, grams, strict=True):
        for kind in KINDS:
            if not measured[kind].isfinite().all():
                name = architecture.linear_name(block, architecture.reader(model.config, kind))
                raise PruneError(
                    f"{name}: what this layer receives is not finite (NaN or "
                    "infinite), so nothing can be fitted to it; check the weights of the blocks up to it, or compute "
                    "in another type (dtype)"
                )
    return grams


def _whole(half: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrix whose upper half is given."""
    return half.triu() + half.triu(1).T


@contextmanager
def reading(
    model: PreTrainedModel, through: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """Collect what the reading linears of every block receive: (block, kind) -> [B, L, inputs]."""
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def hook(place: tuple[int, str], _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen[place] = through(inputs[0]) if inputs[0].is_leaf else inputs[0]
        return (seen[place],)

    places = [(block, kind) for block in range(len(architecture.blocks(model))) for kind in KINDS]
    with ExitStack() as hooks:
        for block, kind in places:
            linear = model.get_submodule(architecture.linear_name(block, architecture.reader(model.config, kind)))
            handle = linear.register_forward_pre_hook(partial(hook, (block, kind)))
            hooks.callback(handle.remove)
        yield seen


def typical_energy(gram: torch.Tensor) -> torch.Tensor:
    """Return the median of a Gram matrix's diagonal, which damping is a multiple of.

    The mean would be that of one massive activation. Where most inputs are dead the median is zero: then it is that
    of the living ones, and 1 if there are none, so that damping is always positive.

    Args:
        gram: X^T X, [in, in].
    """
    energy = gram.diagonal().double()
    median = energy.median()
    if median > 0:
        return median
    living = energy[energy > 0]
    return living.median() if len(living) else torch.ones_like(median)
