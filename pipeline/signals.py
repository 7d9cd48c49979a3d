"""Interrupts: SIGINT and SIGTERM are noted at once and raised where nothing is half-done; children end with parents.

``on_termination_interrupt`` is called once, at the start of a process. From then on a signal raises ``Interrupted`` in
the main thread, outside of ``held`` blocks. Inside one it waits for the block's end: a journal or a store is never left
in the middle of a write. A thread looks after what the main thread cannot do while it computes: it notices within a
second that an ancestor died, and ends the process when an interrupt has not ended it in time.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

GRACE = 30.0  # seconds that an interrupted process has to end of its own accord
INTERRUPTED = 130  # exit status of an interrupted process
_ANCESTORS = "QPRUNER_ANCESTORS"  # processes of this project above this one, as `pid@start` separated by blanks
_STARTERS = ("DVC_ROOT", "MLFLOW_RUN_ID")  # set by the programs that start us through a shell
_AGAIN = 5.0  # seconds after which an interrupt that was not heeded is raised again
_LOOK = 1.0  # seconds between two looks at the ancestors
_PAUSE = 0.05  # seconds between two looks at processes that are waited for


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop, or the process that it works for died."""


@dataclass
class _State:
    """What this process knows of interrupts.

    Attributes:
        noted: An interrupt came.
        ending: It is being acted upon: no further one is raised.
        held: How many ``held`` blocks the main thread is in.
        deadline: When this process is ended, by the monotonic clock.
    """

    noted: bool = False
    ending: bool = False
    held: int = 0
    deadline: float = math.inf


_state = _State()


@contextmanager
def held() -> Iterator[None]:
    """Put off an interrupt to the end of the block. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
        _raise_noted()


def _raise_noted() -> None:
    if _state.noted and not _state.ending and not _state.held:
        raise Interrupted


def ending(within: float | None = None) -> None:
    """Raise no further interrupt: Ctrl-C reaches every process, and those that wait for this one pass it on.

    Args:
        within: Seconds that the end may take from now on, where it is more than what the process was started with.
    """
    _state.ending = True
    if within is not None:
        _state.deadline = time.monotonic() + within


def on_termination_interrupt(grace: float = GRACE) -> None:
    """Turn SIGINT, SIGTERM and the death of an ancestor into an interrupt, so that runs end as KILLED.

    An exception that arrives in a destructor is lost. It is raised again every few seconds and with every further
    signal, until ``ending`` is called.

    Args:
        grace: Seconds after which an interrupted process is ended, whatever it does.
    """

    def note(*_: object) -> None:
        if not _state.ending:
            _state.noted = True
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            _raise_noted()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, note)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    ancestors = _ancestors()
    os.environ[_ANCESTORS] = " ".join(map(_name, [*ancestors, psutil.Process()]))
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(woken, ancestors, grace), daemon=True, name="interrupts").start()


def _watch(woken: int, ancestors: list[psutil.Process], grace: float) -> None:
    """Interrupt this process when an ancestor dies; end it ``grace`` seconds after an interrupt.

    Args:
        woken: A pipe that gets a byte with every signal, even while the main thread computes in C.
        ancestors: Processes that this one works for.
        grace: See ``on_termination_interrupt``.
    """
    while time.monotonic() < _state.deadline:
        if select.select([woken], [], [], _LOOK)[0]:
            os.read(woken, 64)
            if _state.deadline == math.inf:
                _state.deadline = time.monotonic() + grace
        if _state.deadline == math.inf and not all(map(_lives, ancestors)):
            os.kill(os.getpid(), signal.SIGTERM)
    with suppress(OSError):
        os.write(2, b"interrupted, and not ended in time: ended now\n")
    os._exit(INTERRUPTED)


def _ancestors() -> list[psutil.Process]:
    """Return the living processes that this one works for: those above it in the project, and what started it."""
    known = []
    for name in os.environ.get(_ANCESTORS, "").split():
        pid, _, start = name.partition("@")
        with suppress(psutil.NoSuchProcess, ValueError):
            process = psutil.Process(int(pid))
            if _name(process) == f"{pid}@{start}":
                known.append(process)
    starter = started_by() if any(name in os.environ for name in _STARTERS) else None
    return [*known, starter] if starter and starter not in known else known


def started_by() -> psutil.Process | None:
    """Return what started this process: its parent or, where that is a shell which runs one command, whose it is."""
    with suppress(psutil.Error):
        process = psutil.Process().parent()
        while process is not None and process.cmdline()[1:2] == ["-c"] and process.name() in ("sh", "bash", "dash"):
            process = process.parent()
        return process
    return None


def wait(processes: Iterable[psutil.Process], within: float) -> list[psutil.Process]:
    """Wait until processes have ended; return those that live on.

    One that nobody reaps has ended, too: in a container without an init process it stays a zombie for good.

    Args:
        processes: Any, not only children.
        within: Seconds.
    """
    limit = time.monotonic() + within
    while (alive := [process for process in processes if _lives(process)]) and time.monotonic() < limit:
        time.sleep(_PAUSE)
    return alive


def _name(process: psutil.Process) -> str:
    return f"{process.pid}@{process.create_time():.0f}"


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
