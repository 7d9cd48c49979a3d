"""How a process of this project is set up. Entry points call ``prepare`` first; importing the package changes nothing.

It imports nothing heavy, as some of it must be set before torch is imported.
"""

from __future__ import annotations

import atexit
import gc
import getpass
import os
from functools import cache
from pathlib import Path

from pipeline.paths import CACHE


@cache
def prepare() -> None:
    """Set up this process and those that it starts: user and caches, torch's compiler, garbage collector, pictures."""
    _name_user()
    _place_caches()
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


def _name_user() -> None:
    """Give a name to a user without one (a container's ``-u 12345``): DVC, MLflow and torch cannot do without."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def _place_caches() -> None:
    """Let libraries keep their caches in the project where the user's home is unknown or cannot be written."""
    if not home_is_writable():
        os.environ.setdefault("XDG_CACHE_HOME", str(CACHE.absolute()))
        os.environ.setdefault("MPLCONFIGDIR", str(CACHE.absolute() / "matplotlib"))
        if not _home():
            os.environ["HOME"] = str(CACHE.absolute())


def home_is_writable() -> bool:
    """Return whether libraries can keep something below the user's home."""
    folder = Path(_home(), ".cache")
    while not folder.exists():
        folder = folder.parent
    return _home() != "" and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _home() -> str:
    """Return the user's home; nothing where neither HOME nor the system names one."""
    home = os.environ.get("HOME", "~")
    return os.path.expanduser(home).removeprefix("~")
