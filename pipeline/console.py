"""What a person sees while a stage runs: progress with an ETA, the screen of a search, tables, short notes."""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

T = TypeVar("T")
WIDTH = 134  # of a table in a log


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Show progress with an ETA: every tenth of a second on a terminal, every ten seconds in a log."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, description, total, mininterval=interval, dynamic_ncols=True, disable=False)


def note(text: str) -> None:
    """Print one line, above whatever progress is shown."""
    tqdm.write(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns after the first are figures. A narrow terminal wraps cells, a log does not."""
    shown = Table(title=title, title_justify="left")
    terminal = sys.stdout.isatty()
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=not terminal)
    for row in rows:
        shown.add_row(*row)
    Console(width=None if terminal else WIDTH).print(shown)


def duration(seconds: float) -> str:
    """Return a time in words, such as ``40 s``, ``12 min`` or ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class Finished:
    """A finished trial: its name, its score (higher is better) and the seconds that it took."""

    name: str
    score: float
    seconds: float


class Search:
    """The screen of a search: what is at work, how many trials are finished, the best so far, when the search will end.

    On a terminal it lives while the ``with`` block runs, and finished trials stand as lines above it. Elsewhere, and
    outside the block, each finished trial is one line that ends with the state of the search.

    Args:
        wanted: Finished trials that the search should hold.
        clock: Returns seconds.
        workers: How many trials are worked on side by side.
    """

    def __init__(self, wanted: int, clock: Callable[[], float] = time.monotonic, workers: int = 1):
        self.wanted, self.workers = wanted, workers
        self.finished: list[Finished] = []
        self._clock = clock
        self._at_work: dict[str, float] = {}  # label -> when it began
        self._step = (0, 0)
        self._live: Live | None = None

    def __enter__(self) -> Search:
        if sys.stdout.isatty():
            self._live = Live(get_renderable=self._screen, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, label: str) -> None:
        """Say what is at work now, too."""
        self._at_work[label], self._step = self._clock(), (0, 0)

    def end(self, label: str) -> None:
        """Say that it is at work no longer."""
        self._at_work.pop(label, None)

    def steps(self, items: Iterable[T]) -> Iterable[T]:
        """Show progress through the steps of what is at work in this process."""
        if self._live is None:
            yield from progress(items, next(iter(self._at_work), ""))
            return
        yield from self._counted(items)

    def _counted(self, items: Iterable[T]) -> Iterator[T]:
        total = len(items) if isinstance(items, Sized) else 0
        for done, item in enumerate(items):
            self._step = (done, total)
            yield item
        self._step = (total, total)

    def finish(self, trial: Finished, line: str) -> None:
        """Count a finished trial, and print a line with what it measured."""
        self.finished.append(trial)
        note(line if self._live is not None else f"{line}; {self.state()}")

    def state(self) -> str:
        """Return how many trials are finished, the best of them, and the time that the others should take."""
        parts = [f"{len(self.finished)} of {self.wanted} trials"]
        if self.workers > 1:
            parts.append(f"{len(self._at_work)} at work")
        if self.finished:
            best = max(self.finished, key=lambda trial: trial.score)
            parts.append(f"best score {best.score:.4g} by {best.name}")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"about {duration(left)} left in the search")
        return ", ".join(parts)

    def seconds_left(self) -> float | None:
        """Return the seconds that the trials still to come should take: as long as the finished ones; None before them.

        The trials at work count by what is left of their share. Each further one begins where a worker is free first.
        """
        missing = self.wanted - len(self.finished)
        if not self.finished or missing <= 0:
            return None
        mean = sum(trial.seconds for trial in self.finished) / len(self.finished)
        ends = [max(0.0, mean - (self._clock() - began)) for began in self._at_work.values()]
        ends += [0.0] * (self.workers - len(ends))
        heapq.heapify(ends)
        for _ in range(missing - len(self._at_work)):
            heapq.heappush(ends, heapq.heappop(ends) + mean)
        return max(ends)

    def _screen(self) -> Table:
        done, total = self._step
        bar = ProgressBar(total=max(1, self.wanted), completed=len(self.finished), width=40)
        step = f", step {done} of {total} of its recovery" if total and done < total else ""
        now = self._clock()
        since = [f"{label}, {duration(now - began)}" for label, began in self._at_work.items()]
        work = since if self.workers > 1 else [f"{label}{step}" for label in self._at_work]
        rows = Table.grid()
        for line in work or ["starting"]:
            rows.add_row(Text(line))
        rows.add_row(bar)
        rows.add_row(Text(self.state()))
        return rows
