"""The pictures of the reports as PNG files, all in one style (``style.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pipeline import GIB, bits
from pipeline.results import labels, style
from pipeline.results.style import BLUE, ERROR_BARS, GREY, INK, PALE, RED, SERIES, SMALL, picture
from pipeline.search.pareto import Point, best
from pipeline.search.pareto import front as members_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPARED = ("llm_pruner", "qpruner1", "qpruner2", "qpruner3")  # 16-bit LoRA, uniform 4-bit, mixed by two rules
_BAR_COLORS = (GREY, BLUE, "#7fa8d6", RED)


# --- the front ---------------------------------------------------------------------------------------------------


def front(
    points: Sequence[Point], members: Sequence[Point], objective: str, path: Path, memory: str = "training"
) -> None:
    """Draw quality against peak memory: the trials alone, and beside them all points where there are references.

    Where trials differ in their ratio, that is their colour.

    Args:
        points: All points of a study.
        members: Its front, lowest memory first.
        objective: What they were judged by.
        path: The PNG.
        memory: The peak that counts.
    """
    trials = [point for point in points if not point.reference]
    panels = {"trials": trials} if len(trials) == len(points) else {"trials": trials, "with references": points}
    source = members[0].source if members else "predicted"
    with picture(path, (6.2 * len(panels), 5), 1, len(panels)) as (figure, grid):
        for (title, shown), axes in zip(panels.items(), grid[0], strict=True):
            _panel(axes, shown, members, labels.scale(objective)[0])
            axes.set_title(title)
            axes.set_xlabel(f"{labels.memory(memory)} ({source})")
        grid[0, 0].set_ylabel(labels.scale(objective)[1])
        figure.suptitle("error bars: ± 1 standard error of the differences between trials", fontsize=style.FONT)
        figure.tight_layout()
        for shown, axes in zip(panels.values(), grid[0], strict=True):
            _name(axes, shown, members, labels.scale(objective)[0])


def _panel(axes: Axes, points: Sequence[Point], members: Sequence[Point], factor: float) -> None:
    """Draw points and the front as a step line, without names."""
    inside = {member.run_id for member in members}
    others = [point for point in points if point.run_id not in inside and not point.reference]
    references = [point for point in labels.placed(points) if point.reference]
    ratios = sorted({point.ratio for point in points if not point.reference})
    steps = [point.memory / GIB for point in members], [factor * point.score for point in members]
    axes.step(*steps, where="post", color=RED, lw=1, alpha=0.6, label="Pareto front" if len(ratios) > 1 else None)
    _scatter(axes, references, factor, "D", GREY if len(ratios) > 1 else BLUE, 5, "reference")
    if len(ratios) > 1:  # on the front marks are large
        for ratio, color in zip(ratios, ratio_colors(len(ratios)), strict=True):
            _scatter(axes, [point for point in others if point.ratio == ratio], factor, "o", color, 3)
            of_front = [point for point in members if point.ratio == ratio]
            _scatter(axes, of_front, factor, "o", color, 6)
            axes.plot([], [], "o", color=color, ms=5, label=labels.ratio(ratio))
    else:
        _scatter(axes, others, factor, "o", GREY, 4, "trial")
        _scatter(axes, members, factor, "o", RED, 6, "Pareto front")
    for point in points:
        if not labels.placed([point]):
            axes.axhline(factor * point.score, color=BLUE, lw=1, ls="--", label=labels.method(labels.UNTOUCHED))
    axes.margins(x=0.12, y=0.18)  # room for names
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")


def ratio_colors(count: int) -> list[str]:
    """Return a colour for each of several ratios, ascending."""
    known = style.RATIOS
    return [known[round(index * (len(known) - 1) / max(count - 1, 1))] for index in range(count)]


def _scatter(
    axes: Axes, group: Sequence[Point], factor: float, marker: str, color: str, size: float, label: str | None = None
) -> None:
    if not group:
        return
    axes.errorbar(
        [point.memory / GIB for point in group],
        [factor * point.score for point in group],
        [factor * labels.error(point) for point in group],
        fmt=marker,
        color=color,
        ms=size,
        label=label,
        **ERROR_BARS,
    )


def _name(axes: Axes, points: Sequence[Point], members: Sequence[Point], factor: float) -> None:
    """Write names beside points: in a panel of trials all that there are, beside references those of methods alone."""
    placed = labels.placed(points)
    crowded = any(point.reference for point in points)
    xs = [point.memory / GIB for point in placed]
    ys = [factor * point.score for point in placed]
    taken = style.boxes_of(axes, xs, ys, [factor * labels.error(point) for point in placed], 4)
    taken += style.steps_of(axes, [(point.memory / GIB, factor * point.score) for point in members])
    if legend := axes.get_legend():
        extent = legend.get_window_extent()
        taken.append((extent.x0, extent.y0, extent.x1, extent.y1))
    names = []
    for point, x, y in zip(placed, xs, ys, strict=True):
        method, trial = names_in_picture(point, members)
        if text := method if crowded else ", ".join(filter(None, (method, trial))):
            names.append((x, y, text))
    style.place_labels(axes, sorted(names, key=lambda name: len(name[2]), reverse=True), taken)


def names_in_picture(point: Point, members: Sequence[Point]) -> tuple[str, str]:
    """Return what stands beside a point: (method, trial), each empty where it has none worth a name.

    Named methods and the front's members have both; QPruner3 is the best member.
    """
    inside = any(member.run_id == point.run_id for member in members)
    names = []
    if inside and best(members).run_id == point.run_id and len({member.ratio for member in members}) == 1:
        names.append(labels.method(labels.QPRUNER3))
    if point.reference or point.method in ("qpruner1", "qpruner2", "sensitivity"):
        names.append(labels.method(point.method))
    elif point.method == "uniform" and not point.ratio:
        names.append(f"not pruned, {bits.summary(point.bits)}")
    return ", ".join(names), labels.trial(point) if not point.reference and (inside or names) else ""


def benchmark_fronts(points_by_task: Mapping[str, Sequence[Point]], path: Path, memory: str = "training") -> None:
    """Draw the paper's figures 3 and 4: accuracy against memory for each benchmark, its own front red and numbered.

    Args:
        points_by_task: Benchmark -> the points, scored by it; references are left out.
        path: The PNG.
        memory: The peak that counts.
    """
    across = min(4, len(points_by_task))
    down = -(-len(points_by_task) // across)
    with picture(path, (3.1 * across, 2.6 * down), down, across) as (figure, grid):
        for axes in grid.flat[len(points_by_task) :]:
            axes.set_visible(False)
        for (task, points), axes in zip(points_by_task.items(), grid.flat, strict=False):
            trials = [point for point in points if not point.reference]
            members = members_of(trials)
            inside = {member.run_id for member in members}
            _scatter(axes, [point for point in trials if point.run_id not in inside], 100, "o", GREY, 3)
            _scatter(axes, members, 100, "o", RED, 4)
            for member in members:
                axes.annotate(
                    labels.number(member),
                    (member.memory / GIB, 100 * member.score),
                    (3, 3),
                    textcoords="offset points",
                    fontsize=SMALL,
                )
            axes.set_title(labels.task(task))
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy, %")
        figure.supxlabel(f"{labels.memory(memory)}; numbers: trials of each benchmark's own front", fontsize=style.FONT)


# --- methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """A method's bars in figure 1.

    Attributes:
        label: What users call it.
        tasks: Benchmark -> (accuracy, standard error) in [0, 1].
        memory: Peak memory of training in bytes.
    """

    label: str
    tasks: Mapping[str, tuple[float, float]]
    memory: float


def accuracy_and_memory(panels: Mapping[str, Sequence[Bars]], tasks: Sequence[str], path: Path) -> None:
    """Draw the paper's figure 1: bars of each method's accuracy, a marker for its memory on a second axis.

    Args:
        panels: Title -> the methods of a panel.
        tasks: The benchmarks, left to right.
        path: The PNG.
    """
    width = 0.8 / max(1, *(len(bars) for bars in panels.values()))
    size = max(6, 1.3 * len(tasks)), 3.4 * len(panels)
    with picture(path, size, len(panels)) as (_, grid):
        for (title, bars), axes in zip(panels.items(), grid[:, 0], strict=True):
            memory_axes = axes.twinx()
            for index, method in enumerate(bars):
                places = [place + (index - (len(bars) - 1) / 2) * width for place in range(len(tasks))]
                values = [100 * method.tasks[task][0] for task in tasks]
                errors = [100 * method.tasks[task][1] for task in tasks]
                color = _BAR_COLORS[index % len(_BAR_COLORS)]
                axes.bar(places, values, width * 0.92, yerr=errors, color=color, error_kw=ERROR_BARS,
                         label=method.label)  # fmt: skip
                memory = [method.memory / GIB] * len(tasks)
                memory_axes.plot(places, memory, "D", color=color, ms=4, mec=INK, mew=0.7)
            axes.set_title(title, loc="left")
            axes.set_ylabel("accuracy, %")
            axes.set_ylim(0, 100)
            axes.set_xticks(range(len(tasks)), [labels.task(task) for task in tasks])
            axes.grid(axis="x", visible=False)
            memory_axes.set_ylabel("peak memory, GiB (markers)")
            memory_axes.set_ylim(0, 1.1 * max((method.memory for method in bars), default=GIB) / GIB)
            memory_axes.grid(visible=False)
            if bars:
                axes.legend(ncols=len(bars), loc="lower right", bbox_to_anchor=(1, 1))


# --- units -------------------------------------------------------------------------------------------------------


def heat_map(members: Sequence[Point], units: Sequence[str], path: Path) -> None:
    """Draw the bits of the front's members: a band a member, in it a row for each part of a block, a column a block.

    Args:
        members: The front.
        units: Names of the units, ``<block>`` or ``<block>.<part>``.
        path: The PNG.
    """
    from matplotlib.colors import ListedColormap

    parts = _parts(units)
    pixels = bands([member.bits for member in members], len(units), len(parts))
    tall, blocks = pixels.shape[1:]
    pixels = pixels.reshape(-1, blocks)
    size = max(6, blocks * 0.28), 1.2 + (0.32 if tall == 1 else 0.17) * len(pixels)
    with picture(path, size) as (_, grid):
        axes = grid[0, 0]
        axes.imshow(pixels, cmap=ListedColormap([PALE, RED, INK]), vmin=0, vmax=2, aspect="auto")
        axes.set_yticks(
            [tall * index + (len(parts) - 1) / 2 for index in range(len(members))],
            [f"{labels.trial(member)}\n{100 * member.ratio:g} %, {member.memory / GIB:.3f} GiB" for member in members],
            fontsize=SMALL,
        )
        for index in range(len(members)):
            for row, part in enumerate(parts):
                axes.text(blocks - 0.3, tall * index + row, part, fontsize=SMALL - 1, va="center")
        _name_blocks(axes, blocks)
        axes.set_xlabel("block (grey: 4 bits, red: 8, black: 16)")
        axes.set_xticks([x - 0.5 for x in range(blocks + 1)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(len(pixels) + 1)], minor=True)
        axes.grid(visible=False)
        axes.grid(which="minor", color="white", lw=1, alpha=1)
        axes.tick_params(which="minor", length=0)
        axes.set_axisbelow(False)  # the grid parts the pixels
        axes.spines[:].set_visible(False)


def bands(texts: Sequence[str], units: int, parts: int) -> np.ndarray:
    """Return bit texts as bands of pixels, [texts, parts of a block, blocks]: 0 for 4 bits, 1 for 8, 2 for 16.

    Where a block has several parts a band ends with a row of nan, the gap to the next one.
    """
    pixels = np.full((len(texts), parts + (parts > 1), units // parts), np.nan)
    for band, text in zip(pixels, texts, strict=True):
        band[:parts] = np.array([bits.WIDTHS.index(width) for width in bits.read(text)]).reshape(-1, parts).T
    return pixels


def bar_chart(units: Sequence[str], series: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw one bar chart a series over the blocks, a bar for each part that is a unit of its own."""
    parts = _parts(units)
    blocks, width = len(units) // len(parts), 0.8 / len(parts)
    size = max(7, blocks * 0.25 * len(parts) ** 0.5), 2.4 * len(series)
    with picture(path, size, len(series)) as (_, grid):
        for (label, values), axes in zip(series.items(), grid[:, 0], strict=True):
            for index, part in enumerate(parts):
                places = [block + (index - (len(parts) - 1) / 2) * width for block in range(blocks)]
                axes.bar(places, values[index :: len(parts)], width, color=SERIES[index % len(SERIES)], label=part)
            axes.set_ylabel(label)
            axes.margins(x=0.01)
            axes.grid(axis="x", visible=False)
            _name_blocks(axes, blocks)
        if len(parts) > 1:
            grid[-1, 0].legend(ncols=len(parts))
        grid[-1, 0].set_xlabel("block")


def _parts(units: Sequence[str]) -> list[str]:
    """Return what each block's units are called; one empty name where a unit is a block."""
    return list(dict.fromkeys(name.partition(".")[2] for name in units))


def _name_blocks(axes: Axes, blocks: int) -> None:
    axes.set_xticks(range(blocks), list(map(str, range(blocks))), fontsize=SMALL, rotation=0 if blocks <= 40 else 90)


# --- plan --------------------------------------------------------------------------------------------------------


def plan(peaks: pd.DataFrame, title: str, budget_gib: float, path: Path) -> None:
    """Draw predicted peaks against the pruning ratio: training and inference, a line for each choice of bits.

    Args:
        peaks: As ``plan.table`` returns it.
        title: The model.
        budget_gib: Drawn as a dashed line.
        path: The PNG.
    """
    with picture(path, (10, 4), 1, 2, sharey=True) as (figure, grid):
        for step, axes in zip(("training", "inference"), grid[0], strict=True):
            for (label, rows), color in zip(peaks.groupby("bits", sort=False), SERIES, strict=False):
                axes.plot(100 * rows["ratio"], rows[f"{step}_gib"], marker="o", ms=4, color=color, label=label)
            axes.axhline(budget_gib, color=INK, ls="--", lw=1, label=f"{budget_gib:g} GiB")
            axes.set_title(step)
            axes.set_xlabel("parameters removed, %")
        grid[0, 0].set_ylabel("predicted peak, GiB")
        grid[0, 0].set_ylim(bottom=0)
        grid[0, 1].legend()
        figure.suptitle(title)
