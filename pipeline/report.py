"""Stage ``report``: one page with the table of methods, the front and the bits, as Markdown and HTML.

Reads the search's runs out of MLflow and the other stages' figures. Writes ``reports/report.md``,
``reports/report.html`` and ``reports/bits.png``.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.memory import GIB
from pipeline.pareto import LABELS, UNTOUCHED, Point, best, scale

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
    """Return (columns, rows) of the table of methods: accuracies in per cent with standard errors, memory in GiB."""
    columns = ["method", *tasks, "mean", "memory, GiB", "bits"]
    body = []
    for label, one in rows:
        cells = [_percent(one.metrics[task], one.metrics[f"{task}_stderr"]) for task in tasks]
        mean = _percent(one.metrics["accuracy"], one.metrics["accuracy_stderr"])
        memory = (
            "-" if one.method == UNTOUCHED else f"{one.memory / GIB:.3f}"
        )  # it is not trained, as in the paper's tables
        body.append([label, *cells, mean, memory, summary(one.bits)])
    return columns, body


def front_table(members: Sequence[Point], objective: str) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of the front: the objective and accuracy, and how probably the member belongs there."""
    factor, label = scale(objective)
    digits = 1 if factor == 100 else 4
    columns = ["trial", "method", label, "expected", "accuracy, %", "on the front", "memory, GiB", "bits"]
    body = [
        [
            one.name.partition(":")[0],
            one.method,
            f"{factor * one.score:.{digits}f} ± {factor * one.stderr:.{digits}f}",
            "-" if one.expected is None else f"{factor * one.expected:.{digits}f}",
            _percent(one.metrics["accuracy"], one.metrics["accuracy_stderr"]),
            "-" if one.probability is None else f"{one.probability:.2f}",
            f"{one.memory / GIB:.4f}",
            one.bits,
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
    """Draw the bits of the front's members: a row a member, a column a unit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    rows = [one for one in members if one.bits != "16"]
    bits = np.array([[int(digit) for digit in one.bits] for one in rows]).reshape(len(rows), len(units))
    figure, axes = pyplot.subplots(figsize=(max(6, len(units) * 0.28), 1.2 + 0.32 * len(rows)), dpi=150)
    axes.imshow(
        bits,
        cmap=ListedColormap(["#dbe4ee", "#c8442c"]),
        vmin=4,
        vmax=8,
        aspect="auto",
    )
    axes.set_yticks(
        range(len(rows)),
        [f"{100 * one.metrics['accuracy']:.1f} %, {one.memory / GIB:.3f} GiB" for one in rows],
        fontsize=7,
    )
    axes.set_xticks(range(len(units)), units, fontsize=6, rotation=0 if len(units) <= 40 else 90)
    axes.set_xlabel("unit (block 0 first); red: 8 bits, grey: 4 bits")
    axes.set_xticks([x - 0.5 for x in range(len(units) + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(len(rows) + 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def bar_chart(units: Sequence[str], series: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw one bar chart a series over the units."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(series), 1, figsize=(max(7, len(units) * 0.25), 2.4 * len(series)), dpi=150, squeeze=False
    )
    for (label, values), ax in zip(series.items(), axes[:, 0], strict=True):
        ax.bar(range(len(units)), values, color="#2f6fbb")
        ax.set_ylabel(label, fontsize=8)
        ax.set_xticks(range(len(units)), units, fontsize=6, rotation=0 if len(units) <= 40 else 90)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("unit")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


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
