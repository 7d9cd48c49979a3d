"""What the search believes of vectors not tried yet (paper algorithm 1).

Peak memory is known exactly, so only quality needs a model. Raising units adds up nearly, and the same units matter at
every pruning ratio, thus

    quality(r, z) = level + d . e_r + l_r + (b + b_r) . (s_r . z) + c . |z|
                    + sum_i (w_i + w_ri) z_i + sum_i v_i s_ri z_i + pairs(z) + noise,

with z the raised (unit, width)s, e_r and s_r what was measured before any trial at ratio r (the quality with the lowest
bits everywhere, and the gain of each z), and independent normal priors on d, l, b, c, w, v and the products of pairs: a
Gaussian process with a linear kernel a term. So trials at one ratio teach the gains at others. How much each term
matters is learnt, so scores that mislead cost little. The noise has the observations' own standard errors, times a
learnt factor below one: trials answer the same items, and what the items have in common moves all of them alike.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel

from pipeline.bits import Bits, Vector


@dataclass(frozen=True)
class Observation:
    """The measured quality of one vector.

    Attributes:
        vector: Its ratio and its bits.
        score: The objective; higher is better.
        stderr: Its standard error.
        imported: Whether it comes from another search, whose level may differ.
    """

    vector: Vector
    score: float
    stderr: float
    imported: bool = False


@dataclass(frozen=True)
class Belief:
    """What is known of a pruning ratio before any trial.

    Attributes:
        quality: Expected with the lowest bits everywhere, in nats a token; only differences between ratios count.
        gains: Of each unit at each width above the lowest, [widths, units]; higher means more quality; zeros: unknown.
        widths: The bits that the gains are of, ascending.
    """

    quality: float
    gains: tuple[tuple[float, ...], ...]
    widths: tuple[int, ...] = (8,)


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
    """A Gaussian process over vectors.

    Args:
        observations: At least one.
        beliefs: Of each ratio that is searched or was observed.
    """

    def __init__(self, observations: Sequence[Observation], beliefs: Mapping[float, Belief]):
        self._ratios = sorted(beliefs)
        gains = np.maximum([np.ravel(beliefs[ratio].gains) for ratio in self._ratios], 0)  # [ratios, steps]
        self._gains = gains / max(np.sqrt((gains**2).mean()), 1e-12)
        expected = np.array([beliefs[ratio].quality for ratio in self._ratios])
        self._expected = (expected - expected.mean()) / max(expected.std(), 1e-12)
        first = next(iter(beliefs.values()))
        self._widths, self._units = first.widths, len(first.gains[0])
        values = np.array([seen.score for seen in observations])
        errors = np.array([seen.stderr for seen in observations])
        at = np.array([self._ratios.index(seen.vector.ratio) for seen in observations])
        self._error = errors.mean()
        self._level = values.mean()
        self._scale = max(_spread_within(values, at), errors.mean(), 1e-9)
        hot = np.array([self._hot(seen.vector.bits) for seen in observations])
        imported = np.array([seen.imported for seen in observations])
        inputs = self._inputs(at, hot, errors / self._scale, imported)
        apart = max(values.std() / self._scale, 1.0) ** 2  # ratios differ by more than bits do
        self._process = GaussianProcessRegressor(self._kernel(apart), alpha=1e-8, optimizer=_most_plausible)
        with warnings.catch_warnings():  # a term that does not matter ends at its bound
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._process.fit(inputs, (values - self._level) / self._scale)

    def expecting(self, pending: Sequence[Vector]) -> Model:
        """Return what the model would be if some vectors turned out as it expects, with the noise of a mean trial.

        Conditioning on the mean leaves all means as they are, and makes what is near to those vectors less uncertain.
        What the terms weigh is not learnt again: what was not measured says nothing about it.
        """
        at = np.array([self._ratios.index(vector.ratio) for vector in pending])
        hot = np.array([self._hot(vector.bits) for vector in pending])
        inputs = self._inputs(at, hot, self._error / self._scale)
        process = GaussianProcessRegressor(self._process.kernel_, alpha=1e-8, optimizer=None)
        means = self._process.predict(inputs)
        process.fit(np.vstack([self._process.X_train_, inputs]), np.concatenate([self._process.y_train_, means]))
        expecting = copy.copy(self)
        expecting._process = process
        return expecting

    def _hot(self, bits: Bits) -> np.ndarray:
        """Return a bit vector as indicators of (width, unit)."""
        return np.concatenate([np.array(bits) == width for width in self._widths]).astype(float)

    def _inputs(
        self, at: np.ndarray, hot: np.ndarray, errors: np.ndarray | float = 0.0, imported: np.ndarray | bool = False
    ) -> np.ndarray:
        """Return the columns that the kernel's terms read, [vectors, 6 + ratios + 2 steps].

        Args:
            at: Index of each vector's ratio, [vectors].
            hot: Raised (width, unit)s, [vectors, steps].
            errors: Standard errors, [vectors].
            imported: Whether the vectors come from another search, [vectors].
        """
        root, ratios, steps = self._units**0.5, len(self._ratios), hot.shape[1]
        columns = np.zeros((len(hot), 6 + ratios + 2 * steps))
        weighted = hot * self._gains[at]
        columns[:, 0] = 1
        columns[:, 1] = imported
        columns[:, 2] = weighted.sum(axis=1) / root
        columns[:, 3] = hot.sum(axis=1) / root
        columns[:, 4] = errors
        columns[:, 5] = self._expected[at]
        columns[np.arange(len(hot)), 6 + at] = 1
        columns[:, 6 + ratios : 6 + ratios + steps] = hot
        columns[:, 6 + ratios + steps :] = weighted
        return columns

    def _kernel(self, apart: float) -> Kernel:
        """Return the sum of the terms.

        Args:
            apart: Variance of the qualities of all vectors, of that within a ratio.
        """
        ratios, steps = len(self._ratios), len(self._widths) * self._units
        own, each = (6, 6 + ratios), (6 + ratios, 6 + ratios + steps)
        weighted = (each[1], each[1] + steps)
        wide = (1e-6, 1e4)
        kernel = (
            ConstantKernel(10.0 * apart, "fixed") * Linear((0, 2))
            + ConstantKernel(1.0, wide) * Linear((2, 3))
            + ConstantKernel(0.3, wide) * Linear((3, 4))
            + ConstantKernel(0.05, wide) * Linear(each)
            + ConstantKernel(0.05, wide) * Linear(weighted)
            + ConstantKernel(1e-3, wide) * Linear(each) ** 2
            + ConstantKernel(0.3, (1e-4, 1.0)) * KnownNoise((4, 5))
        )
        if ratios == 1:
            return kernel
        return (
            kernel
            + ConstantKernel(apart, (1e-6, 1e6)) * Linear((5, 6))
            + ConstantKernel(0.1 * apart, (1e-6, 1e6)) * Linear(own)
            + ConstantKernel(0.1, wide) * Linear(own) * Linear((2, 3))
            + ConstantKernel(0.01, wide) * Linear(own) * Linear(each)
        )

    def predict(self, vectors: Sequence[Vector]) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the vectors' qualities themselves, without noise; two arrays."""
        at = np.array([self._ratios.index(vector.ratio) for vector in vectors])
        return self._of(at, np.array([self._hot(vector.bits) for vector in vectors]))

    def at(self, ratio: float, hot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``predict`` does for vectors of one ratio.

        Args:
            ratio: The ratio.
            hot: Raised (width, unit)s, [vectors, steps].
        """
        return self._of(np.full(len(hot), self._ratios.index(ratio)), hot)

    def _of(self, at: np.ndarray, hot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = self._process.predict(self._inputs(at, hot), return_std=True)
        return mean * self._scale + self._level, deviation * self._scale


def _spread_within(values: np.ndarray, at: np.ndarray) -> float:
    """Return the standard deviation of the values of a ratio around their mean, over all ratios."""
    rest = np.concatenate([values[at == ratio] - values[at == ratio].mean() for ratio in np.unique(at)])
    return float(np.sqrt((rest**2).mean()))


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
