"""From importance to bits under a budget (QPruner2), and the set of feasible bit vectors.

Peak memory is linear in the bits: the peak of all units at 4 bits plus a cost for each unit raised to 8. So are the
share of units at 8 bits and the average bits of a parameter: every limit is a linear one on the set of raised units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np

from pipeline.search import SearchError

Bits = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """All bit vectors that a search may run.

    Attributes:
        base: Peak bytes with every unit at 4 bits.
        deltas: Bytes that each unit adds at 8 bits.
        max_eights: Most units at 8 bits.
        budget: Largest peak in bytes; None: any.
        sizes: Parameters of each unit; read where ``average_bits`` is given.
        average_bits: Largest mean of the bits over all parameters of the units; None: any.
    """

    base: int
    deltas: tuple[int, ...]
    max_eights: int
    budget: int | None
    sizes: tuple[int, ...] = ()
    average_bits: float | None = None

    @staticmethod
    def of(
        predict: Callable[[Bits], int],
        units: int,
        max_8bit_fraction: float,
        budget: int | None,
        sizes: Sequence[int] = (),
        average_bits: float | None = None,
    ) -> Space:
        """Measure the linear model of memory with one prediction a unit.

        Raises:
            SearchError: Not even 4 bits everywhere meets the budget, or 8-bit units are asked for and the limits
                together allow none.
        """
        low = (4,) * units
        base = predict(low)
        deltas = tuple(predict(low[:i] + (8,) + low[i + 1 :]) - base for i in range(units))
        if budget is not None and base > budget:
            raise SearchError(
                f"search.memory_budget_gib: every unit at 4 bits peaks at {base / 2**30:.3f} GiB, more than the "
                f"budget of {budget / 2**30:.3f}; raise it, prune more, or lower recover.micro_batch_size"
            )
        max_eights = int(units * max_8bit_fraction + 1e-9)
        space = Space(base, deltas, max_eights, budget, tuple(sizes), average_bits)
        if max_8bit_fraction > 0 and not space.feasible(np.eye(units, dtype=bool)).any():
            raise SearchError(
                f"search.max_8bit_fraction is {max_8bit_fraction}, but not one of the {units} units may be raised to "
                f"8 bits: {space._reason()}; loosen that, or set max_8bit_fraction to 0 for 4 bits everywhere"
            )
        return space

    def _reason(self) -> str:
        """Say which limits forbid to raise even one unit."""
        reasons = []
        if self.max_eights == 0:
            reasons.append("it is less than one unit")
        if self.budget is not None and self.base + min(self.deltas) > self.budget:
            reasons.append(
                f"search.memory_budget_gib leaves {(self.budget - self.base) / 2**20:.1f} MiB above 4 bits and the "
                f"cheapest unit takes {min(self.deltas) / 2**20:.1f}"
            )
        if self.average_bits is not None and (least := 4 + 4 * min(self.sizes) / sum(self.sizes)) > self.average_bits:
            reasons.append(f"search.average_bits is {self.average_bits} and the smallest unit alone makes {least:.3f}")
        if not reasons:
            reasons.append("search.memory_budget_gib forbids those that search.average_bits would allow")
        return "; ".join(reasons)

    @property
    def units(self) -> int:
        """Return the number of units."""
        return len(self.deltas)

    @cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the limits as costs of raising each unit, [limits, units], and what they may sum to, [limits]."""
        costs: list[Sequence[int]] = [(1,) * self.units]
        most: list[float] = [self.max_eights]
        if self.budget is not None:
            costs.append(self.deltas)
            most.append(self.budget - self.base)
        if self.average_bits is not None:
            costs.append(self.sizes)
            most.append((self.average_bits - 4) / 4 * sum(self.sizes) + 1e-6)  # 4 + 4 sum(raised) / sum(all) <= average
        return np.array(costs, dtype=float), np.array(most, dtype=float)

    def feasible(self, raised: np.ndarray) -> np.ndarray:
        """Return which of many vectors meet every limit.

        Args:
            raised: [vectors, units], True at 8 bits.

        Returns:
            [vectors] of booleans.
        """
        costs, most = self.limits
        return (raised.astype(float) @ costs.T <= most).all(axis=1)

    def memories(self, raised: np.ndarray) -> np.ndarray:
        """Return the peak bytes of many vectors, [vectors, units] -> [vectors]."""
        return self.base + raised.astype(float) @ np.array(self.deltas, dtype=float)

    def memory(self, bits: Sequence[int]) -> int:
        """Return the peak bytes of a bit vector."""
        return self.base + sum(delta for delta, width in zip(self.deltas, bits, strict=True) if width == 8)

    def average(self, bits: Sequence[int]) -> float:
        """Return the mean bits of a parameter; ``sizes`` must be known."""
        return sum(size * width for size, width in zip(self.sizes, bits, strict=True)) / sum(self.sizes)

    @property
    def ceiling(self) -> int:
        """Return a bound on the peak bytes of any feasible vector: the dearest units, or the budget."""
        dearest = self.base + sum(sorted(self.deltas, reverse=True)[: self.max_eights])
        return dearest if self.budget is None else min(dearest, self.budget)

    @property
    def reach(self) -> float:
        """Return the bytes above the base in which a front's gains count.

        A tenth beyond the dearest vector, so that its quality counts, too.
        """
        return 1.1 * (self.ceiling - self.base)

    def __contains__(self, bits: Sequence[int]) -> bool:
        """Return whether a bit vector is feasible."""
        return bool(self.feasible(np.array([bits]) == 8)[0])

    def allocate(self, importance: Sequence[float]) -> Bits:
        """Return the feasible vector that raises units in order of importance, highest first (paper section 3.2)."""
        bits = [4] * self.units
        for unit in sorted(range(self.units), key=lambda index: -importance[index]):
            bits[unit] = 8
            if bits not in self:
                bits[unit] = 4
        return tuple(bits)

    def per_byte(self, importance: Sequence[float]) -> list[float]:
        """Return each unit's importance for a byte that it costs at 8 bits."""
        return [value / max(delta, 1) for value, delta in zip(importance, self.deltas, strict=True)]

    def repair(self, bits: Sequence[int], importance: Sequence[float]) -> Bits:
        """Return the nearest feasible vector: the least important of the raised units go back to 4 bits."""
        fixed = list(bits)
        for unit in sorted((i for i, width in enumerate(bits) if width == 8), key=lambda index: importance[index]):
            if fixed in self:
                break
            fixed[unit] = 4
        return tuple(fixed)

    def draw(self, generator: Random) -> Bits:
        """Return a feasible vector: a random number of units, 1 to the most allowed, at random places."""
        order = list(range(self.units))
        generator.shuffle(order)
        chosen = set(order[: generator.randint(1, self.max_eights)]) if self.max_eights else set()
        bits = tuple(8 if index in chosen else 4 for index in range(self.units))
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
            flips = [near[:i] + (12 - near[i],) + near[i + 1 :] for i in range(self.units)]
            generator.shuffle(flips)
            yield from (flip for flip in flips if flip in self)
        for _ in range(1000):
            yield self.draw(generator)


def raised_of(bits: Sequence[Bits]) -> np.ndarray:
    """Return bit vectors as booleans, True at 8 bits, [vectors, units]."""
    return np.array(bits) == 8


def bits_of(raised: Sequence[bool] | np.ndarray) -> Bits:
    """Return the bit vector of raised units."""
    return tuple(8 if up else 4 for up in raised)
