"""How a process of this project is set up. Entry points call ``prepare`` first; importing the package changes nothing.

It imports nothing heavy, as some of it must be set before torch is imported.
"""

from __future__ import annotations

import atexit
import gc
import os
from functools import cache


@cache
def prepare() -> None:
    """Set up this process: torch's compiler, oneDNN's cache, the garbage collector, Matplotlib's backend."""
    # bitsandbytes compiles its CPU kernels anew for every shape, seconds each, and pruned models have many shapes.
    # Nothing here gains from torch.compile, so it is off; torch reads this when it is imported.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # oneDNN generates a matrix kernel for each shape and keeps 1,024 of them. A pruned model has more: every block its
    # own shapes, forward and backward. Cycling through more kernels than fit would generate each one every time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    os.environ["MPLBACKEND"] = "Agg"  # pictures are files, wherever this runs
    # Imports make half a million objects, and all of them stay. Looking through them again and again, as the default
    # does, is a seventh of a stage's start.
    gc.set_threshold(100_000, 50, 50)
    # At its end the interpreter would look through all of them several times more, for two seconds.
    atexit.register(gc.freeze)
