"""From importance to bits under a budget (QPruner2), and the set of feasible bit vectors.

Peak memory is linear in the bits: the peak of all units at 4 bits plus a cost for each unit raised to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

Bits = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """All bit vectors that a search may run.

    Attributes:
        base: Peak bytes with every unit at 4 bits.
        deltas: Bytes that each unit adds at 8 bits.
        max_eights: Most units at 8 bits.
        budget: Largest peak in bytes; None: any.
    """

    base: int
    deltas: tuple[int, ...]
    max_eights: int
    budget: int | None

    @staticmethod
    def of(predict: Callable[[Bits], int], units: int, max_8bit_fraction: float, budget: int | None) -> Space:
        """Measure the linear model of memory with one prediction a unit.

        Raises:
            ValueError: Not even 4 bits everywhere meets the budget.
        """
        low = (4,) * units
        base = predict(low)
        deltas = tuple(predict(low[:i] + (8,) + low[i + 1 :]) - base for i in range(units))
        if budget is not None and base > budget:
            raise ValueError(
                f"search.memory_budget_gib: every unit at 4 bits peaks at {base / 2**30:.3f} GiB, more than the "
                f"budget of {budget / 2**30:.3f}; raise it, prune more, or lower recover.micro_batch_size"
            )
        return Space(base, deltas, int(units * max_8bit_fraction + 1e-9), budget)

    @property
    def units(self) -> int:
        """Return the number of units."""
        return len(self.deltas)

    def memory(self, bits: Sequence[int]) -> int:
        """Return the peak bytes of a bit vector."""
        return self.base + sum(delta for delta, width in zip(self.deltas, bits, strict=True) if width == 8)

    def __contains__(self, bits: Sequence[int]) -> bool:
        """Return whether a bit vector is feasible."""
        within = self.budget is None or self.memory(bits) <= self.budget
        return sum(width == 8 for width in bits) <= self.max_eights and within

    def allocate(self, importance: Sequence[float]) -> Bits:
        """Return the feasible vector that raises units in order of importance, highest first (paper section 3.2)."""
        bits = [4] * self.units
        for unit in sorted(range(self.units), key=lambda index: -importance[index]):
            bits[unit] = 8
            if bits not in self:
                bits[unit] = 4
        return tuple(bits)

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
