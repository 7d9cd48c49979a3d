"""Which vector the search tries next: that with the highest expected improvement of the front's hypervolume.

Only quality is uncertain (``surrogate``), memory is known, so the improvement is a closed formula. It is climbed at
each ratio from several starts, over feasible vectors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from scipy.special import ndtr

from pipeline.bits import Bits, Vector
from pipeline.search.allocate import Space, Spaces
from pipeline.search.surrogate import Belief, Model, Observation

_SHORTLIST = 24  # units to raise, and to lower, that swaps are made of
_STARTS = 6


@dataclass(frozen=True)
class Front:
    """The believed front as steps: from ``memories[k]`` bytes on ``levels[k]`` is reached, and ``floor`` before.

    Attributes:
        memories: Ascending, [members].
        levels: Ascending, [members].
        floor: Quality of the reference point.
        ceiling: Its memory in bytes.
    """

    memories: np.ndarray
    levels: np.ndarray
    floor: float
    ceiling: float

    @staticmethod
    def of(memories: np.ndarray, levels: np.ndarray, ceiling: float) -> Front:
        """Return the front of some points; the worst of them is the floor."""
        order = np.lexsort((-levels, memories))
        best = np.maximum.accumulate(levels[order])
        new = np.concatenate([[True], best[1:] > best[:-1]])
        return Front(memories[order][new], best[new], float(levels.min()), ceiling)


def improvement(mean: np.ndarray, deviation: np.ndarray, memories: np.ndarray, front: Front) -> np.ndarray:
    """Return the expected hypervolume improvement of points with normal quality and known memory.

    With f(u) the front's quality at u bytes, it is the integral of E[(q - f(u))+] from the point's memory to the
    ceiling. f has steps, and over each E is sigma (t Phi(t) + phi(t)) with t = (mean - f) / sigma.

    Args:
        mean: Of the quality, [points].
        deviation: Its standard deviation, [points].
        memories: Bytes, [points].
        front: The front to improve.

    Returns:
        [points], in units of quality times bytes.
    """
    edges = np.concatenate([[-np.inf], front.memories, [front.ceiling]])
    levels = np.concatenate([[front.floor], front.levels])
    widths = np.maximum(edges[1:] - np.maximum(edges[:-1], memories[:, None]), 0)
    deviation = np.maximum(deviation, 1e-12)[:, None]
    t = (mean[:, None] - levels) / deviation
    gains = deviation * (t * ndtr(t) + np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi))
    return (widths * np.maximum(gains, 0)).sum(axis=1)


def climb(value: Callable[[np.ndarray], np.ndarray], space: Space, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Change one unit, or raise one and lower another, while that improves the value.

    Args:
        value: [vectors, units] of levels -> [vectors].
        space: What is feasible.
        start: The levels of a feasible vector, [units].

    Returns:
        The last vector's levels and its value.
    """
    current, best = start, float(value(start[None])[0])
    units, levels = np.tile(np.arange(space.units), space.top + 1), np.repeat(np.arange(space.top + 1), space.units)
    while True:
        changed = current[units] != levels
        unit, level = units[changed], levels[changed]
        flips = np.repeat(current[None], len(unit), axis=0)
        flips[np.arange(len(unit)), unit] = level
        worth = value(flips)
        ups, downs = (  # most promising first
            np.flatnonzero(group)[np.argsort(-worth[group], kind="stable")][:_SHORTLIST]
            for group in (level > current[unit], level < current[unit])
        )
        up, down = np.repeat(ups, len(downs)), np.tile(downs, len(ups))
        swaps = np.repeat(current[None], len(up), axis=0)
        rows = np.arange(len(up))
        swaps[rows, unit[down]] = level[down]
        swaps[rows, unit[up]] = level[up]
        near = np.concatenate([flips, swaps])
        near = near[space.feasible(near)]
        worth = value(near) if len(near) else np.array([-np.inf])
        if worth.max() <= best:
            return current, best
        current, best = near[worth.argmax()], float(worth.max())


def acquisition(model: Model, spaces: Spaces, tried: Sequence[Vector]) -> Callable[[float, np.ndarray], np.ndarray]:
    """Return the expected hypervolume improvement as a function of a ratio and levels, [vectors, units] -> [vectors].

    The front to improve is that of the model's means at the tried vectors: a lucky observation makes no front.
    """
    memories = np.array([spaces.memory(vector) for vector in tried], dtype=float)
    front = Front.of(memories, model.predict(tried)[0], spaces.base + spaces.reach + 1)

    def gain(ratio: float, levels: np.ndarray) -> np.ndarray:
        space = spaces.at[ratio]
        return improvement(*model.at(ratio, space.hot(levels)), space.memories(levels), front)

    return gain


def propose(
    observations: Sequence[Observation],
    spaces: Spaces,
    beliefs: Mapping[float, Belief],
    exclude: set[Vector],
    generator: Random,
    pending: Sequence[Vector] = (),
) -> Vector | None:
    """Return the feasible vector that should improve the front most; None if all were tried.

    Imported observations teach the model, but the front to improve is that of the search's own vectors. Those that are
    tried now count as if they turned out as expected, so that no other one is chosen for what they will tell.

    Args:
        observations: What is known; at least one that is not imported.
        spaces: What is feasible.
        beliefs: Of each ratio.
        exclude: Vectors not to propose.
        generator: Draws some of the starts.
        pending: Vectors that are tried now; excluded, too.
    """
    model = Model(observations, beliefs)
    if pending:
        model = model.expecting(pending)
    tested = [seen.vector for seen in observations if not seen.imported and seen.vector.ratio in spaces.at]
    tested += pending
    gain = acquisition(model, spaces, tested)
    tops = []
    for ratio, space in spaces.at.items():
        tried = {row.tobytes() for row in space.levels([vector.bits for vector in exclude if vector.ratio == ratio])}

        def value(levels: np.ndarray, ratio: float = ratio, tried: set[bytes] = tried) -> np.ndarray:
            return np.where([row.tobytes() in tried for row in levels], -1.0, gain(ratio, levels))

        here = [vector.bits for vector in tested if vector.ratio == ratio]
        starts = _starts(model, ratio, space, here, beliefs[ratio], generator)
        order = np.argsort(-gain(ratio, starts), kind="stable")
        tops += [(ratio, *climb(value, space, starts[index])) for index in order[:_STARTS]]
    ratio, best, height = max(tops, key=lambda top: top[2])
    return Vector(ratio, spaces.at[ratio].bits(best)) if height >= 0 else spaces.unseen(exclude, generator)


def _starts(
    model: Model, ratio: float, space: Space, tested: Sequence[Bits], belief: Belief, generator: Random
) -> np.ndarray:
    """Return where to climb from: greedy vectors of every size by model and by belief, the tried ones, random ones."""
    low: np.ndarray = np.zeros((1, space.units), dtype=int)
    alone = space.single_raises
    gains = model.at(ratio, space.hot(alone))[0] - model.at(ratio, space.hot(low))[0]
    starts = [low[0], *space.levels([space.draw(generator) for _ in range(8)])]
    if tested:
        levels = space.levels(tested)
        starts += list(levels[space.feasible(levels)])
    for importance in (gains.tolist(), np.ravel(belief.gains).tolist()):
        for weights in (importance, space.per_byte(importance)):
            current = low[0].copy()
            for step in np.argsort(-np.array(weights), kind="stable"):
                unit, level = step % space.units, step // space.units + 1
                raised = current.copy()
                raised[unit] = level
                if level > current[unit] and space.feasible(raised[None])[0]:
                    current = raised
                    starts.append(raised)
    return np.unique(np.array(starts), axis=0)
