"""From importance to bits under a budget (QPruner2), and the set of feasible vectors.

At one pruning ratio peak memory is linear in the bits: the peak of all units at 4 bits plus a cost for each unit at
each higher width. So are the share of units above 4 bits and the average bits of a parameter: every limit is a linear
one. In here a vector's bits are *levels*: 0 at the lowest width of the search, 1 at the next one, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import numpy as np

from pipeline import GIB
from pipeline.bits import Bits, Vector
from pipeline.search import SearchError


@dataclass(frozen=True)
class Space:
    """All bit vectors that a search may run at one pruning ratio.

    Attributes:
        base: Peak bytes with every unit at the lowest width.
        deltas: Bytes that each unit adds at each higher width, [levels - 1, units].
        max_raised: Most units above the lowest width.
        budget: Largest peak in bytes; None: any.
        sizes: Parameters of each unit; read where ``average_bits`` is given.
        average_bits: Largest mean of the bits over all parameters of the units; None: any.
        widths: Bits of the levels, ascending.
    """

    base: int
    deltas: tuple[tuple[int, ...], ...]
    max_raised: int
    budget: int | None
    sizes: tuple[int, ...] = ()
    average_bits: float | None = None
    widths: tuple[int, ...] = (4, 8)

    @staticmethod
    def of(
        predict: Callable[[Bits], int],
        units: int,
        max_8bit_fraction: float,
        budget: int | None,
        sizes: Sequence[int] = (),
        average_bits: float | None = None,
        widths: Sequence[int] = (4, 8),
    ) -> Space:
        """Measure the linear model of memory with one prediction for each unit and higher width.

        Raises:
            SearchError: Not even the lowest width everywhere meets the budget, or units above it are asked for and the
                limits together allow none.
        """
        low = (widths[0],) * units
        base = predict(low)
        deltas = tuple(
            tuple(predict(low[:unit] + (width,) + low[unit + 1 :]) - base for unit in range(units))
            for width in widths[1:]
        )
        if budget is not None and base > budget:
            raise SearchError(
                f"search.memory_budget_gib: every unit at {widths[0]} bits peaks at {base / GIB:.3f} GiB, more than "
                f"the budget of {budget / GIB:.3f}; raise it, prune more, or lower recover.micro_batch_size"
            )
        most = int(units * max_8bit_fraction + 1e-9)
        space = Space(base, deltas, most, budget, tuple(sizes), average_bits, tuple(widths))
        if max_8bit_fraction > 0 and len(widths) > 1 and not space.feasible(space.single_raises).any():
            raise SearchError(
                f"search.max_8bit_fraction is {max_8bit_fraction}, but not one of the {units} units may be raised to "
                f"{widths[1]} bits: {space._reason()}; loosen that, or set max_8bit_fraction to 0 for {widths[0]} bits "
                "everywhere"
            )
        return space

    def _reason(self) -> str:
        """Say which limits forbid to raise even one unit."""
        reasons, cheapest = [], min(self.deltas[0])
        if self.max_raised == 0:
            reasons.append("it is less than one unit")
        if self.budget is not None and self.base + cheapest > self.budget:
            reasons.append(
                f"search.memory_budget_gib leaves {(self.budget - self.base) / 2**20:.1f} MiB above {self.widths[0]} "
                f"bits and the cheapest unit takes {cheapest / 2**20:.1f}"
            )
        if self.average_bits is not None:
            step = self.widths[1] - self.widths[0]
            least = self.widths[0] + step * min(self.sizes) / sum(self.sizes)
            if least > self.average_bits:
                reasons.append(
                    f"search.average_bits is {self.average_bits} and the smallest unit alone makes {least:.3f}"
                )
        if not reasons:
            reasons.append("search.memory_budget_gib forbids those that search.average_bits would allow")
        return "; ".join(reasons)

    @property
    def units(self) -> int:
        """Return the number of units."""
        return len(self.deltas[0]) if self.deltas else 0

    @property
    def top(self) -> int:
        """Return the highest level."""
        return len(self.widths) - 1

    @cached_property
    def single_raises(self) -> np.ndarray:
        """Return the vectors with one unit at one higher level, [(levels - 1) units, units]."""
        one: np.ndarray = np.eye(self.units, dtype=int)
        return np.concatenate([level * one for level in range(1, self.top + 1)])

    def hot(self, levels: np.ndarray) -> np.ndarray:
        """Return vectors as indicators of (level, unit), [vectors, units] -> [vectors, (levels - 1) units]."""
        return np.concatenate([levels == level for level in range(1, self.top + 1)], axis=1).astype(float)

    @cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the limits as costs of (level, unit), [limits, (levels - 1) units], and what they may sum to."""
        costs: list[np.ndarray] = [np.ones(self.top * self.units)]
        most: list[float] = [self.max_raised]
        if self.budget is not None:
            costs.append(np.array(self.deltas).ravel())
            most.append(self.budget - self.base)
        if self.average_bits is not None:
            steps = np.array(self.widths[1:]) - self.widths[0]
            costs.append(np.outer(steps, self.sizes).ravel())
            most.append((self.average_bits - self.widths[0]) * sum(self.sizes) + 1e-6)
        return np.array(costs, dtype=float), np.array(most, dtype=float)

    def feasible(self, levels: np.ndarray) -> np.ndarray:
        """Return which of many vectors meet every limit, [vectors, units] -> [vectors] of booleans."""
        costs, most = self.limits
        return (self.hot(levels) @ costs.T <= most).all(axis=1)

    def memories(self, levels: np.ndarray) -> np.ndarray:
        """Return the peak bytes of many vectors, [vectors, units] -> [vectors]."""
        return self.base + self.hot(levels) @ np.array(self.deltas, dtype=float).ravel()

    def memory(self, bits: Sequence[int]) -> int:
        """Return the peak bytes of a bit vector."""
        return int(self.memories(self.levels([tuple(bits)]))[0])

    def average(self, bits: Sequence[int]) -> float:
        """Return the mean bits of a parameter; ``sizes`` must be known."""
        return sum(size * width for size, width in zip(self.sizes, bits, strict=True)) / sum(self.sizes)

    def levels(self, bits: Sequence[Bits]) -> np.ndarray:
        """Return bit vectors as levels, [vectors, units]."""
        return np.searchsorted(self.widths, np.array(bits))

    def bits(self, levels: np.ndarray) -> Bits:
        """Return the bit vector of levels, [units]."""
        return tuple(self.widths[level] for level in levels)

    @property
    def ceiling(self) -> int:
        """Return a bound on the peak bytes of any feasible vector: the dearest units, or the budget."""
        dearest = self.base + sum(sorted(np.max(self.deltas, axis=0).tolist(), reverse=True)[: self.max_raised])
        return dearest if self.budget is None else min(dearest, self.budget)

    def __contains__(self, bits: Sequence[int]) -> bool:
        """Return whether a bit vector is feasible."""
        return set(bits) <= set(self.widths) and bool(self.feasible(self.levels([tuple(bits)]))[0])

    def allocate(self, importance: Sequence[float], level: int = 1) -> Bits:
        """Return the feasible vector that raises units in order of importance, highest first (paper section 3.2).

        Args:
            importance: Of each unit.
            level: To which they are raised.
        """
        bits = [self.widths[0]] * self.units
        for unit in sorted(range(self.units), key=lambda index: -importance[index]):
            bits[unit] = self.widths[level]
            if bits not in self:
                bits[unit] = self.widths[0]
        return tuple(bits)

    def per_byte(self, gains: Sequence[float]) -> list[float]:
        """Return the gain of each (level, unit) for a byte that it costs, [(levels - 1) units]; or of level 1 alone."""
        costs = np.array(self.deltas).ravel()[: len(gains)]
        return [value / max(cost, 1) for value, cost in zip(gains, costs.tolist(), strict=True)]

    def repair(self, bits: Sequence[int], importance: Sequence[float]) -> Bits:
        """Return the nearest feasible vector: the least important of the raised units go back to the lowest width."""
        fixed = list(bits)
        raised = (unit for unit, width in enumerate(bits) if width != self.widths[0])
        for unit in sorted(raised, key=lambda index: importance[index]):
            if fixed in self:
                break
            fixed[unit] = self.widths[0]
        return tuple(fixed)

    def draw(self, generator: Random) -> Bits:
        """Return a feasible vector: a random number of units, 1 to the most allowed, at random places and widths."""
        order = list(range(self.units))
        generator.shuffle(order)
        chosen = set(order[: generator.randint(1, self.max_raised)]) if self.max_raised else set()
        bits = tuple(
            generator.choice(self.widths[1:]) if unit in chosen else self.widths[0] for unit in range(self.units)
        )
        return self.repair(bits, [generator.random() for _ in bits])

    def unseen(self, seen: set[Bits], generator: Random, near: Bits | None = None) -> Bits | None:
        """Return a feasible vector that was not tried: a neighbour of ``near`` if there is one, else a random one.

        None if a thousand draws find none: the space is as good as exhausted.
        """
        for candidate in self._candidates(generator, near):
            if candidate not in seen:
                return candidate
        return None

    def _candidates(self, generator: Random, near: Bits | None) -> Iterator[Bits]:
        if near is not None:
            yield near
            flips = [
                near[:unit] + (width,) + near[unit + 1 :]
                for unit in range(self.units)
                for width in self.widths
                if width != near[unit]
            ]
            generator.shuffle(flips)
            yield from (flip for flip in flips if flip in self)
        for _ in range(1000):
            yield self.draw(generator)


@dataclass(frozen=True)
class Spaces:
    """What a search may run: at each pruning ratio the feasible bit vectors, all of as many units.

    Attributes:
        at: Ratio -> its vectors, ascending.
        too_large: Ratios whose smallest model exceeds the budget, with its peak bytes.
    """

    at: Mapping[float, Space]
    too_large: Mapping[float, int]

    @staticmethod
    def within(spaces: Mapping[float, Space], budget: int | None) -> Spaces:
        """Return those ratios whose smallest model meets a budget, each with its vectors that meet it.

        Args:
            spaces: Ratio -> its vectors, without a budget.
            budget: Largest peak in bytes; None: any.

        Raises:
            SearchError: No ratio fits.
        """
        if budget is None:
            return Spaces(dict(sorted(spaces.items())), {})
        at = {ratio: replace(space, budget=budget) for ratio, space in sorted(spaces.items()) if space.base <= budget}
        too_large = {ratio: space.base for ratio, space in spaces.items() if ratio not in at}
        if not at:
            ratio, least = min(too_large.items(), key=lambda pair: pair[1])
            raise SearchError(
                f"search.memory_budget_gib: the smallest model, {ratio:g} pruned and the lowest bits everywhere, peaks "
                f"at {least / GIB:.3f} GiB, more than the budget of {budget / GIB:.3f}; raise it, add a higher ratio "
                "to prune.ratios, or lower recover.micro_batch_size"
            )
        return Spaces(at, too_large)

    @property
    def ratios(self) -> list[float]:
        """Return the ratios that fit, ascending."""
        return list(self.at)

    @property
    def units(self) -> int:
        """Return the number of units."""
        return next(iter(self.at.values())).units

    @property
    def base(self) -> int:
        """Return the peak bytes of the smallest model."""
        return min(space.base for space in self.at.values())

    @property
    def reach(self) -> float:
        """Return the bytes above the base in which a front's gains count.

        A tenth beyond the dearest vector, so that its quality counts, too.
        """
        return 1.1 * (max(space.ceiling for space in self.at.values()) - self.base)

    def smallest(self) -> Vector:
        """Return the vector that needs least memory."""
        ratio, space = min(self.at.items(), key=lambda pair: pair[1].base)
        return Vector(ratio, (space.widths[0],) * space.units)

    def memory(self, vector: Vector) -> int:
        """Return the peak bytes of a vector."""
        return self.at[vector.ratio].memory(vector.bits)

    def __contains__(self, vector: Vector) -> bool:
        """Return whether a vector is feasible."""
        return vector.ratio in self.at and vector.bits in self.at[vector.ratio]

    def draw(self, generator: Random) -> Vector:
        """Return a feasible vector of a random ratio."""
        ratio = generator.choice(self.ratios)
        return Vector(ratio, self.at[ratio].draw(generator))

    def unseen(self, seen: set[Vector], generator: Random) -> Vector | None:
        """Return a random feasible vector that was not tried, None if none is found."""
        ratios = self.ratios
        generator.shuffle(ratios)
        for ratio in ratios:
            bits = self.at[ratio].unseen({vector.bits for vector in seen if vector.ratio == ratio}, generator)
            if bits is not None:
                return Vector(ratio, bits)
        return None
