"""What all measurements share: figures of two sides, medians of interleaved repeats, how they are kept and shown."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import console, storage
from pipeline.results import style

MEASURED, BAR, LIMIT = "measured", "a bar", "a limit"


class LeftOut(Exception):
    """A measurement cannot be made here: why."""


@dataclass(frozen=True)
class Figure:
    """One comparison; ``ratio`` above 1 always means that ours is better.

    Attributes:
        ours: Our figure, a median of repeats.
        theirs: The other side's, or what ours is held against.
        ratio: ours / theirs if more is better, theirs / ours if less is; None where the divisor is zero.
        unit: Of both figures, and which way is better.
        n: Repeats of each side; for a share of items, the items.
        against: What ``theirs`` is: ``measured``, ``a bar`` (to be met) or ``a limit`` (nobody passes it).
    """

    ours: float
    theirs: float
    ratio: float | None
    unit: str
    n: int
    against: str = MEASURED


def more_is_better(ours: float, theirs: float, unit: str, n: int, against: str = MEASURED) -> Figure:
    """Return a figure such as a rate."""
    return Figure(ours, theirs, ours / theirs if theirs else None, _unit(unit, "more", against), n, against)


def less_is_better(ours: float, theirs: float, unit: str, n: int, against: str = MEASURED) -> Figure:
    """Return a figure such as seconds."""
    return Figure(ours, theirs, theirs / ours if ours else None, _unit(unit, "less", against), n, against)


def _unit(unit: str, better: str, against: str) -> str:
    what = "" if against == MEASURED else f"; theirs is {against}"
    return f"{unit}; {better} is better{what}; ratio > 1: ours is better"


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(*sides: Callable[[], float], repeats: int) -> list[float]:
    """Measure every side in turn, again and again, so that noise hits all; return each side's median.

    Args:
        sides: Each returns one measurement.
        repeats: Of each side.
    """
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for values, side in zip(found, sides, strict=True):
            values.append(side())
    return [median(values) for values in found]


def read(path: Path) -> dict[str, Figure]:
    """Return the figures of earlier runs by name; none if there is no file."""
    if not path.exists():
        return {}
    return {name: Figure(**values) for name, values in json.loads(path.read_text()).items()}


def keep(path: Path, figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """Put figures into the file, atomically, and leave the others in it as they are; return all."""
    found = read(path) | dict(figures)
    storage.write_text(path, json.dumps({name: asdict(figure) for name, figure in found.items()}, indent=1))
    return found


def rows(figures: Mapping[str, Figure]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table."""
    shown = [
        [name, f"{one.ours:.4g}", f"{one.theirs:.4g}", "-" if one.ratio is None else f"{one.ratio:.3g}"]
        + [one.unit.partition("; ratio")[0], str(one.n)]
        for name, one in figures.items()
    ]
    return ["measurement", "ours", "theirs", "ratio", "unit", "n"], shown


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(figures: Mapping[str, Figure], folder: Path, machine: str) -> None:
    """Print the figures and write ``bench.md`` and ``bench.png``."""
    columns, cells = rows(figures)
    console.table("Benchmarks (ratio > 1: ours is better)", columns, cells)
    about = f"`python -m benchmarks.bench`, on {machine}. Medians of n repeats; a ratio above 1: ours is better."
    storage.write_text(folder / "bench.md", f"# Benchmarks\n\n{about}\n\n{markdown(columns, cells)}")
    _picture({name: one for name, one in figures.items() if one.ratio}, folder / "bench.png")


def _picture(figures: Mapping[str, Figure], path: Path) -> None:
    colors = {MEASURED: style.BLUE, BAR: style.GREY, LIMIT: style.RED}
    with style.picture(path, (8, 1 + 0.28 * len(figures))) as (_, grid):
        axes = grid[0, 0]
        for kind, color in colors.items():
            group = {name: measured for name, measured in figures.items() if measured.against == kind}
            if not group:
                continue
            ratios = [measured.ratio or 1 for measured in group.values()]
            axes.barh(list(group), [ratio - 1 for ratio in ratios], left=1, color=color, label=f"theirs: {kind}")
            for name, ratio in zip(group, ratios, strict=True):
                place = (max(ratio, 1), name)
                axes.annotate(f"{ratio:.3g}", place, (3, 0), textcoords="offset points", fontsize=style.SMALL)
        axes.set_xscale("log")
        axes.axvline(1, color=style.INK, lw=0.8)
        axes.set_xlabel("ratio (above 1: ours is better)")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        if figures:
            axes.legend()
