"""Dominance, the front and its hypervolume. Stage ``pareto``: the front, from the MLflow runs alone.

Reads the search's trials out of MLflow (``reports/search.json`` names the study). Writes ``reports/pareto.csv``,
``.json``, ``.png`` and ``.html``, and tags the runs of the front's members.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.memory import GIB


@dataclass(frozen=True)
class Point:
    """One finished trial or reference row, as MLflow has it.

    Attributes:
        run_id: Its run.
        name: Its run's name.
        method: ``qpruner1``, ``qpruner2``, ``sensitivity``, ``random``, ``sampler``, ... or a reference's name.
        bits: Its bit string.
        score: The objective in [0, 1], higher is better.
        stderr: Its standard error.
        memory: Peak bytes, lower is better.
        source: ``measured`` or ``predicted``.
        reference: Whether it stands outside the front.
        metrics: All its metrics.
    """

    run_id: str
    name: str
    method: str
    bits: str
    score: float
    stderr: float
    memory: int
    source: str
    reference: bool
    metrics: dict[str, float]


def points(runs: Sequence[Any], objective: str) -> list[Point]:
    """Turn MLflow's runs of one study into points; unfinished and failed ones are left out.

    Args:
        runs: As ``tracking.trials`` returns them.
        objective: ``accuracy`` or a benchmark's name.
    """
    found = []
    for run in runs:
        metrics, tags = run.data.metrics, run.data.tags
        if run.info.status != "FINISHED" or objective not in metrics:
            continue
        found.append(
            Point(
                run_id=run.info.run_id,
                name=run.info.run_name,
                method=tags["method"],
                bits=run.data.params["bits"],
                score=metrics[objective],
                stderr=metrics[f"{objective}_stderr"],
                memory=int(metrics["peak_memory_bytes"]),
                source=tags["memory_source"],
                reference=tags["stage"] == "reference",
                metrics=dict(metrics),
            )
        )
    return found


def dominates(one: Point, other: Point) -> bool:
    """Return whether a point is no worse in both objectives and better in one."""
    no_worse = one.score >= other.score and one.memory <= other.memory
    return no_worse and (one.score > other.score or one.memory < other.memory)


def front(every: Sequence[Point]) -> list[Point]:
    """Return the points that no other one dominates, lowest memory first; equal points all stay."""
    members: list[Point] = []
    for one in sorted(every, key=lambda one: (one.memory, -one.score, one.run_id)):
        # Nothing that follows needs less memory, so the last member is the only one that can dominate this point.
        if not members or not dominates(members[-1], one):
            members.append(one)
    return members


def hypervolume(members: Sequence[Point], worst_score: float, worst_memory: float) -> float:
    """Return the area that a front dominates, down to a reference point.

    Args:
        members: Any points; dominated ones add nothing.
        worst_score: Score of the reference point.
        worst_memory: Memory of the reference point in bytes.

    Returns:
        Sum over the front of score gained times memory saved, in bytes.
    """
    area, best = 0.0, worst_score
    for one in sorted(members, key=lambda one: (one.memory, -one.score)):
        if one.score > best and one.memory < worst_memory:
            area += (one.score - best) * (worst_memory - one.memory)
            best = one.score
    return area


def best(members: Sequence[Point]) -> Point:
    """Return the member with the highest score; of equals, the one that needs least memory.

    Raises:
        ValueError: There is none.
    """
    if not members:
        raise ValueError("the front is empty: no trial of the study has finished; run: mlflow run . -e search")
    return max(members, key=lambda one: (one.score, -one.memory))


def table(every: Sequence[Point], members: Sequence[Point]) -> pd.DataFrame:
    """Return all points as a dataframe, members of the front first."""
    inside = {one.run_id for one in members}
    order = [*members, *(one for one in every if one.run_id not in inside)]
    return pd.DataFrame(
        {
            "front": [one.run_id in inside for one in order],
            "name": [one.name for one in order],
            "method": [one.method for one in order],
            "bits": [one.bits for one in order],
            "score": [one.score for one in order],
            "stderr": [one.stderr for one in order],
            "peak_memory_bytes": [one.memory for one in order],
            "memory_source": [one.source for one in order],
            "run_id": [one.run_id for one in order],
        }
    )


def write(every: Sequence[Point], members: Sequence[Point], objective: str, folder: Path) -> list[Path]:
    """Write the front as CSV, JSON (rows for DVC's plots), PNG and self-contained HTML; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(every, members)
    rows.to_csv(folder / "pareto.csv", index=False)
    (folder / "pareto.json").write_text(json.dumps(rows.to_dict(orient="records"), indent=1))
    _picture(every, members, objective, folder / "pareto.png")
    _page(every, members, objective, folder / "pareto.html")
    return [folder / f"pareto.{ending}" for ending in ("csv", "json", "png", "html")]


def _picture(every: Sequence[Point], members: Sequence[Point], objective: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150)
    inside = {one.run_id for one in members}
    others = [one for one in every if one.run_id not in inside and not one.reference]
    styles = [
        (others, "o", "#9aa5b1", "trial"),
        ([one for one in every if one.reference and one.method != UNTOUCHED], "D", "#2f6fbb", "reference"),
    ]
    for group, marker, color, label in styles:
        if group:
            axes.errorbar(
                [one.memory / GIB for one in group],
                [100 * one.score for one in group],
                [100 * one.stderr for one in group],
                fmt=marker,
                color=color,
                ecolor=color,
                elinewidth=0.7,
                alpha=0.75,
                capsize=2,
                ms=5,
                label=label,
            )
    x, y = [one.memory / GIB for one in members], [100 * one.score for one in members]
    axes.step(x, y, where="post", color="#c8442c", lw=1, alpha=0.6)
    axes.errorbar(
        x,
        y,
        [100 * one.stderr for one in members],
        fmt="o",
        color="#c8442c",
        ecolor="#c8442c",
        elinewidth=0.7,
        capsize=2,
        ms=7,
        label="Pareto front",
    )
    for one in every:
        if one.method == UNTOUCHED:  # never trained, so it has no place on the axis of training memory
            axes.axhline(100 * one.score, color="#2f6fbb", lw=1, ls="--", label=LABELS[UNTOUCHED])
        elif one.reference or one.method in ("qpruner1", "qpruner2"):
            axes.annotate(
                LABELS.get(one.method, one.method),
                (one.memory / GIB, 100 * one.score),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
            )
    source = members[0].source if members else "predicted"
    axes.set_xlabel(f"peak memory of recovery, GiB ({source})")
    axes.set_ylabel(f"{'mean accuracy' if objective == 'accuracy' else objective}, % (± 1 standard error)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


UNTOUCHED = "dense"
LABELS = {
    "dense": "untouched",
    "llm_pruner": "LLM-Pruner (16-bit)",
    "uniform8": "uniform 8-bit",
    "qpruner1": "QPruner1",
    "qpruner2": "QPruner2",
    "qpruner3": "QPruner3",
}


def _page(every: Sequence[Point], members: Sequence[Point], objective: str, path: Path) -> None:
    from plotly import graph_objects

    inside = {one.run_id for one in members}
    groups = {
        "Pareto front": members,
        "trial": [one for one in every if one.run_id not in inside and not one.reference],
        "reference": [one for one in every if one.reference and one.method != UNTOUCHED],
    }
    figure = graph_objects.Figure()
    for label, group in groups.items():
        figure.add_scatter(
            x=[one.memory / GIB for one in group],
            y=[100 * one.score for one in group],
            error_y={"array": [100 * one.stderr for one in group], "thickness": 1},
            mode="markers+lines" if label == "Pareto front" else "markers",
            line={"shape": "hv"},
            name=label,
            text=[f"{one.name}<br>{one.method}<br>{one.bits}<br>{one.run_id}" for one in group],
        )
    for one in every:
        if one.method == UNTOUCHED:
            figure.add_hline(y=100 * one.score, line_dash="dash", annotation_text=LABELS[UNTOUCHED])
    figure.update_layout(
        title="Pareto front",
        template="simple_white",
        xaxis_title="peak memory, GiB",
        yaxis_title=f"{objective}, %",
    )
    figure.write_html(path, include_plotlyjs=True)
