"""What commands ``table`` and ``ablation`` share: cells that run, are kept, and are taken up again.

A cell's result stands in ``artifacts/table/cells``, named by a digest of all that defines it, and is written before its
run ends. A command that was killed at any moment goes on with every finished cell and trial.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import bits, console, device, fits, storage, tracking
from pipeline.data import definitions
from pipeline.errors import UserError
from pipeline.identity import TRIAL, Identity, code
from pipeline.params import Params, ParamsError, flatten
from pipeline.paths import ALPACA, BASE, BENCHMARKS, REPORTS
from pipeline.results import cells, labels
from pipeline.results.cells import VARIANT, Cell, Outcome
from pipeline.search import pareto, search
from pipeline.search.history import import_history
from pipeline.search.search import Settings
from pipeline.search.study import Study
from pipeline.stages import further, trials
from pipeline.stages.agreement import verified_runs
from pipeline.stages.attempts import Attempts
from pipeline.stages.recorder import (
    Recorder,
    log_result,
    search_settings,
    steps,
    study_identity,
    told,
    unfinished,
)
from pipeline.stages.supplies import KEPT, Supplies, read_json
from pipeline.stages.work import answers_of, crew
from pipeline.tracking import Run
from pipeline.trial import trial
from pipeline.trial.result import Result

AGAIN = "Mend the cause and run the same command: finished cells and trials are kept"


class CellsFailed(UserError):
    """Some cells failed: which, why, and what to do."""


class Cells:
    """Runs cells below a command's run, and keeps each finished one on disk and in MLflow.

    Args:
        run: The command's run.
        params: Its params.
        ratios: The pruning ratios that cells with the params' other settings will need.

    Raises:
        ParamsError: The search's trials would see every item of a task, so that none is left to judge on.
    """

    def __init__(self, run: Run, params: Params, ratios: Sequence[float] = ()):
        self.run, self.params, self.ratios = run, params, ratios
        self.command = tracking.run(run.run_id).tags["stage"]
        storage.verify(BASE, "fetch")
        check_held_out(params)
        self.origin = {
            "base": storage.sha256(BASE / storage.CHECKSUMS),
            "alpaca": run.dataset(ALPACA, "alpaca", "training"),
            "items": [run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation") for task in params.evaluate.tasks],
            "compute": str(device.choose(params.device, params.dtype)),
        }
        self._supplies: Supplies | None = None

    def all(self, wanted: Sequence[Cell], write: Callable[[Sequence[Outcome]], object]) -> list[Outcome]:
        """Run cells in their order, each different one once; ``write`` the table after each."""
        outcomes = [Outcome(cell) for cell in wanted]
        done: dict[str, Outcome] = {}
        for index, cell in enumerate(wanted):
            key = self.key(cell)
            if key not in done:
                done[key] = self.outcome(cell, f"cell {index + 1}/{len(wanted)}: {cell.title}")
            outcomes[index] = done[key]
            write(outcomes)
        return outcomes

    def key(self, cell: Cell) -> str:
        """Return the name of a cell on this data and device."""
        return cells.key(cell, self._origin(cell))

    def outcome(self, cell: Cell, label: str) -> Outcome:
        """Return a cell's outcome: kept from before, or run now; its failure is recorded, not raised."""
        key = self.key(cell)
        kept = read_json(path_of(key), {"run_id", "study", "result"})
        if kept is not None:
            result = Result.from_json(kept["result"])
            console.note(f"{label}: kept from before")
            return Outcome(cell, result, run_id=self._agree(cell, key, kept, result))
        cell_run = self._open(cell, key)
        console.note(label)
        try:
            result, study = self._compute(cell, cell_run, label)
        except Exception as error:  # whatever it is, the other cells go on; its traceback is in its run
            cell_run.finish("FAILED", error)
            console.note(f"{label} failed: {type(error).__name__}: {error}")
            return Outcome(cell, error=f"{type(error).__name__}: {error}", run_id=cell_run.run_id)
        record = {
            "title": cell.title,
            "run_id": cell_run.run_id,
            "study": study,
            "result": result.as_json(),
            "definition": cells.definition(cell, self._origin(cell)),
        }
        storage.write_text(path_of(key), json.dumps(record, indent=1))
        _log(cell_run, cell, result, study)
        cell_run.finish()
        console.note(told(label, result))
        return Outcome(cell, result, run_id=cell_run.run_id)

    def _open(self, cell: Cell, key: str) -> Run:
        tags = {"stage": "cell", "cell": key, "command": _owner(cell), "method": cell.row}
        opened = self.run.child(cell.title, tags)
        params = cell.params
        shown = {"method": cell.row, "steps": params.table.steps, "limit": params.table.limit}
        opened.params(shown | {"skip": params.evaluate.limit, "granularity": params.search.granularity})
        opened.params(flatten(params.prune, "prune.") | flatten(params.quantize, "quantize."))
        return opened

    def _agree(self, cell: Cell, key: str, kept: Mapping[str, Any], result: Result) -> str:
        """Give a finished cell its finished run below its command's newest run, whatever the store holds of it."""
        finished = [tracked.run_id for tracked in tracking.tagged("cell", key) if tracked.status == "FINISHED"]
        if finished:
            run_id = finished[-1]
        else:  # a kill came before the run's end, or the store is another one
            reopened = tracking.reopen(kept["run_id"]) or self._open(cell, key)
            _log(reopened, cell, result, kept["study"])
            if kept["study"]:
                settings = search_settings(cell.params, len(result.vector.bits))
                study = _study(Identity(**kept["study"]), settings)
                Recorder(reopened, study, cell.params).agree()
            reopened.finish()
            run_id = reopened.run_id
        if _owner(cell) == self.command:
            tracking.move(run_id, self.run)
        return run_id

    def _origin(self, cell: Cell) -> Mapping[str, object]:
        """Return what a cell's result depends on besides its params: base model, data, compute type and code."""
        beside = {"further": part} if (part := further.named(cell.params)) else {}
        return self.origin | {"code": _code_behind(cell)} | beside

    def _compute(self, cell: Cell, cell_run: Run, label: str) -> tuple[Result, dict[str, str] | None]:
        """Run one cell; return its result and the identity of its study, if it held one."""
        params, supplies = cell.params, self._supplied(cell.params)
        vector, study = _bits(cell, cell_run, supplies)
        work = trial.Work(params.table.steps, params.table.limit, params.evaluate.limit, further=True)
        if cell.row == labels.UNTOUCHED:
            return trials.untouched(params, supplies.context, work), study
        result, _ = trial.run(supplies.context, vector, work, progress=steps(label), keep=unfinished(self.key(cell)))
        return result, study

    def _supplied(self, params: Params) -> Supplies:
        """Return what cells of these params need; the last ones' stay loaded."""
        if self._supplies is None or self._supplies.params != params:
            self._supplies = None  # its tensors go before the next ones come
            self._supplies = Supplies(params, self.ratios)
        return self._supplies


def _owner(cell: Cell) -> str:
    """Return the command below whose run a cell's run stands."""
    return "ablation" if cell.row == VARIANT else "table"


def _code_behind(cell: Cell) -> str:
    """Return the digest of the code that a cell's result depends on."""
    if cell.row == labels.UNTOUCHED:
        return code(*TRIAL)
    roots = [*TRIAL, "pipeline.stages.prune", "pipeline.stages.quantize"]
    if cell.row == "qpruner2":
        roots += ["pipeline.stages.importance", "pipeline.search.allocate"]
    elif cell.row == "qpruner3":
        roots += ["pipeline.stages.importance", "pipeline.search.search", "pipeline.search.pareto"]
    return code(*roots)


def _log(cell_run: Run, cell: Cell, result: Result, study: Mapping[str, str] | None) -> None:
    cell_run.params({"bits": bits.grouped(result.bits, fits.units_a_block(cell.params.search.granularity))})
    cell_run.tags({"bits": result.bits} | ({"study_digest": Identity(**study).name} if study else {}))
    log_result(cell_run, cell.title, result)


def path_of(key: str) -> Path:
    """Return where a finished cell is kept."""
    return KEPT / "cells" / f"{key}.json"


# --- the bits of a cell ------------------------------------------------------------------------------------------


def _bits(cell: Cell, cell_run: Run, supplies: Supplies) -> tuple[tuple[int, ...], dict[str, str] | None]:
    """Return a cell's bit vector, and the identity of the study that found it, if one did."""
    units = len(supplies.context.units)
    if cell.bits is not None:
        return bits.parse(cell.bits, units), None
    if cell.row in (labels.UNTOUCHED, "llm_pruner"):
        return (bits.DENSE,) * units, None
    if cell.row == "qpruner1":
        return (4,) * units, None
    if cell.row == "qpruner2":
        space = supplies.spaces.at[cell.params.prune.ratio]
        return space.allocate(supplies.priors.mutual_information), None
    return _searched(supplies, cell_run)


def _searched(supplies: Supplies, cell_run: Run) -> tuple[tuple[int, ...], dict[str, str]]:
    """Hold QPruner3's search below its cell's run; return the best vector and the study's identity."""
    params = cells.changed(supplies.params, "search", n_trials=supplies.params.table.n_trials)
    units, ratio = len(supplies.context.units), params.prune.ratio
    settings = search_settings(params, units)
    history = import_history(params.search.history, units, [ratio], settings.objective, params.search.bits)
    identity = study_identity(params, (supplies.pruned, supplies.bank), prefix="table-")
    study = _study(identity, settings)
    cell_run.tags({"study_digest": study.name, "journal": study.journal})
    recorder = Recorder(cell_run, study, params, supplies.spaces)
    problem = search.Problem(supplies.spaces, {ratio: supplies.priors}, history)
    recorder.announce()
    recorder.take_up(answers_of(study))
    recorder.agree()
    screen = console.Search(params.search.n_trials)
    with screen, tracking.patient(), crew(params, supplies.contexts, study, screen) as hands:
        search.run(study, settings, problem, Attempts(recorder, hands, screen))
    runs = verified_runs(study.name, study.journal, study.finished())
    points = pareto.points(runs, settings.objective, settings.memory)
    members = pareto.judge(pareto.front(points), points, problem.beliefs)
    return pareto.best(members).vector.bits, asdict(identity)  # as ``build`` chooses


def _study(identity: Identity, settings: Settings) -> Study:
    return Study(KEPT / "study", identity, settings.objective, settings.memory)


# --- what a command says and writes ------------------------------------------------------------------------------


def check_held_out(params: Params) -> None:
    """Refuse an ``evaluate.limit`` that leaves no item to judge cells on.

    Raises:
        ParamsError: Naming the tasks.
    """
    limit = params.evaluate.limit
    counts = {
        task: sum(bool(line) for line in (BENCHMARKS / f"{task}.jsonl").read_text(encoding="utf-8").split("\n"))
        for task in params.evaluate.tasks
    }
    if full := [f"{task} ({count})" for task, count in counts.items() if not 0 < limit < count]:
        seen = f"the first {limit}" if limit else "all"
        raise ParamsError(
            f"evaluate.limit: {limit} lets a search's trials see {seen} items of a task, which leaves none to judge "
            f"the table's cells on in {', '.join(full)}; set it to between 1 and {min(counts.values()) - 1}"
        )


def facts(params: Params, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what a reader must know of the figures."""
    normalized = [labels.task(task) for task in params.evaluate.tasks if definitions.metric(task) == "acc_norm"]
    judged = f"up to {params.table.limit} items" if params.table.limit else "all items"
    sources = {outcome.result.memory_source for outcome in outcomes if outcome.result}
    return [
        f"model: {params.model.source}; seed {params.seed}",
        f"recovery in {params.table.steps} steps; judged on {judged} of a task after its first {params.evaluate.limit}",
        f"QPruner3: the best of {params.table.n_trials} trials of {params.recover.steps} steps by "
        f"{params.search.objective} on those first items",
        f"zero-shot accuracy in %, ± one standard error; acc_norm for {', '.join(normalized) or 'none'}, acc for the "
        f"others; lm-eval {version('lm-eval')}",
        "gold log-prob.: mean log-probability of the right choice, in nats",
        f"memory: peaks of training and of inference, {' and '.join(sorted(sources)) or 'not known yet'}",
    ]


def write_pages(name: str, pages: Mapping[str, str]) -> list[Path]:
    """Write a table's pages, ending -> text, into the reports; return the paths."""
    for ending, text in pages.items():
        storage.write_text(REPORTS / f"{name}.{ending}", text)
    return [REPORTS / f"{name}.{ending}" for ending in pages]


def end(run: Run, outcomes: Sequence[Outcome], paths: Sequence[Path]) -> None:
    """Log the pages, say where they are.

    Raises:
        CellsFailed: Some cells failed.
    """
    for path in paths:
        run.artifact(path)
    run.metrics({"cells": len(outcomes), "failed": sum(bool(outcome.error) for outcome in outcomes)})
    console.note("written: " + ", ".join(map(str, paths)))
    if failed := [f"{outcome.cell.title} ({outcome.error})" for outcome in outcomes if outcome.error]:
        raise CellsFailed(f"{len(failed)} of {len(outcomes)} cells failed: {'; '.join(failed)}. {AGAIN}")
