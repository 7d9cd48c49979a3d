"""The built model's 4-bit linears rounded again, onto llama.cpp's IQ4_NL, so that their outputs change least.

Codes that were fitted to one grid lose more than others by going to the nearest level of another one. So the error of
each weight is made up for by the weights that are rounded after it (``compress/codes.py``), judged by what the linears
of the built model receive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from pipeline import architecture, cores
from pipeline.compress import linear_grams
from pipeline.console import progress
from pipeline.data.alpaca import Batch
from pipeline.device import Compute
from pipeline.export import iq4nl
from pipeline.export.dense import Dense, Load
from pipeline.export.limits import ExportError


def enough(batches: Sequence[Batch], built: Dense) -> list[Batch]:
    """Return the first of the batches, as many as the widest linear needs, or all of them."""
    config = built.config
    shapes = ((shape, name) for shape in architecture.shapes(config) for name in architecture.linear_names(config))
    widest = max(architecture.linear_shape(config, shape, name)[1] for shape, name in shapes)
    needed = linear_grams.tokens_needed(widest)
    taken: list[Batch] = []
    for part in batches:
        if linear_grams.count_tokens(taken) >= needed:
            break
        taken.append(part)
    return taken


def rounded(built: Dense, weight: Load, batches: Sequence[Batch], compute: Compute) -> dict[str, torch.Tensor]:
    """Return ``iq4nl``'s bytes of the 4-bit linears, by their full names; the matrices of one block exist at a time.

    Linears are left out where the text is too short for their width, or where no block of 32 divides it.

    Args:
        built: The model.
        weight: From a linear's name to its weight, [out, in].
        batches: Calibration text; padding is left out.
        compute: Where the model runs and in which type.

    Raises:
        ExportError: What a linear receives is not finite.
    """
    tokens = linear_grams.count_tokens(batches)
    blocks = linear_grams.collect(built.model(compute), batches)
    result: dict[str, torch.Tensor] = {}
    for block in progress(blocks, "rounding for llama.cpp", total=built.config.num_hidden_layers):
        grams = {name: gram for name, gram in block.items() if gram is not None}
        groups = [group for group in _groups(built, grams) if linear_grams.enough_tokens(len(grams[group[0]]), tokens)]
        with cores.each() as pool:
            for part in pool.map(partial(_fitted, weight, grams, compute.device), groups):
                result |= part
    return result


def _groups(built: Dense, grams: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield the 4-bit linears of a block, those with the same inputs together."""
    together: dict[int, list[str]] = {}
    for name, gram in grams.items():
        if built.bits.get(name) == 4 and len(gram) % iq4nl.BLOCK == 0:
            together.setdefault(id(gram), []).append(name)
    yield from together.values()


def _fitted(
    weight: Load, grams: Mapping[str, torch.Tensor], device: torch.device, group: Sequence[str]
) -> dict[str, torch.Tensor]:
    gram = grams[group[0]]
    if not gram.isfinite().all():
        raise ExportError(
            f"{group[0]}: what this layer of the built model receives is not finite (NaN or infinite); set "
            "quantize.method to nearest to export it all the same, or build another model"
        )
    weights = [weight(name).to(device) for name in group]
    return dict(zip(group, iq4nl.calibrated(weights, gram), strict=True))
