"""Which process a run belongs to, so that the runs of dead processes can be ended by the next one that starts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

HOST = "qpruner.host"
_PID, _STARTED = "qpruner.pid", "qpruner.started"
_BOOT, _SPACE, _MACHINE = "qpruner.boot", "qpruner.pid_namespace", "qpruner.machine"
_FIRST_SPACE = "pid:[4026531836]"  # Linux' initial PID namespace: a machine itself, no container


def tags() -> dict[str, str]:
    """Return the tags that name this process: its number means something in one PID namespace of one boot only."""
    process = psutil.Process()
    return {**_place(), HOST: platform.node(), _PID: str(process.pid), _STARTED: f"{process.create_time():.0f}"}


@cache
def _place() -> dict[str, str]:
    """Return what tells this machine's boot and PID namespace from others; nothing where there is no /proc."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = {_BOOT: boot, _SPACE: os.readlink("/proc/self/ns/pid")}
        with suppress(OSError):
            place[_MACHINE] = Path("/etc/machine-id").read_text().strip()
        return place
    return {}


def dead(tags: Mapping[str, str]) -> bool:
    """Return whether the process that these tags name is known to be dead.

    One of another PID namespace (two containers may share a host name) cannot be seen from here: it counts as alive.
    A machine that was started again since has none of its old processes.
    """
    here = _place()
    if any(tags.get(key, here.get(key)) != here.get(key) for key in (_BOOT, _SPACE)):
        same_machine = here.get(_MACHINE) and tags.get(_MACHINE) == here[_MACHINE]
        return bool(same_machine) and tags.get(_SPACE) == here.get(_SPACE) == _FIRST_SPACE
    try:
        process = psutil.Process(int(tags[_PID]))
        alive = abs(process.create_time() - float(tags[_STARTED])) <= 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError):  # KeyError: killed while it wrote these tags
        return True
    return not alive


def never_started(tags: Mapping[str, str], made: int) -> bool:
    """Return whether a run was made by an ``mlflow run`` of this folder that died before it started our process.

    MLflow makes its run first, and only our process says who it is. Until then the run belongs to any ``mlflow run``
    that was there before it.

    Args:
        tags: The run's.
        made: When it was made, in milliseconds since 1970.
    """
    folder = tags.get("mlflow.source.name", "").removeprefix("file://").replace("#", "/")  # of a folder below a clone's
    if HOST in tags or Path(folder) != Path.cwd():
        return False
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, ValueError):  # gone, or a word that is no path
            words, there = process.cmdline(), Path(process.cwd())
            of_mlflow = "run" in words and any(Path(word).name == "mlflow" for word in words)
            of_here = of_mlflow and any((there / word).resolve() == Path.cwd() for word in words)
            if of_here and process.create_time() <= made / 1000 + 1:
                return False
    return True
