"""Which coupled structures of a model may go, judged by its config alone: nothing here needs weights or torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline import architecture
from pipeline.architecture import BlockShape, Config
from pipeline.errors import UserError


class PruneError(UserError):
    """Settings that do not fit a model, or a model whose weights cannot be scored."""


class Range(Protocol):
    """Blocks ``first`` to ``last``, both included; -1 is the last block of the model, -2 the one before it."""

    @property
    def first(self) -> int:
        """Return the first block."""

    @property
    def last(self) -> int:
        """Return the last block."""


class Limits(Protocol):
    """What may go at all: kinds of structures, ranges of blocks, and how many channels of a block stay at least."""

    @property
    def structures(self) -> tuple[str, ...]:
        """Return the kinds that may go."""

    @property
    def multiple_of(self) -> int:
        """Return what the number of a block's channels stays a multiple of."""

    @property
    def attention_blocks(self) -> Range:
        """Return where heads may go."""

    @property
    def mlp_blocks(self) -> Range:
        """Return where channels may go."""


@dataclass(frozen=True)
class Span:
    """A ``Range``."""

    first: int = 0
    last: int = -1


@dataclass(frozen=True)
class Settings:
    """How a model is pruned.

    Attributes:
        ratio: Fraction of the whole model's parameters to remove.
        importance: Score of a structure: ``taylor1``, ``taylor2``, ``taylor_mix``, ``magnitude``, ``random``,
            ``activation``, ``fisher_mask`` or ``surgeon``.
        level: ``parameter`` takes absolute values before a row is summed, ``vector`` afterwards.
        aggregate: From the scores of a structure's members to its own: ``sum``, ``mean``, ``prod``, ``max``, ``last``.
        scope: ``local`` (the same share of each block) or ``global`` (one ranking of all structures).
        shapes: ``free`` (each block its own) or ``uniform`` (one for all blocks).
        structures: Kinds that may go: ``attention``, ``mlp``.
        multiple_of: The channels that a block keeps are a multiple of it.
        attention_blocks: Where heads may go.
        mlp_blocks: Where channels may go.
        noise: Share of the tokens that are replaced by random ones where activations are measured.
        steps: 1: one shot; more: structures are scored again after each part of the removal.
        compensate: Whether o_proj and down_proj are refitted to their dense outputs.
    """

    ratio: float
    importance: str
    level: str
    aggregate: str
    scope: str
    shapes: str
    structures: tuple[str, ...]
    multiple_of: int
    attention_blocks: Range
    mlp_blocks: Range
    noise: float
    steps: int
    compensate: bool


def block_range(config: Config, key: str, span: Range) -> str | None:
    """Return what is wrong with a range of blocks that lies outside the model, or None."""
    layers = len(architecture.shapes(config))
    if not span.first <= counted(span, layers) < layers:
        return f"prune.{key}: {span.first} to {span.last} is no range within blocks 0 to {layers - 1}"
    return None


class Shaped(Limits, Protocol):
    """Limits, and whether all blocks get one shape."""

    @property
    def shapes(self) -> str:
        """Return ``free`` or ``uniform``."""


def spared(settings: Shaped, layers: int | None = None) -> str | None:
    """Return what is wrong with ranges that spare blocks where all get one shape, or None.

    Args:
        settings: ``shapes``, ``structures`` and the ranges are read.
        layers: Blocks of the model; None: not known yet, and a last block counted from the front may be the last.
    """
    if settings.shapes != "uniform":
        return None
    names = []
    for kind in settings.structures:
        span = span_of(settings, kind)
        to_end = span.last == -1 or (span.last >= 0 and layers in (None, span.last + 1))
        if span.first > 0 or not to_end:
            names.append(f"prune.{kind}_blocks {span.first} to {span.last}")
    if not names:
        return None
    return (
        f"prune.shapes: uniform gives all blocks one shape, but {' and '.join(names)} spare some; set first to 0 and "
        "last to -1, or shapes to free"
    )


def ratio(config: Config, limits: Limits, key: str, asked: float) -> str | None:
    """Return what is wrong with a ratio that would empty a block, or None: each keeps a head and some channels.

    Args:
        config: The model's config.
        limits: What may go at all.
        key: What the ratio is called in the params.
        asked: The ratio.
    """
    spans = (("attention_blocks", limits.attention_blocks), ("mlp_blocks", limits.mlp_blocks))
    if any(block_range(config, key, span) for key, span in spans):
        return None  # which is a fault of its own
    removable = sum(
        architecture.group_parameters(config, shape, kind)
        * (architecture.group_count(shape, kind) - kept(limits, shape, kind))
        for index, shape in enumerate(architecture.shapes(config))
        for kind in limits.structures
        if prunable(config, limits, index, kind)
    )
    parameters = architecture.parameters(config)
    if asked * parameters > removable:
        return (
            f"{key}: {asked} of {parameters:,} parameters is more than the {removable / parameters:.3f} "
            "that structures and block ranges allow while each block keeps a head and prune.multiple_of channels; "
            "lower it or widen the ranges"
        )
    return None


def kept(limits: Limits, shape: BlockShape, kind: str) -> int:
    """Return how many structures of a kind a block keeps at least."""
    return 1 if kind == "attention" else min(limits.multiple_of, shape.channels)


def calibrated(importance: str, compensate: bool) -> bool:
    """Return whether pruning reads any text."""
    return compensate or importance not in ("magnitude", "random")


def fitted(importance: str, compensate: bool) -> bool:
    """Return whether pruning reads what layers receive, not only gradients of the loss."""
    return compensate or importance in ("activation", "surgeon")


def experts_fault(config: Config, importance: str, compensate: bool, ratios: Sequence[float]) -> str | None:
    """Return what is wrong with pruning a model with experts by what its linears receive, or None.

    Each expert receives other tokens, and many of them few.
    """
    if not any(ratios) or not architecture.experts(config):
        return None
    if fitted(importance, False) or importance == "fisher_mask":
        asked = f"prune.importance: {importance}"
    elif compensate:
        asked = "prune.compensate: true"
    else:
        return None
    return (
        f"{asked} cannot be had of a model with experts, each of which receives other tokens; set prune.importance to "
        "taylor1 and prune.compensate to false, or prune.ratios to [0]"
    )


def span_of(limits: Limits, kind: str) -> Range:
    """Return the blocks in which a kind of structure may go."""
    return limits.attention_blocks if kind == "attention" else limits.mlp_blocks


def prunable(config: Config, limits: Limits, block: int, kind: str) -> bool:
    """Return whether structures of a kind may go from a block."""
    return kind in limits.structures and inside(block, span_of(limits, kind), len(architecture.shapes(config)))


def inside(block: int, span: Range, layers: int) -> bool:
    """Return whether a block lies in a range."""
    return span.first <= block <= counted(span, layers)


def counted(span: Range, layers: int) -> int:
    """Return the last block of a range, counted from the front."""
    return span.last if span.last >= 0 else layers + span.last
