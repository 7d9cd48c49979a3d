"""Dominance, the front, its hypervolume and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import pandas as pd

from pipeline import GIB
from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.search import SearchError, paired

if TYPE_CHECKING:
    from pipeline.search.surrogate import Belief

PEAKS = {"training": "peak_memory_bytes", "inference": "inference_memory_bytes"}  # the metrics of the two peaks


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
        memory: The peak bytes that count, lower is better; nan for those of training of a model that is not trained.
        source: ``measured`` or ``predicted``.
        reference: Whether it stands outside the front.
        metrics: All its metrics.
        ratio: The share of the parameters that was pruned.
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
    ratio: float = 0.0
    paired: float | None = None
    expected: float | None = None
    probability: float | None = None

    @property
    def vector(self) -> Vector:
        """Return its ratio and its bits."""
        return Vector(self.ratio, bit_text.read(self.bits))


class _Run(Protocol):
    """What is read of a run, such as ``tracking.Tracked``: tracking stands above this room."""

    @property
    def run_id(self) -> str: ...

    @property
    def status(self) -> str: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def tags(self) -> Mapping[str, str]: ...


def points(runs: Sequence[_Run], objective: str, memory: str = "training") -> list[Point]:
    """Return the points of one study's MLflow runs; unfinished and failed ones are left out.

    Args:
        runs: As ``tracking.trials`` returns them.
        objective: An objective of section ``search``, or a benchmark's name.
        memory: The peak that counts: ``training`` or ``inference``.
    """
    finished = []
    for run in runs:
        metrics, tags = run.metrics, run.tags
        if run.status != "FINISHED" or objective not in metrics:
            continue
        finished.append(
            Point(
                run_id=run.run_id,
                name=tags["name"],
                method=tags["method"],
                bits=tags["bits"],
                ratio=float(tags["ratio"]),
                score=metrics[objective],
                stderr=metrics[f"{objective}_stderr"],
                memory=metrics.get(PEAKS[memory], math.nan),
                source=tags["memory_source"],
                reference=tags["stage"] == "reference",
                metrics=dict(metrics),
            )
        )
    return finished


def dominates(point: Point, other: Point) -> bool:
    """Return whether a point is no worse in both objectives and better in one."""
    no_worse = point.score >= other.score and point.memory <= other.memory
    return no_worse and (point.score > other.score or point.memory < other.memory)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one dominates, lowest memory first; equal points all stay."""
    members: list[Point] = []
    for point in sorted(points, key=lambda point: (point.memory, -point.score, point.run_id)):
        # Nothing that follows needs less memory, so the last member is the only one that can dominate this point.
        if not members or not dominates(members[-1], point):
            members.append(point)
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
    for score, memory in sorted(members, key=lambda member: (member[1], -member[0])):
        if score > best and memory < worst_memory:
            area += (score - best) * (worst_memory - memory)
            best = score
    return area


def growth(points: Sequence[tuple[float, float]], reach: float, known: int = 0) -> list[float]:
    """Return the front's hypervolume after each trial of a search, in units of the score times GiB.

    Args:
        points: (score, bytes) of the finished trials in their order. The first is where the gain begins: the smallest.
        reach: Bytes beyond the first one's in which gains count.
        known: First trials that are left out.
    """
    counts = range(known + 1, len(points) + 1)
    return [hypervolume(points[:n], points[0][0], points[0][1] + reach) / GIB for n in counts]


def compared(points: Sequence[Point], records: Sequence[paired.Items], objective: str) -> list[Point]:
    """Return the points with their paired errors and their probabilities of being on the front, among all trials.

    Args:
        points: All points of a study.
        records: What each measured item by item (``paired``).
        objective: The points' own.
    """
    if not points:
        return []
    scores = paired.redrawn([paired.strata(record, objective) for record in records])
    among = [not point.reference for point in points]
    shares = iter(paired.undominated(scores[:, among], [point.memory for point in points if not point.reference]))
    return [
        replace(point, paired=float(error), probability=None if point.reference else float(next(shares)))
        for point, error in zip(points, paired.errors(scores, among), strict=True)
    ]


def judge(members: Sequence[Point], trials: Sequence[Point], beliefs: Mapping[float, Belief]) -> list[Point]:
    """Return the front's members with their expected scores.

    Args:
        members: The front.
        trials: All finished trials.
        beliefs: Of each ratio, as the search had them; the model that expects is its own, fitted on the trials.
    """
    if not members:
        return []
    from pipeline.search import surrogate  # scikit-learn takes long to import; pictures of trials need none of it

    tried = [surrogate.Observation(point.vector, point.score, point.stderr) for point in trials]
    expected, _ = surrogate.Model(tried, beliefs).predict([point.vector for point in members])
    return [replace(point, expected=float(value)) for point, value in zip(members, expected, strict=True)]


def best(members: Sequence[Point]) -> Point:
    """Return the member with the highest expected score; of equals, the one that needs least memory.

    The highest measured score is likely a lucky one; the expected score rests on all trials. A member that was not
    judged counts with its measured score.

    Raises:
        SearchError: There is none.
    """
    if not members:
        raise SearchError("the front is empty: no trial of the study has finished; run: mlflow run . -e search")
    return max(
        members, key=lambda member: (member.score if member.expected is None else member.expected, -member.memory)
    )


def table(points: Sequence[Point], members: Sequence[Point]) -> pd.DataFrame:
    """Return all points as a dataframe, members of the front first."""
    inside = {member.run_id for member in members}
    order = [*members, *(point for point in points if point.run_id not in inside)]
    return pd.DataFrame(
        {
            "front": [point.run_id in inside for point in order],
            "name": [point.name for point in order],
            "method": [point.method for point in order],
            "ratio": [point.ratio for point in order],
            "bits": [point.bits for point in order],
            "score": [point.score for point in order],
            "stderr": [point.stderr for point in order],
            "paired_stderr": [point.paired for point in order],
            "expected": [point.expected for point in order],
            "probability": [point.probability for point in order],
            "peak_memory_bytes": _bytes(order, "training"),
            "inference_memory_bytes": _bytes(order, "inference"),
            "memory_bytes": pd.array([point.memory for point in order], dtype="Int64"),
            "memory_source": [point.source for point in order],
            "run_id": [point.run_id for point in order],
        }
    )


def _bytes(points: Sequence[Point], peak: str) -> pd.api.extensions.ExtensionArray:
    """Return one of the two peaks of each point, in bytes."""
    return pd.array([point.metrics.get(PEAKS[peak], math.nan) for point in points], dtype="Int64")
