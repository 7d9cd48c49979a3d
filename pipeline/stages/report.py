"""Stage ``report``: one page with methods, front, built model and pictures; and what the terminal shows of it.

Reads the reports of the stages before it, ``artifacts/final`` and the trials' runs. Writes ``reports/report.md``,
``report.html`` and pictures, which also become artifacts of the search's run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import console, storage, tracking
from pipeline.params import Params
from pipeline.paths import BASE, FINAL, REPORTS
from pipeline.results import choice, figures, labels, report, running
from pipeline.results.choice import Built
from pipeline.results.pages import Section
from pipeline.search.pareto import Point
from pipeline.stages import pareto, priors
from pipeline.stages.shell import made
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    searched, objective, memory = made("search"), params.pareto.objective, params.search.memory
    units = next(iter(priors.read(params).values())).units
    points, members = pareto.front(params)
    figures.heat_map(members, units, REPORTS / "bits.png")
    methods, tasks = report.methods(points, members), params.evaluate.tasks
    figures.accuracy_and_memory({"": report.bars_of(methods, tasks)}, tasks, REPORTS / "methods.png")
    by_task = dict(zip(tasks, pareto.compared(tasks, memory), strict=True))
    figures.benchmark_fronts(by_task, REPORTS / "benchmarks.png", memory)
    facts = [
        f"model: {params.model.source}; {', '.join(map(labels.ratio, params.prune.ratios))}",
        f"study {searched['study']}: {searched['finished']} finished trials, {len(members)} on the front",
        f"peak memory is {members[0].source if members else 'predicted'}; ± is one standard error",
    ]
    sections = [
        Section("Methods", table=report.method_table(methods)),
        Section("Accuracy in each benchmark, %", table=report.benchmark_table(methods, tasks)),
        Section("Pareto front, lowest memory first", table=report.front_table(members, objective)),
    ]
    if len(params.prune.ratios) > 1 and members:
        sections.insert(0, Section("What to choose", table=report.budgets(members, objective)))
    if built := _built(points):
        sections.insert(0, choice.section(built, points, members, objective))
        if (REPORTS / "export.json").exists():
            sections.insert(1, running.section(made("export"), built.figures, points))
    pictures = {
        "Quality against peak memory": REPORTS / "pareto.png",
        "Accuracy (bars) and peak memory (markers) of each method": REPORTS / "methods.png",
        "Accuracy against peak memory, each benchmark with its own front": REPORTS / "benchmarks.png",
        "Bits of the front's members": REPORTS / "bits.png",
        "Importance of the units": REPORTS / "importance.png",
    }
    written = report.write(facts, sections, pictures, REPORTS)
    owner = tracking.reopen(searched["search_run"]) or run
    for path in [*written, *pictures.values()]:
        owner.artifact(path, "report")


def show(params: Params) -> None:
    """Print methods, front and built model, and how to see more of them."""
    study, objective = made("search")["study"], params.pareto.objective
    points, members = pareto.front(params)
    shown = [report.method_table(report.methods(points, members)), report.front_table(members, objective)]
    if len(params.prune.ratios) > 1 and members:
        shown.append(report.budgets(members, objective))
    for table in shown:
        console.table(table.title, table.columns, table.texts)
    experiment = tracking.run(members[0].run_id).experiment_id if members else tracking.experiment_id()
    console.note("See every trial, best first, in the MLflow UI:\n" + tracking.ui_command(experiment, study, objective))
    console.note(f"One page with tables and pictures: {REPORTS / 'report.html'}")
    if built := _built(points):
        section = choice.section(built, points, members, objective)
        assert section.table is not None
        console.table(section.title, section.table.columns, section.table.texts)
        for line in section.lines:
            console.note(line)
        if section.code:
            console.note(f"Ask it something:\n{section.code}")


def _built(points: Sequence[Point]) -> Built | None:
    """Return what is known of the built model; None while nothing is built from this study."""
    if not (REPORTS / "build.json").exists() or not (FINAL / "lineage.json").exists():
        return None
    chosen = storage.read_json(FINAL / "lineage.json", "build")["chosen_run"]
    if chosen in {point.run_id for point in points}:
        run_id = chosen
    elif chosen.startswith("none"):  # build.choose is a bit string
        run_id = ""
    else:
        return None  # of an earlier study
    evaluated = made("evaluate") if (REPORTS / "evaluate.json").exists() else {}
    registered = made("register") if (REPORTS / "register.json").exists() else {}
    sizes = {name: _size(folder) for name, folder in (("untouched", BASE), ("built", FINAL)) if folder.exists()}
    return Built(
        run_id=run_id,
        figures=made("build"),
        held_out=evaluated,
        sizes=sizes,
        model=registered.get("model", ""),
        alias=registered.get("alias") or "",
    )


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
