"""Stage ``report``: one page with the table of methods, the front and the bits; and what the terminal shows of it.

Reads the reports of the stages before it and the trials' runs. Writes ``reports/report.md``, ``report.html`` and
pictures, which also become artifacts of the search's run.
"""

from __future__ import annotations

from pipeline import console, tracking
from pipeline.params import Params
from pipeline.paths import REPORTS
from pipeline.results import report
from pipeline.stages import pareto
from pipeline.stages.shell import made
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    searched, priors = made("search"), made("importance")
    every, members = pareto.front(params)
    report.heat_map(members, priors["units"], REPORTS / "bits.png")
    methods, tasks = report.methods(every, members), params.evaluate.tasks
    report.accuracy_and_memory({"": report.bars_of(methods, tasks)}, tasks, REPORTS / "methods.png")
    report.benchmark_fronts(dict(zip(tasks, pareto.compared(tasks), strict=True)), REPORTS / "benchmarks.png")
    facts = [
        f"model: {params.model.source}; pruned by {100 * made('prune')['ratio']:.1f} %",
        f"study {searched['study']}: {searched['finished']} finished trials, {len(members)} on the front",
        f"peak memory is {members[0].source if members else 'predicted'}; ± is one standard error",
    ]
    tables = [
        ("Methods", *report.method_table(methods, tasks)),
        ("Pareto front", *report.front_table(members, params.pareto.objective)),
    ]
    pictures = {
        "Quality against peak memory": REPORTS / "pareto.png",
        "Accuracy (bars) and peak memory (markers) of each method": REPORTS / "methods.png",
        "Accuracy against peak memory, each benchmark with its own front": REPORTS / "benchmarks.png",
        "Bits of the front's members": REPORTS / "bits.png",
        "Importance of the units": REPORTS / "importance.png",
    }
    written = report.write(tables, facts, pictures, REPORTS)
    owner = tracking.reopen(searched["search_run"]) or run
    for path in [*written, *pictures.values()]:
        owner.artifact(path, "report")


def show(params: Params) -> None:
    """Print the table of methods, the front and the command that opens it in the MLflow UI."""
    study = made("search")["study"]
    every, members = pareto.front(params)
    columns, rows = report.method_table(report.methods(every, members), ())
    console.table("Methods", columns, rows)
    columns, rows = report.front_table(members, params.pareto.objective, console.BITS)
    console.table("Pareto front: lowest memory first", columns, rows)
    experiment = tracking.run(members[0].run_id).experiment_id if members else tracking.experiment_id()
    console.note(
        "See every trial, best first, in the MLflow UI:\n"
        + tracking.ui_command(experiment, study, params.pareto.objective)
    )
    console.note(f"One page with tables and pictures: {REPORTS / 'report.html'}")
