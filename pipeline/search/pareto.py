"""Dominance, the front, its hypervolume, and how sure it is; the front as tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import GIB
from pipeline import bits as bit_text
from pipeline.search import SearchError, paired, surrogate
from pipeline.search.surrogate import Observation


@dataclass(frozen=True)
class Point:
    """One finished trial or reference row, as MLflow has it.

    Attributes:
        run_id: Its run.
        name: What it is called: ``trial 3``, or a reference's name.
        method: ``qpruner1``, ``qpruner2``, ``sensitivity``, ``random``, ``sampler``, ... or a reference's name.
        bits: Its bit string.
        score: The objective, higher is better.
        stderr: Its standard error.
        memory: Peak bytes of training, lower is better; nan for the untouched model, which is not trained.
        source: ``measured`` or ``predicted``.
        reference: Whether it stands outside the front.
        metrics: All its metrics.
        paired: The standard error of its score without what other items would change in all trials alike.
        expected: For a member of the front, the score that the search's model expects of its vector.
        probability: Of a trial, how probably no other one dominates it.
    """

    run_id: str
    name: str
    method: str
    bits: str
    score: float
    stderr: float
    memory: float
    source: str
    reference: bool
    metrics: dict[str, float]
    paired: float | None = None
    expected: float | None = None
    probability: float | None = None


def points(runs: Sequence[Any], objective: str) -> list[Point]:
    """Return the points of one study's MLflow runs; unfinished and failed ones are left out.

    Args:
        runs: As ``tracking.trials`` returns them.
        objective: An objective of section ``search``, or a benchmark's name.
    """
    found = []
    for run in runs:
        metrics, tags = run.metrics, run.tags
        if run.status != "FINISHED" or objective not in metrics:
            continue
        found.append(
            Point(
                run_id=run.run_id,
                name=tags["name"],
                method=tags["method"],
                bits=tags["bits"],
                score=metrics[objective],
                stderr=metrics[f"{objective}_stderr"],
                memory=metrics.get("peak_memory_bytes", math.nan),
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


def hypervolume(members: Iterable[tuple[float, float]], worst_score: float, worst_memory: float) -> float:
    """Return the area that a front dominates, down to a reference point.

    Args:
        members: (score, memory) of any points; dominated ones add nothing.
        worst_score: Score of the reference point.
        worst_memory: Memory of the reference point in bytes.

    Returns:
        Sum over the front of score gained times memory saved, in bytes.
    """
    area, best = 0.0, worst_score
    for score, memory in sorted(members, key=lambda one: (one[1], -one[0])):
        if score > best and memory < worst_memory:
            area += (score - best) * (worst_memory - memory)
            best = score
    return area


def growth(points: Sequence[tuple[float, float]], reach: float, known: int = 0) -> list[float]:
    """Return the front's hypervolume after each trial of a search, in units of the score times GiB.

    Args:
        points: (score, bytes) of the finished trials in their order. The first is where the gain begins: all at 4 bits.
        reach: Bytes beyond the first one's in which gains count.
        known: First trials that are left out.
    """
    counts = range(known + 1, len(points) + 1)
    return [hypervolume(points[:n], points[0][0], points[0][1] + reach) / GIB for n in counts]


def compared(every: Sequence[Point], records: Sequence[Mapping[str, Any]], objective: str) -> list[Point]:
    """Return the points with their paired errors and their probabilities of being on the front, among all trials.

    Args:
        every: All points of a study.
        records: What each measured item by item (``paired``).
        objective: The points' own.
    """
    if not every:
        return []
    scores = paired.redrawn([paired.strata(record, objective) for record in records])
    own = [not one.reference for one in every]
    shares = iter(paired.undominated(scores[:, own], [one.memory for one in every if not one.reference]))
    return [
        replace(one, paired=float(error), probability=None if one.reference else float(next(shares)))
        for one, error in zip(every, paired.errors(scores, own), strict=True)
    ]


def judge(members: Sequence[Point], trials: Sequence[Point], prior: Sequence[float]) -> list[Point]:
    """Return the front's members with their expected scores.

    Args:
        members: The front.
        trials: All finished trials.
        prior: Sensitivity of each unit; the model that expects is the search's own, fitted on the trials.
    """
    if not members:
        return []
    tried = [Observation(_bits(one), one.score, one.stderr) for one in trials]
    expected, _ = surrogate.Model(tried, prior).predict(surrogate.raised_of([_bits(one) for one in members]))
    return [replace(one, expected=float(value)) for one, value in zip(members, expected, strict=True)]


def _bits(one: Point) -> tuple[int, ...]:
    return bit_text.parse(one.bits, len(one.bits))


def best(members: Sequence[Point]) -> Point:
    """Return the member with the highest expected score; of equals, the one that needs least memory.

    The highest measured score is likely a lucky one; the expected score rests on all trials. A member that was not
    judged counts with its measured score.

    Raises:
        SearchError: There is none.
    """
    if not members:
        raise SearchError("the front is empty: no trial of the study has finished; run: mlflow run . -e search")
    return max(members, key=lambda one: (one.score if one.expected is None else one.expected, -one.memory))


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
            "paired_stderr": [one.paired for one in order],
            "expected": [one.expected for one in order],
            "probability": [one.probability for one in order],
            "peak_memory_bytes": pd.array([one.memory for one in order], dtype="Int64"),
            "memory_source": [one.source for one in order],
            "run_id": [one.run_id for one in order],
        }
    )


def write(every: Sequence[Point], members: Sequence[Point], objective: str, folder: Path) -> list[Path]:
    """Write the front as CSV, JSON (rows for DVC's plots), PNG and self-contained HTML; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(every, members)
    rows.to_csv(folder / "pareto.csv", index=False)
    plain = rows.astype(object).where(rows.notna(), None)  # JSON knows no NaN
    (folder / "pareto.json").write_text(json.dumps(plain.to_dict(orient="records"), indent=1))
    _picture(every, members, objective, folder / "pareto.png")
    _page(every, members, objective, folder / "pareto.html")
    return [folder / f"pareto.{ending}" for ending in ("csv", "json", "png", "html")]


def scale(objective: str) -> tuple[float, str]:
    """Return by what an objective is multiplied to be shown, and its name with the unit."""
    if objective in LOGPROBS:
        return 1.0, f"log-probability of {LOGPROBS[objective]}, nats"
    return 100.0, f"{'mean accuracy' if objective == 'accuracy' else objective}, %"


def error(one: Point) -> float:
    """Return the error that a point is shown with: what tells it from other trials, where that is known."""
    return one.stderr if one.paired is None else one.paired


def _picture(every: Sequence[Point], members: Sequence[Point], objective: str, path: Path) -> None:
    from matplotlib import pyplot

    factor, label_of_score = scale(objective)
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
                [factor * one.score for one in group],
                [factor * error(one) for one in group],
                fmt=marker,
                color=color,
                ecolor=color,
                elinewidth=0.7,
                alpha=0.75,
                capsize=2,
                ms=5,
                label=label,
            )
    x, y = [one.memory / GIB for one in members], [factor * one.score for one in members]
    axes.step(x, y, where="post", color="#c8442c", lw=1, alpha=0.6)
    axes.errorbar(
        x,
        y,
        [factor * error(one) for one in members],
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
            axes.axhline(factor * one.score, color="#2f6fbb", lw=1, ls="--", label=LABELS[UNTOUCHED])
    named = [one for one in every if one.method in LABELS and one.method != UNTOUCHED]
    for place, one in enumerate(sorted(named, key=lambda one: one.memory)):
        axes.annotate(
            LABELS[one.method],
            (one.memory / GIB, factor * one.score),
            # Neighbours below and above; a label to the left goes up first, to pass over no marker on its way.
            xytext=(-14, (18, -22)[place % 2]) if one.reference else (14, (-22, 18)[place % 2]),
            ha="right" if one.reference else "left",
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.3", "shrinkA": 0, "shrinkB": 3},  # to its own point
            fontsize=8,
            bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1},  # over a neighbour's error bar
        )
    source = members[0].source if members else "predicted"
    axes.set_xlabel(f"peak memory of recovery, GiB ({source})")
    axes.set_ylabel(label_of_score)
    axes.set_title("± 1 standard error of the differences between trials, which answer the same items", fontsize=8)
    axes.margins(y=0.12)  # room for the lowest point's label
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


UNTOUCHED = "dense"
LOGPROBS = {"gold_logprob": "the gold answer", "response_logprob": "a held-out token"}
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

    factor, label_of_score = scale(objective)
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
            y=[factor * one.score for one in group],
            error_y={"array": [factor * error(one) for one in group], "thickness": 1},
            mode="markers+lines" if label == "Pareto front" else "markers",
            line={"shape": "hv"},
            name=label,
            text=[f"{one.name}<br>{one.method}<br>{one.bits}<br>{one.run_id}" for one in group],
        )
    for one in every:
        if one.method == UNTOUCHED:
            figure.add_hline(y=factor * one.score, line_dash="dash", annotation_text=LABELS[UNTOUCHED])
    figure.update_layout(
        title="Pareto front",
        template="simple_white",
        xaxis_title="peak memory, GiB",
        yaxis_title=label_of_score,
    )
    figure.write_html(path, include_plotlyjs=True)
