"""Threads that compute side by side, each on cores of its own.

Small products that all cores share would wait for the slowest of them thousands of times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def each() -> Iterator[ThreadPoolExecutor]:
    """Give as many threads as torch computes on, each of which computes alone."""
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(cores)  # threads that torch starts later take over what was set last


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield items; a thread computes the next one meanwhile, on half of the cores.

    Worth it where the items are large products and what is done with them many small steps of Python: two threads of
    small steps would wait for each other.
    """
    cores, end, source = torch.get_num_threads(), object(), iter(items)
    if cores == 1:
        yield from source
        return
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores // 2,)) as thread:
        try:
            torch.set_num_threads(cores - cores // 2)
            following = thread.submit(next, source, end)
            while (item := following.result()) is not end:
                following = thread.submit(next, source, end)
                yield item  # type: ignore[misc]
        finally:
            torch.set_num_threads(cores)
