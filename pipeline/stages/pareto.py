"""Stage ``pareto``: the front, queried from the MLflow runs of the latest study.

Reads ``reports/search.json``, ``reports/importance.json`` and the trials' runs. Writes ``reports/pareto.csv``,
``pareto.json`` and the pictures of the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline import tracking
from pipeline.params import Params
from pipeline.paths import REPORTS
from pipeline.results import report
from pipeline.search import pareto
from pipeline.stages.shell import made
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    every, members = front(params)
    inside = {member.run_id for member in members}
    for point in every:
        if not point.reference:
            tracking.set_tag(point.run_id, "pareto", "true" if point.run_id in inside else "false")
            tracking.set_tag(point.run_id, "pareto_probability", f"{point.probability:.2f}")
    for path in report.write_front(every, members, params.pareto.objective, REPORTS):
        run.artifact(path)
    run.metrics({"front_size": len(members), "trials": sum(not point.reference for point in every)})


def front(params: Params) -> tuple[list[Any], list[Any]]:
    """Return (all points, the judged front) of the latest study."""
    (every,) = compared([params.pareto.objective])
    trials = [point for point in every if not point.reference]
    return every, pareto.judge(pareto.front(trials), trials, made("importance")["sensitivity"])


def compared(objectives: Sequence[str]) -> list[list[Any]]:
    """Return the latest study's points for each objective, compared item by item, from MLflow."""
    runs = tracking.trials(made("search")["study"])
    records = {run.run_id: tracking.items(run) for run in runs if run.status == "FINISHED"}
    found = []
    for objective in objectives:
        points = pareto.points(runs, objective)
        found.append(pareto.compared(points, [records[point.run_id] for point in points], objective))
    return found
