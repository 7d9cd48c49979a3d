"""One shape for all blocks, chosen by what it costs; which heads and channels go is chosen in each block.

Engines that size every block by the first one load such a model, at some cost in quality: blocks differ in what they
can spare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline import architecture
from pipeline.architecture import KINDS, BlockShape, Config
from pipeline.compress.modules import Keep, Scores
from pipeline.compress.structures import Settings, kept


@dataclass(frozen=True)
class _Choice:
    """A shape that all blocks could get.

    Attributes:
        heads: Key/value heads that stay in a block.
        channels: MLP channels that stay in a block.
        miss: By how many parameters the whole model is above or below its target.
        price: What it costs, lower is better.
    """

    heads: int
    channels: int
    miss: float
    price: float


def select(scores: Scores, config: Config, target: int, settings: Settings) -> Keep:
    """Choose what stays so that about ``target`` parameters go and all blocks keep one shape.

    Args:
        scores: Of each block and kind, [structures]; the lowest of a block go.
        config: The model's config; its blocks have one shape.
        target: Parameters to remove.
        settings: ``scope``, ``structures`` and ``multiple_of`` are read.
    """
    chosen = _cheapest(scores, config, target, settings)
    stay = {"attention": chosen.heads, "mlp": chosen.channels}
    return [{kind: _best(block[kind], stay[kind]) for kind in KINDS} for block in scores]


def _cheapest(scores: Scores, config: Config, target: int, settings: Settings) -> _Choice:
    """Return the cheapest shape among those that meet the target as nearly as a lot of channels allows.

    For each number of heads the number of channels follows from the target. ``global`` takes the shape whose removed
    structures have the lowest sum of scores; ``local`` the one that takes most alike of heads and channels. Both count
    the channels that meet the target exactly: rounding to ``multiple_of`` should not favour shapes that remove less.
    """
    shape = architecture.shapes(config)[0]
    per_head, per_channel = (
        len(scores) * architecture.group_parameters(config, shape, kind) for kind in ("attention", "mlp")
    )
    widths = _widths(shape, settings)
    heads_cost, channels_cost = (_cost_of_removing(scores, kind) for kind in ("attention", "mlp"))
    choices = []
    for heads in _heads(shape, settings):
        gone = shape.kv_heads - heads
        exact = (target - gone * per_head) / per_channel  # channels to remove
        channels = min(widths, key=lambda width: (abs(shape.channels - width - exact), -width))
        removed = gone * per_head + (shape.channels - channels) * per_channel
        exact = min(max(exact, 0.0), float(shape.channels - min(widths)))
        if settings.scope == "local":
            price = max(gone / shape.kv_heads, exact / shape.channels)
        else:
            price = float(heads_cost[gone]) + _between(channels_cost, exact)
        choices.append(_Choice(heads, channels, abs(removed - target), price))
    # Half a lot is what rounding alone misses; a shape that misses more has taken too many heads, or too few.
    lot = settings.multiple_of * per_channel if len(widths) > 1 else 0
    tolerance = max(min(choice.miss for choice in choices), lot / 2)
    return min(
        (choice for choice in choices if choice.miss <= tolerance), key=lambda choice: (choice.price, -choice.heads)
    )


def _heads(shape: BlockShape, settings: Settings) -> Sequence[int]:
    least = kept(settings, shape, "attention") if "attention" in settings.structures else shape.kv_heads
    return range(shape.kv_heads, least - 1, -1)


def _widths(shape: BlockShape, settings: Settings) -> Sequence[int]:
    if "mlp" not in settings.structures:
        return [shape.channels]
    return [shape.channels, *range(kept(settings, shape, "mlp"), shape.channels, settings.multiple_of)]


def _cost_of_removing(scores: Scores, kind: str) -> torch.Tensor:
    """Return what it costs to remove the n lowest structures of a kind from every block, for n = 0, 1, ...: [n + 1]."""
    lowest = torch.stack([block[kind].double().sort().values for block in scores]).sum(0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), lowest.cumsum(0)])


def _between(costs: torch.Tensor, place: float) -> float:
    """Return a value between two neighbours, in proportion; the last one may be infinite and is read only if asked."""
    below = float(costs[math.floor(place)])
    share = place - math.floor(place)
    return below + share * (float(costs[math.ceil(place)]) - below) if share else below


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the highest scores, ascending; of equal ones the later stay, as in ``prune.select``."""
    return scores.argsort(stable=True)[len(scores) - count :].sort().values
