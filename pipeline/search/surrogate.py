"""What the search believes of vectors not tried yet, and which of them it tries next (paper algorithm 1).

Peak memory is known exactly, so only quality needs a model. Raising units from 4 to 8 bits adds up nearly, thus

    quality(z) = level + b . (s . z) + c . |z| + sum_i w_i z_i + sum_i v_i s_i z_i + pairs(z) + noise,

with z the raised units, s their sensitivities, and independent normal priors on b, c, w, v and the
products of pairs: a Gaussian process with a linear kernel a term. How much each term matters is learnt, so scores that
mislead cost little. The noise has the observations' own standard errors, times a learnt factor below one: trials answer
the same items, and what the items have in common moves all of them alike.

The next vector maximizes the expected improvement of the front's hypervolume, over feasible vectors only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel

from pipeline.search.allocate import Bits, Space, bits_of, raised_of

_SHORTLIST = 24  # units to raise, and to lower, that swaps are made of
_STARTS = 6


@dataclass(frozen=True)
class Observation:
    """The measured quality of one bit vector.

    Attributes:
        bits: The vector.
        score: The objective; higher is better.
        stderr: Its standard error.
        imported: Whether it comes from another search, whose level may differ.
    """

    bits: Bits
    score: float
    stderr: float
    imported: bool = False


class Linear(Kernel):
    """k(x, y) = sum of x_j y_j over some columns: a linear function with independent normal weights."""

    def __init__(self, columns: tuple[int, int]):
        self.columns = columns

    def __call__(
        self, X: np.ndarray, Y: np.ndarray | None = None, eval_gradient: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the kernel matrix, with an empty gradient: nothing here is learnt."""
        matrix = self._matrix(X, Y)
        return (matrix, np.empty((*matrix.shape, 0))) if eval_gradient else matrix

    def _matrix(self, X: np.ndarray, Y: np.ndarray | None) -> np.ndarray:
        left = X[:, slice(*self.columns)]
        return left @ (left if Y is None else Y[:, slice(*self.columns)]).T

    def diag(self, X: np.ndarray) -> np.ndarray:
        """Return the diagonal of the kernel matrix."""
        return (X[:, slice(*self.columns)] ** 2).sum(axis=1)

    def is_stationary(self) -> bool:
        """Return False."""
        return False


class KnownNoise(Linear):
    """Independent noise whose standard deviation stands in a column: none is shared, even between equal vectors."""

    def _matrix(self, X: np.ndarray, Y: np.ndarray | None) -> np.ndarray:
        return np.diag(self.diag(X)) if Y is None else np.zeros((len(X), len(Y)))


class Model:
    """A Gaussian process over bit vectors.

    Args:
        observations: At least one.
        prior: Score of each unit, higher means more quality at 8 bits; zeros: nothing is known.
    """

    def __init__(self, observations: Sequence[Observation], prior: Sequence[float]):
        scores = np.maximum(np.array(prior, dtype=float), 0)
        self._units = len(scores)
        self._prior = scores / max(np.sqrt((scores**2).mean()), 1e-12)
        values = np.array([seen.score for seen in observations])
        errors = np.array([seen.stderr for seen in observations])
        self._level = values.mean()
        self._scale = max(values.std(), errors.mean(), 1e-9)
        raised = raised_of([seen.bits for seen in observations])
        inputs = self._inputs(raised, errors / self._scale, np.array([seen.imported for seen in observations]))
        self._process = GaussianProcessRegressor(self._kernel(), alpha=1e-8, optimizer=_most_plausible)
        with warnings.catch_warnings():  # a term that does not matter ends at its bound
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._process.fit(inputs, (values - self._level) / self._scale)

    def _inputs(
        self, raised: np.ndarray, errors: np.ndarray | float = 0.0, imported: np.ndarray | bool = False
    ) -> np.ndarray:
        """Return the columns that the kernel's terms read, [vectors, 2 units + 5]."""
        ups: np.ndarray = raised.astype(float)
        columns = np.empty((len(ups), 2 * self._units + 5))
        columns[:, 0] = 1
        columns[:, 1] = imported
        columns[:, 2] = ups @ self._prior / self._units**0.5
        columns[:, 3] = ups.sum(axis=1) / self._units**0.5
        columns[:, 4] = errors
        columns[:, 5 : 5 + self._units] = ups
        columns[:, 5 + self._units :] = ups * self._prior
        return columns

    def _kernel(self) -> Kernel:
        each, weighted = (5, 5 + self._units), (5 + self._units, 5 + 2 * self._units)
        wide = (1e-6, 1e4)
        return (
            ConstantKernel(10.0, "fixed") * Linear((0, 2))
            + ConstantKernel(1.0, wide) * Linear((2, 3))
            + ConstantKernel(0.3, wide) * Linear((3, 4))
            + ConstantKernel(0.05, wide) * Linear(each)
            + ConstantKernel(0.05, wide) * Linear(weighted)
            + ConstantKernel(1e-3, wide) * Linear(each) ** 2
            + ConstantKernel(0.3, (1e-4, 1.0)) * KnownNoise((4, 5))
        )

    def predict(self, raised: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the quality itself, without noise.

        Args:
            raised: [vectors, units], True at 8 bits.

        Returns:
            Two arrays [vectors].
        """
        mean, deviation = self._process.predict(self._inputs(raised), return_std=True)
        return mean * self._scale + self._level, deviation * self._scale


def _most_plausible(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, bounds: np.ndarray
) -> tuple[np.ndarray, float]:
    """Minimize the negative log marginal likelihood plus a weak normal prior around the start, a factor e^4 wide.

    Without the prior, the first few trials would settle the scale of every term.
    """

    def penalized(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = loss(theta)
        return value + ((theta - start) ** 2).sum() / 32, slope + (theta - start) / 16

    lowest = minimize(penalized, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return lowest.x, float(lowest.fun)


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
    """Raise, lower or swap one unit at a time while that improves the value; return the last vector and its value.

    Args:
        value: [vectors, units] -> [vectors].
        space: What is feasible.
        start: A feasible vector, [units], True at 8 bits.
    """
    current, best = start, float(value(start[None])[0])
    while True:
        flips = current ^ np.eye(space.units, dtype=bool)
        worth = value(flips)
        ups, downs = (  # most promising first
            np.array(sorted(np.flatnonzero(group), key=lambda unit: -worth[unit])[:_SHORTLIST], dtype=int)
            for group in (~current, current)
        )
        swaps = np.repeat(current[None], len(ups) * len(downs), axis=0)
        rows = np.arange(len(swaps))
        swaps[rows, np.repeat(ups, len(downs))] = True
        swaps[rows, np.tile(downs, len(ups))] = False
        near = np.concatenate([flips, swaps])
        near = near[space.feasible(near)]
        worth = value(near) if len(near) else np.array([-np.inf])
        if worth.max() <= best:
            return current, best
        current, best = near[worth.argmax()], float(worth.max())


def acquisition(model: Model, space: Space, tried: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the expected hypervolume improvement as a function of vectors, [vectors, units] -> [vectors].

    The front to improve is that of the model's means at the tried vectors: a lucky observation makes no front.
    """
    front = Front.of(space.memories(tried), model.predict(tried)[0], space.base + space.reach + 1)
    return lambda raised: improvement(*model.predict(raised), space.memories(raised), front)


def propose(
    observations: Sequence[Observation], space: Space, prior: Sequence[float], exclude: set[Bits], generator: Random
) -> Bits | None:
    """Return the feasible vector that should improve the front most; None if all were tried.

    Imported observations teach the model, but the front to improve is that of the search's own vectors.

    Args:
        observations: What is known; at least one that is not imported.
        space: What is feasible.
        prior: Score of each unit.
        exclude: Vectors not to propose.
        generator: Draws some of the starts.
    """
    model = Model(observations, prior)
    tested = raised_of([seen.bits for seen in observations if not seen.imported])
    gain = acquisition(model, space, tested)
    tried = {row.tobytes() for row in raised_of(sorted(exclude))} if exclude else set()

    def value(raised: np.ndarray) -> np.ndarray:
        return np.where([row.tobytes() in tried for row in raised], -1.0, gain(raised))

    starts = _starts(model, space, tested, prior, generator)
    order = np.argsort(-gain(starts), kind="stable")
    tops = [climb(value, space, starts[index]) for index in order[:_STARTS]]
    best, height = max(tops, key=lambda top: top[1])
    return bits_of(best) if height >= 0 else space.unseen(exclude, generator)


def _starts(model: Model, space: Space, tested: np.ndarray, prior: Sequence[float], generator: Random) -> np.ndarray:
    """Return where to climb from: greedy vectors of every size by model and by prior, the tried ones, random ones."""
    alone: np.ndarray = np.eye(space.units, dtype=bool)
    gains = model.predict(alone)[0] - model.predict(np.zeros((1, space.units), dtype=bool))[0]
    starts = [*tested[space.feasible(tested)], *(raised_of([space.draw(generator)])[0] for _ in range(8))]
    for importance in (gains.tolist(), prior):
        for weights in (importance, space.per_byte(importance)):
            raised: np.ndarray = np.zeros(space.units, dtype=bool)
            for unit in np.argsort(-np.array(weights), kind="stable"):
                raised[unit] = True
                if space.feasible(raised[None])[0]:
                    starts.append(raised.copy())
                else:
                    raised[unit] = False
    return np.unique(np.array(starts), axis=0)
