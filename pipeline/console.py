"""What a person sees while a stage runs: progress with an ETA, tables, short notes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

T = TypeVar("T")
BITS = 32  # the longest bit string that leaves the front's table room for the rest
WIDTH = 134  # of a log: that table


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Show progress with an ETA: every tenth of a second on a terminal, every ten seconds in a log."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, description, total, mininterval=interval, dynamic_ncols=True, disable=False)


def note(text: str) -> None:
    """Print one line."""
    tqdm.write(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns after the first are figures."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(shown)
