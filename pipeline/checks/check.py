"""What a check is: the keys that it reads, and a function of their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

Judge = Callable[[SimpleNamespace], Iterator[str]]


@dataclass(frozen=True)
class Check:
    """One check of the params.

    Attributes:
        keys: What it reads, such as ``prune.ratios``, or ``prune`` for a whole section.
        judge: Takes an object that holds these keys and no others; yields a line for each fault, its key first.
    """

    keys: tuple[str, ...]
    judge: Judge


def reads(*keys: str) -> Callable[[Judge], Check]:
    """Make a check of a function that reads these keys."""
    return lambda judge: Check(keys, judge)
