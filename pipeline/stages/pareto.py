"""Stage ``pareto``: the front, queried from the MLflow runs of this folder's search and verified against its journal.

Reads ``reports/search.json``, ``reports/importance.json``, the journal and the trials' runs. Writes
``reports/pareto.csv``, ``pareto.json`` and the pictures of the front. The runs get tag ``pareto`` and metric
``pareto_probability``.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import tracking
from pipeline.params import Params
from pipeline.paths import REPORTS, STUDY
from pipeline.results import report
from pipeline.search import pareto, search, study
from pipeline.search.pareto import Point
from pipeline.stages import priors
from pipeline.stages.agreement import verified_runs
from pipeline.stages.shell import made
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    points, members = front(params)
    inside = {member.run_id for member in members}
    for point in points:
        if not point.reference:
            tracking.set_tag(point.run_id, "pareto", "true" if point.run_id in inside else "false")
            if point.probability is not None:
                tracking.set_metric(point.run_id, "pareto_probability", point.probability)
    for path in report.write_front(points, members, params.pareto.objective, REPORTS, params.search.memory):
        run.artifact(path)
    run.metrics({"front_size": len(members), "trials": sum(not point.reference for point in points)})


def front(params: Params) -> tuple[list[Point], list[Point]]:
    """Return (all points, the judged front) of the latest study."""
    (points,) = compared([params.pareto.objective], params.search.memory)
    trials = [point for point in points if not point.reference]
    believed = search.beliefs(priors.read(params), params.search.bits)
    return points, pareto.judge(pareto.front(trials), trials, believed)


def compared(objectives: Sequence[str], memory: str) -> list[list[Point]]:
    """Return the latest study's points for each objective, compared item by item.

    Args:
        objectives: Their names.
        memory: The peak that counts.

    Raises:
        TrackingBehind: MLflow does not agree with the journal.
    """
    searched = made("search")
    kept = study.read(STUDY, searched["study"])
    runs = verified_runs(kept.name, kept.journal, kept.records)
    items = {run.run_id: record.values for run, record in zip(runs, kept.records, strict=True)}
    by_objective = []
    for objective in objectives:
        points = pareto.points(runs, objective, memory)
        by_objective.append(pareto.compared(points, [items[point.run_id] for point in points], objective))
    return by_objective
