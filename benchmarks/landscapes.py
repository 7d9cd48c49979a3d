"""Landscapes that samplers are replayed on: a quality that is known for every vector of every pruning ratio.

A quality is a level of the ratio, gains of the raised units that add up, and what pairs of them gain or lose together.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import KFold

from pipeline import GIB
from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.compress.priors import Priors
from pipeline.search import acquire, pareto
from pipeline.search.allocate import Space, Spaces

# Of SmolLM2's blocks that gain most: 1000 x the fall of the loss, in nats a token, from NF4 to int8.
GAINS = {29: 59.1, 11: 56.6, 0: 25.0, 16: 14.7, 15: 14.1, 28: 13.9, 2: 13.5, 7: 13.3, 4: 11.7, 23: 11.3, 13: 10.6}
# Ratio -> (log-probability of a response token, training peak in GiB) with 4 bits everywhere. The peaks and the first
# two levels were measured on SmolLM2; the other levels continue them.
LEVELS = {0.0: (-2.10, 0.993), 0.2: (-2.53, 0.858), 0.35: (-3.1, 0.771), 0.5: (-3.9, 0.680)}
UNTOUCHED = -2.01  # the same of the untouched model
ALONE = 0.2  # the ratio of a landscape that has one
_BUDGETS = 40  # that the best known front is looked for in, at each ratio


@dataclass(frozen=True)
class Landscape:
    """A quality that is known everywhere, and what a search is told of it.

    Attributes:
        spaces: What is feasible.
        levels: Ratio -> quality with the lowest bits everywhere.
        additive: Ratio -> gain of each (level, unit), [(levels - 1) units].
        pairs: Gain of each pair of these raised together, [steps, steps], upper triangle; the same at all ratios.
        noise: Standard deviation of a trial's quality around the true one.
        stderr: Standard error that a trial reports.
        priors: Ratio -> what stage ``importance`` measured.
        about: Where it comes from and how well it fits.
    """

    spaces: Spaces
    levels: Mapping[float, float]
    additive: Mapping[float, np.ndarray]
    pairs: np.ndarray
    noise: float
    stderr: float
    priors: Mapping[float, Priors]
    about: str

    def quality(self, ratio: float, levels: np.ndarray) -> np.ndarray:
        """Return the true qualities of vectors of a ratio, [vectors, units] of levels -> [vectors]."""
        hot = self.spaces.at[ratio].hot(levels)
        return self.levels[ratio] + hot @ self.additive[ratio] + ((hot @ self.pairs) * hot).sum(axis=1)

    def quality_of(self, vector: Vector) -> float:
        """Return the true quality of one vector."""
        return float(self.quality(vector.ratio, self.spaces.at[vector.ratio].levels([vector.bits]))[0])

    def hypervolume(self, tried: Sequence[Vector]) -> float:
        """Return the area that the true qualities of some vectors dominate.

        It counts as the search's own does: from the quality of the smallest model, to a tenth beyond the dearest one.
        """
        return self._volume((self.quality_of(vector), self.spaces.memory(vector)) for vector in tried)

    def _volume(self, points: Iterator[tuple[float, float]]) -> float:
        floor = self.quality_of(self.spaces.smallest())
        return pareto.hypervolume(points, floor, self.spaces.base + self.spaces.reach)

    def best(self) -> float:
        """Return the hypervolume of the best vectors known: of each ratio, those that climbing finds, and neighbours.

        It climbs in limits on the number of raised units and in limits on memory.
        """
        points: list[tuple[float, float]] = []
        for ratio, space in self.spaces.at.items():
            low: np.ndarray = np.zeros((1, space.units), dtype=int)
            for levels in (low, *(self._around(ratio, top) for top in self._tops(ratio))):
                points += zip(self.quality(ratio, levels).tolist(), space.memories(levels).tolist(), strict=True)
        return self._volume(iter(points))

    def _tops(self, ratio: float) -> Iterator[np.ndarray]:
        """Yield what climbing finds within limits, from the greedy allocation: the levels of a vector each time."""
        space, gains = self.spaces.at[ratio], self.additive[ratio][: self.spaces.units].tolist()
        widest = space.ceiling - space.base
        limited = [(replace(space, max_raised=size), gains) for size in range(1, space.max_raised + 1)]
        for part in range(1, _BUDGETS + 1):
            within = replace(space, budget=space.base + widest * part // _BUDGETS)
            limited.append((within, within.per_byte(gains)))
        for within, importance in limited:
            start = within.levels([within.allocate(importance)])[0]
            yield acquire.climb(lambda levels: self.quality(ratio, levels), within, start)[0]

    def _around(self, ratio: float, top: np.ndarray) -> np.ndarray:
        """Return the feasible vectors that swap a raised unit of one for another, and itself, [vectors, units]."""
        pairs = list(itertools.product(np.flatnonzero(top), np.flatnonzero(top == 0)))
        swaps = np.repeat(top[None], len(pairs) + 1, axis=0)
        for row, (down, up) in enumerate(pairs):
            swaps[row, [down, up]] = 0, top[down]
        return swaps[self.spaces.at[ratio].feasible(swaps)]

    def only(self, ratios: Sequence[float]) -> Landscape:
        """Return the landscape of some of its ratios."""
        spaces = Spaces({ratio: self.spaces.at[ratio] for ratio in sorted(ratios)}, {})
        return replace(
            self, spaces=spaces, about=f"{self.about}, at {', '.join(f'{one:g}' for one in spaces.at)} alone"
        )

    def within(self, max_8bit_fraction: float) -> Landscape:
        """Return the landscape with a limit on the share of raised units, as section ``search`` has it."""
        most = int(self.spaces.units * max_8bit_fraction + 1e-9)
        limited = {ratio: replace(space, max_raised=most) for ratio, space in self.spaces.at.items()}
        about = f"{self.about}, at most {most} of {self.spaces.units} units raised"
        return replace(self, spaces=Spaces(limited, {}), about=about)

    def told(self, kind: str, seed: int) -> dict[float, Priors]:
        """Return what a search is told before its first trial, at each ratio.

        Args:
            kind: ``good``: what was measured; ``none``: nothing; ``shuffled`` and ``reversed``: the figures of other
                units, and those of other ratios, with the ranks shuffled or turned round.
            seed: Of the shuffle.
        """
        true = {ratio: self.priors[ratio] for ratio in self.spaces.at}
        if kind == "good":
            return true
        distances = _misled(kind, [prior.distance for prior in true.values()], seed)
        return {
            ratio: replace(
                prior,
                sensitivity=tuple(_misled(kind, prior.sensitivity, seed)),
                dense_gains=tuple(_misled(kind, prior.dense_gains, seed)),
                distance=distance,
            )
            for (ratio, prior), distance in zip(true.items(), distances, strict=True)
        }


def _misled(kind: str, values: Sequence[float], seed: int) -> list[float]:
    """Return figures without what they say; a seed shuffles all of a length alike."""
    if kind == "none":
        return [0.0] * len(values)
    if kind == "reversed":
        ranks = np.argsort(np.argsort(values))
        return np.sort(values)[::-1][ranks].tolist()
    return random.Random(seed).sample(list(values), len(values))


def synthetic(noise: float, seed: int = 0, units: int = 30) -> Landscape:
    """Return a landscape of one ratio with the measured gains of SmolLM2's 30 blocks, or drawn alike."""
    generator = np.random.default_rng(seed)
    gains = generator.uniform(1, 9, units)
    named = GAINS if units == 30 else dict(enumerate(20 * generator.pareto(1.5, units // 3)))
    for unit, gain in named.items():
        gains[unit] = gain
    gains = gains / 1000
    # The seven best blocks gain 10 % less together than the sum of their gains alone.
    pairs = np.triu(np.sqrt(np.outer(gains, gains)) * generator.normal(-0.04, 0.1, (units, units)), 1)
    sensitivity = gains * generator.lognormal(0, 0.3, units) + generator.normal(0, 0.003, units)
    deltas = tuple(int(cost) for cost in generator.uniform(3.0, 4.0, units) * 2**20)
    return Landscape(
        spaces=Spaces({ALONE: Space(2**30, (deltas,), units // 4, None)}, {}),
        levels={ALONE: 0.0},
        additive={ALONE: gains},
        pairs=pairs,
        noise=noise,
        stderr=noise,
        priors={ALONE: _priors(sensitivity)},
        about=f"synthetic, {units} units, noise {noise}",
    )


def joint(noise: float, seed: int = 0, units: int = 30) -> Landscape:
    """Return a landscape of several ratios: the gains of ``synthetic``, at each ratio with deviations of its own.

    A unit's gain at a ratio is lognormal around that of the one-ratio landscape (0.3), and so is the measured distance
    of a ratio around the true one. Any number of units may be raised.
    """
    shared = synthetic(noise, seed, units)
    generator = np.random.default_rng((seed, units))
    costs = np.array(shared.spaces.at[ALONE].deltas[0])
    spaces, additive, priors = {}, {}, {}
    for ratio, (level, peak) in LEVELS.items():
        deltas = tuple(int(cost) for cost in costs * (1 - ratio))
        spaces[ratio] = Space(int(peak * GIB), (deltas,), units, None)
        additive[ratio] = shared.additive[ALONE] * generator.lognormal(0, 0.3, units)
        measured = additive[ratio] * generator.lognormal(0, 0.3, units) + generator.normal(0, 0.003, units)
        priors[ratio] = _priors(measured, (UNTOUCHED - level) * generator.lognormal(0, 0.3))
    return replace(
        shared,
        spaces=Spaces(spaces, {}),
        levels={ratio: level for ratio, (level, _) in LEVELS.items()},
        additive=additive,
        priors=priors,
        about=f"synthetic, {len(LEVELS)} ratios, {units} units, noise {noise}",
    )


def _priors(sensitivity: np.ndarray, distance: float = 0.0) -> Priors:
    """Return priors without mutual information, which no synthetic landscape has."""
    units = tuple(map(str, range(len(sensitivity))))
    known = tuple(sensitivity.tolist())
    return Priors(units, (0.0,) * len(units), known, known, 0.0, float(distance), 1)


def recorded(folder: Path, objective: str = "response_logprob", memory: str = "training") -> Landscape:
    """Fit levels, gains and interactions of pairs to the table of a folder (``record``) by ridge regression.

    The fit's held-out error, which holds both the table's noise and what the model misses, is the replay's noise.

    Args:
        folder: Where ``benchmarks.record`` left its table.
        objective: The quality: a column of the table.
        memory: The peak that counts: ``training`` or ``inference``.
    """
    table = pd.read_csv(folder / "table.csv", dtype={"bits": str})
    table = table[table["steps"] == table["steps"].min()]
    facts = json.loads((folder / "landscape.json").read_text())
    kept = {float(ratio): values for ratio, values in facts["ratios"].items() if float(ratio) in set(table["ratio"])}
    priors = {ratio: Priors.from_json(values["priors"]) for ratio, values in kept.items()}
    spaces = {}
    for ratio, values in sorted(kept.items()):
        deltas = tuple(tuple(costs) for costs in values[memory]["deltas"])
        spaces[ratio] = Space(values[memory]["base"], deltas, len(deltas[0]), None, widths=tuple(facts["widths"]))
    ratios, first = list(spaces), next(iter(spaces.values()))
    hot = first.hot(first.levels([bit_text.read(text) for text in table["bits"]]))
    at = np.array([ratios.index(ratio) for ratio in table["ratio"]])
    fit = Fit.of(hot, at, table[objective].to_numpy(float))
    errors = table.get(f"{objective}_stderr")
    return Landscape(
        spaces=Spaces(spaces, {}),
        levels={ratio: float(level) for ratio, level in zip(ratios, fit.levels, strict=True)},
        additive=dict(zip(ratios, fit.gains, strict=True)),
        pairs=fit.pairs,
        noise=fit.error,
        stderr=fit.error if errors is None else float(errors.mean()),
        priors=priors,
        about=f"{folder.name}, {objective}, {memory}: {len(table)} rows at {len(ratios)} ratios, "
        f"R^2 {fit.explained:.3f} within ratios on held-out rows, their error {fit.error:.4f}",
    )


@dataclass(frozen=True)
class Fit:
    """A smooth model of a table.

    Attributes:
        levels: Quality with nothing raised, [ratios].
        gains: Of each step, [ratios, steps].
        pairs: [steps, steps], upper triangle.
        error: Standard deviation of what it misses of held-out rows.
        explained: R^2 on held-out rows, of the variance within ratios.
    """

    levels: np.ndarray
    gains: np.ndarray
    pairs: np.ndarray
    error: float
    explained: float

    @staticmethod
    def of(hot: np.ndarray, at: np.ndarray, values: np.ndarray) -> Fit:
        """Fit by ridge regression in its dual form; how hard it shrinks is chosen by cross-validation.

        The kernel is that of one weight a ratio, hardly shrunk, one a step, one a step and ratio, and one a pair of
        steps: with d steps in common, two vectors have d (d - 1) / 2 pairs in common.

        Args:
            hot: Raised steps, [rows, steps].
            at: Index of the ratio, [rows].
            values: [rows].
        """
        same, common, mean = np.equal.outer(at, at).astype(float), hot @ hot.T, values.mean()
        folds = list(KFold(min(10, len(values)), shuffle=True, random_state=0).split(values))
        alone = len(np.unique(at)) == 1
        choices = []
        for own, pair in itertools.product((0.0,) if alone else (0.1, 0.3, 1.0), (1e-3, 0.1, 0.3, 1.0)):
            kernel = _LEVEL**2 * same + common * (1 + own**2 * same) + pair**2 * common * (common - 1) / 2
            for alpha, missed in _missed(kernel, values - mean, folds):
                choices.append((float((missed**2).mean()), own, pair, alpha, missed))
        _, own, pair, alpha, missed = min(choices, key=lambda choice: choice[0])
        kernel = _LEVEL**2 * same + common * (1 + own**2 * same) + pair**2 * common * (common - 1) / 2
        dual = np.linalg.solve(kernel + alpha * np.eye(len(values)), values - mean)
        of_ratio = np.equal.outer(np.arange(at.max() + 1), at) * dual  # [ratios, rows]
        within = values - np.array([values[at == ratio].mean() for ratio in at])
        return Fit(
            levels=mean + _LEVEL**2 * of_ratio.sum(axis=1),
            gains=dual @ hot + own**2 * of_ratio @ hot,
            pairs=np.triu(pair**2 * (hot.T * dual) @ hot, 1),
            error=float(missed.std()),
            explained=float(1 - missed.var() / within.var()),
        )


_LEVEL = 100.0  # a ratio's level is shrunk 10,000 times less than a gain


def _missed(
    kernel: np.ndarray, values: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (alpha, what a kernel ridge regression misses of each row when it was held out)."""
    alphas = np.logspace(-4, 2, 13)
    missed = np.empty((len(alphas), len(values)))
    for train, test in folds:
        roots, basis = np.linalg.eigh(kernel[np.ix_(train, train)])
        turned, across = basis.T @ values[train], kernel[np.ix_(test, train)] @ basis
        for row, alpha in enumerate(alphas):
            missed[row, test] = values[test] - across @ (turned / (roots + alpha))
    yield from zip(alphas.tolist(), missed, strict=True)
