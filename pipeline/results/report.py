"""Stage ``report``: one page with the table of methods, the front and the bits, as Markdown and HTML.

Reads the search's runs out of MLflow and the other stages' figures. Writes ``reports/report.md``,
``reports/report.html``, ``reports/bits.png`` and the paper's figures 1 (``methods.png``), 3 and 4 (``benchmarks.png``).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import GIB
from pipeline.search.pareto import LABELS, LOGPROBS, UNTOUCHED, Point, best, error, front, scale

COMPARED = ("llm_pruner", "qpruner1", "qpruner3")  # figure 1's LoRA (16-bit), LoftQ (4-bit), LoftQ* (mixed)
_COLORS = ("#9aa5b1", "#2f6fbb", "#c8442c")
_THIN = {"elinewidth": 0.7, "capsize": 1.5}
_ORDER = ("dense", "llm_pruner", "uniform8", "qpruner1", "qpruner2", "sensitivity")


def methods(every: Sequence[Point], members: Sequence[Point]) -> list[tuple[str, Point]]:
    """Return the rows of the table of methods: references, QPruner1 and 2, then QPruner3.

    QPruner3 is the best vector that the search as a whole found (paper section 4), whichever step proposed it.
    """
    rows = [(LABELS.get(name, name), one) for name in _ORDER for one in every if one.method == name]
    if members:
        rows.append((LABELS["qpruner3"], best(members)))
    return rows


def method_table(rows: Sequence[tuple[str, Point]], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of the table of methods, with standard errors.

    Accuracies in per cent, log-probabilities (of the gold answer, of a held-out response token) in nats, memory in GiB.
    """
    columns = ["method", *tasks, "mean", "gold log-prob.", "response", "memory, GiB", "bits"]
    body = []
    for label, one in rows:
        cells = [_percent(one.metrics[task], one.metrics[f"{task}_stderr"]) for task in tasks]
        mean = _percent(one.metrics["accuracy"], one.metrics["accuracy_stderr"])
        memory = (
            "-" if one.method == UNTOUCHED else f"{one.memory / GIB:.3f}"
        )  # it is not trained, as in the paper's tables
        gold = f"{one.metrics['gold_logprob']:.3f} ± {one.metrics['gold_logprob_stderr']:.3f}"
        response = f"{one.metrics['response_logprob']:.3f}"
        body.append([label, *cells, mean, gold, response, memory, summary(one.bits)])
    return columns, body


def front_table(
    members: Sequence[Point], objective: str, widest: int | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of the front: the objective and accuracy, and how probably the member belongs there.

    Args:
        members: The front.
        objective: What it was judged by.
        widest: Longer bit strings are summed up; None: none is.
    """
    factor, label = scale(objective)
    if objective in LOGPROBS:
        label = f"{objective.removesuffix('_logprob')}, nats"  # the whole name would not leave the bits their room
    digits = 1 if factor == 100 else 3
    columns = ["trial", "method", label, "expected", "mean acc., %", "P(front)", "GiB", "bits"]
    body = [
        [
            one.name.partition(":")[0],
            one.method,
            f"{factor * one.score:.{digits}f} ± {factor * error(one):.{digits}f}",
            "-" if one.expected is None else f"{factor * one.expected:.{digits}f}",
            _percent(one.metrics["accuracy"], one.metrics["accuracy_stderr"]),
            "-" if one.probability is None else f"{one.probability:.2f}",
            f"{one.memory / GIB:.4f}",
            one.bits if widest is None or len(one.bits) <= widest else summary(one.bits),
        ]
        for one in members
    ]
    return columns, body


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def summary(bits: str) -> str:
    """Return bits in short: ``16``, ``all 4``, or how many are at 8."""
    if bits == "16":
        return "16"
    if set(bits) == {"4"}:
        return "all 4"
    if set(bits) == {"8"}:
        return "all 8"
    return f"{bits.count('8')} of {len(bits)} at 8"


def heat_map(members: Sequence[Point], units: Sequence[str], path: Path) -> None:
    """Draw the bits of the front's members: a band a member, in it a row a part of a block, a column a block."""
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    rows = [one for one in members if one.bits != "16"]
    parts = _parts(units)
    bits = bands([one.bits for one in rows], len(units), len(parts))
    tall, blocks = bits.shape[1:]
    bits = bits.reshape(-1, blocks)
    figure, axes = pyplot.subplots(figsize=(max(6, blocks * 0.28), 1.2 + (0.32 if tall == 1 else 0.17) * len(bits)))
    axes.imshow(bits, cmap=ListedColormap(["#dbe4ee", "#c8442c"]), vmin=4, vmax=8, aspect="auto")
    axes.set_yticks(
        [tall * index + (len(parts) - 1) / 2 for index in range(len(rows))],
        [f"{100 * one.metrics['accuracy']:.1f} %, {one.memory / GIB:.3f} GiB" for one in rows],
        fontsize=7,
    )
    for index in range(len(rows)):
        for row, part in enumerate(parts):
            axes.text(blocks - 0.3, tall * index + row, part, fontsize=6, va="center")
    _name_blocks(axes, blocks)
    axes.set_xlabel("block; red: 8 bits, grey: 4 bits")
    axes.set_xticks([x - 0.5 for x in range(blocks + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(len(bits) + 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def bands(bits: Sequence[str], units: int, parts: int) -> np.ndarray:
    """Return bit strings as bands of pixels, [strings, parts of a block, blocks].

    Where a block has several parts a band ends with a row of nan, the gap to the next one.
    """
    pixels = np.full((len(bits), parts + (parts > 1), units // parts), np.nan)
    for band, text in zip(pixels, bits, strict=True):
        band[:parts] = np.array([int(digit) for digit in text]).reshape(-1, parts).T
    return pixels


def bar_chart(units: Sequence[str], series: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw one bar chart a series over the blocks, a bar for each part that is a unit of its own."""
    from matplotlib import pyplot

    parts = _parts(units)
    blocks, width = len(units) // len(parts), 0.8 / len(parts)
    figure, charts = pyplot.subplots(
        len(series), 1, figsize=(max(7, blocks * 0.25 * len(parts) ** 0.5), 2.4 * len(series)), squeeze=False
    )
    for (label, values), axes in zip(series.items(), charts[:, 0], strict=True):
        for index, part in enumerate(parts):
            places = [block + (index - (len(parts) - 1) / 2) * width for block in range(blocks)]
            color = "#2f6fbb" if len(parts) == 1 else f"C{index}"
            axes.bar(places, values[index :: len(parts)], width, color=color, label=part)
        axes.set_ylabel(label, fontsize=8)
        axes.margins(x=0.01)
        _name_blocks(axes, blocks)
        axes.spines[["top", "right"]].set_visible(False)
    if len(parts) > 1:
        charts[-1, 0].legend(fontsize=7, frameon=False, ncols=len(parts))
    charts[-1, 0].set_xlabel("block")
    _save(figure, path)


def _parts(units: Sequence[str]) -> list[str]:
    """Return what each block's units are called; one empty name where a unit is a block."""
    return list(dict.fromkeys(name.partition(".")[2] for name in units))


def _name_blocks(axes: Any, blocks: int) -> None:
    axes.set_xticks(range(blocks), range(blocks), fontsize=6, rotation=0 if blocks <= 40 else 90)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@dataclass(frozen=True)
class Bars:
    """A method's bars in figure 1: task -> (accuracy, standard error) in [0, 1], and its peak memory in bytes."""

    label: str
    tasks: Mapping[str, tuple[float, float]]
    memory: float


def bars_of(rows: Sequence[tuple[str, Point]], tasks: Sequence[str]) -> list[Bars]:
    """Return figure 1's bars from the table of methods: 16-bit LoRA, uniform 4-bit, mixed bits."""
    wanted = {LABELS[name] for name in COMPARED}
    return [
        Bars(label, {task: (one.metrics[task], one.metrics[f"{task}_stderr"]) for task in tasks}, int(one.memory))
        for label, one in rows
        if label in wanted
    ]


def accuracy_and_memory(panels: Mapping[str, Sequence[Bars]], tasks: Sequence[str], path: Path) -> None:
    """Draw figure 1: bars of each method's accuracy, a marker above each task for its memory on a second axis.

    Args:
        panels: Title -> the methods of a panel.
        tasks: The benchmarks, left to right.
        path: The PNG.
    """
    from matplotlib import pyplot

    width = 0.8 / max(1, *(len(bars) for bars in panels.values()))
    figure, every = pyplot.subplots(
        len(panels), 1, figsize=(max(6, 1.3 * len(tasks)), 3.4 * len(panels)), dpi=150, squeeze=False
    )
    for (title, bars), axes in zip(panels.items(), every[:, 0], strict=True):
        right = axes.twinx()
        for index, one in enumerate(bars):
            places = [place + (index - (len(bars) - 1) / 2) * width for place in range(len(tasks))]
            values = [100 * one.tasks[task][0] for task in tasks]
            errors = [100 * one.tasks[task][1] for task in tasks]
            color = _COLORS[index % len(_COLORS)]
            axes.bar(places, values, width * 0.92, yerr=errors, color=color, error_kw=_THIN, label=one.label)
            right.plot(places, [one.memory / GIB] * len(tasks), "D", color=color, ms=5, mec="#1d2733", mew=0.7)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 100)
        axes.set_xticks(range(len(tasks)), tasks, fontsize=8)
        right.set_ylabel("peak memory, GiB (markers)")
        right.set_ylim(0, 1.1 * max((one.memory for one in bars), default=GIB) / GIB)
        for side in (axes, right):
            side.spines["top"].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=len(bars), loc="lower right", bbox_to_anchor=(1, 1))
    _save(figure, path)


def benchmark_fronts(every: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw figures 3 and 4: accuracy against memory for each benchmark, its own front in red.

    Args:
        every: Benchmark -> the trials, scored by it; references are left out.
        path: The PNG.
    """
    from matplotlib import pyplot

    across = min(4, len(every))
    down = -(-len(every) // across)
    figure, grid = pyplot.subplots(down, across, figsize=(3.1 * across, 2.6 * down), dpi=150, squeeze=False)
    for axes in grid.flat[len(every) :]:
        axes.set_visible(False)
    for (task, points), axes in zip(every.items(), grid.flat, strict=False):
        trials = [one for one in points if not one.reference]
        members = front(trials)
        inside = {one.run_id for one in members}
        for group, color in (([one for one in trials if one.run_id not in inside], "#9aa5b1"), (members, "#c8442c")):
            axes.errorbar(
                [one.memory / GIB for one in group],
                [100 * one.score for one in group],
                [100 * error(one) for one in group],
                fmt="o",
                color=color,
                ms=4,
                **_THIN,
            )
        axes.set_title(task, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy, %", fontsize=8)
    figure.supxlabel("peak memory of recovery, GiB", fontsize=8)
    _save(figure, path)


def write(
    sections: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]],
    facts: Sequence[str],
    pictures: Mapping[str, Path],
    folder: Path,
) -> list[Path]:
    """Write the page as Markdown and as self-contained HTML.

    Args:
        sections: (title, columns, rows) of each table.
        facts: Lines above the tables.
        pictures: Caption -> PNG beside the page.
        folder: Where the page goes.
    """
    markdown = ["# QPruner report", "", *[f"- {fact}" for fact in facts], ""]
    page = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>QPruner report</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1d2733}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:.3rem .6rem;border-bottom:1px solid #dbe4ee;"
        "text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}img{max-width:100%}div{overflow-x:auto}"
        "code,td:last-child{font-family:ui-monospace,monospace;font-size:12px}</style>",
        "<h1>QPruner report</h1><ul>",
        *[f"<li>{html.escape(fact)}" for fact in facts],
        "</ul>",
    ]
    for title, columns, rows in sections:
        markdown += [f"## {title}", "", _line(columns), _line(["---"] * len(columns)), *map(_line, rows), ""]
        head = "".join(f"<th>{html.escape(column)}" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
        page.append(f"<h2>{html.escape(title)}</h2><div><table><tr>{head}{body}</table></div>")
    for caption, path in pictures.items():
        markdown += [f"## {caption}", "", f"![{caption}]({path.name})", ""]
        data = base64.b64encode(path.read_bytes()).decode()
        page.append(
            f"<h2>{html.escape(caption)}</h2><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        )
    written = [folder / "report.md", folder / "report.html"]
    written[0].write_text("\n".join(markdown), encoding="utf-8")
    written[1].write_text("\n".join(page), encoding="utf-8")
    return written


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
