"""Threads that compute side by side, a core each.

Small products that all cores share would wait for the slowest of them thousands of times.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def each() -> Iterator[ThreadPoolExecutor]:
    """Give as many threads as torch computes on, each of which computes alone."""
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(cores)  # threads that torch starts later take over what was set last
