"""The paper's results as commands: ``table`` (tables 1 and 3, figure 1) and ``ablation`` (table 2).

Both run cells (``cells.py``). Under ``artifacts/table`` they keep what a cell needs and what it gave: pruned models,
layer banks and importances, each named by a digest of what defines it; the searches' journal; and a JSON file for each
finished cell, written before its run ends. A command killed at any moment goes on with every finished cell and trial.
They write ``reports/table.*`` and ``reports/ablation.*`` after each cell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import bits as bit_text
from pipeline import console, storage, tracking
from pipeline.data import definitions
from pipeline.errors import UserError
from pipeline.params import Params, digest, flatten
from pipeline.paths import ALPACA, BASE, BENCHMARKS, REPORTS
from pipeline.results.cells import VARIANT, Cell, Outcome
from pipeline.stages import importance, prune, quantize
from pipeline.stages.recorder import Recorder, log_result, say, steps, study_name, unfinished
from pipeline.tracking import Run

KEPT = Path("artifacts/table")


class CellsFailed(UserError):
    """Some cells failed: which, why, and what to do."""


def table(params: Params, run: Run) -> None:
    """Every method at every ratio: table 1, or table 3 with a 13B model, and figure 1."""
    from pipeline.results import cells
    from pipeline.results import table as table_

    cells_ = Cells(run, params, params.table.ratios)

    def write(outcomes: Sequence[Outcome]) -> list[Path]:
        tasks, facts = params.evaluate.tasks, _facts(params, outcomes)
        names = [{"ratio": one.cell.ratio, "method": one.cell.row} for one in outcomes]
        pages = {
            "md": table_.table_markdown(outcomes, tasks, facts),
            "tex": table_.table_latex(outcomes, tasks, "; ".join(facts)),
            "csv": table_.frame(outcomes, tasks, names).to_csv(index=False),
        }
        return _write("table", pages)

    outcomes = cells_.all(cells.cells(params), write)
    paths = [*write(outcomes), *_bars(outcomes, params)]
    head = ["ratio", "method", *table_.columns(())]
    rows = [[ratio, method, *map(str, row)] for ratio, method, row in table_.grid(outcomes, ())]
    console.table("Table 1", head, rows)
    _end(run, outcomes, paths)


def ablation(params: Params, run: Run) -> None:
    """One setting varied at a time under QPruner3's bits: table 2."""
    from pipeline.results import cells
    from pipeline.results import table as table_

    run.params(flatten(params.table, "table."))
    cells_ = Cells(run, params)
    at = cells.at_ratio(params, params.ablation.ratio)
    default = cells.qpruner3(at)
    first = cells_.outcome(default, "QPruner3")
    if first.result is None:
        raise CellsFailed(f"QPruner3, whose bits all variants take, failed: {first.error}. {_AGAIN}")
    made = cells.variants(default, first.result.bits)

    def write(outcomes: Sequence[Outcome]) -> list[Path]:
        tasks, facts = params.evaluate.tasks, _facts(params, outcomes)
        names = [{"factor": factor.title, "value": title} for factor, title, _ in made]
        pages = {
            "md": table_.ablation_markdown(made, outcomes, tasks, facts),
            "tex": table_.ablation_latex(made, outcomes, tasks, "; ".join(facts)),
            "csv": table_.frame(outcomes, tasks, names).to_csv(index=False),
        }
        return _write("ablation", pages)

    outcomes = cells_.all([cell for *_, cell in made], write)
    head = ["factor", "value", *table_.columns(())]
    rows = [
        [factor.title, title, *map(str, table_.entries(one, ()))]
        for (factor, title, _), one in zip(made, outcomes, strict=True)
    ]
    console.table("Table 2", head, rows)
    _end(run, outcomes, write(outcomes))


_AGAIN = "Mend the cause and run the same command: finished cells and trials are kept"


def _end(run: Run, outcomes: Sequence[Outcome], paths: Sequence[Path]) -> None:
    """Log the pages; end with an error that names the failed cells."""
    for path in paths:
        run.artifact(path)
    run.metrics({"cells": len(outcomes), "failed": sum(bool(one.error) for one in outcomes)})
    console.note("written: " + ", ".join(map(str, paths)))
    if failed := [f"{one.cell.title} ({one.error})" for one in outcomes if one.error]:
        raise CellsFailed(f"{len(failed)} of {len(outcomes)} cells failed: {'; '.join(failed)}. {_AGAIN}")


def _write(name: str, pages: dict[str, str]) -> list[Path]:
    for ending, text in pages.items():
        storage.write_text(REPORTS / f"{name}.{ending}", text)
    return [REPORTS / f"{name}.{ending}" for ending in pages]


def _facts(params: Params, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what a reader must know of the figures."""
    normalized = [task for task in params.evaluate.tasks if definitions.metric(task) == "acc_norm"]
    judged = f"up to {params.table.limit} items" if params.table.limit else "all items"
    sources = {one.result.memory_source for one in outcomes if one.result}
    return [
        f"model: {params.model.source}; seed {params.seed}",
        f"recovery in {params.table.steps} steps; judged on {judged} of a task after its first {params.evaluate.limit}",
        f"QPruner3: the best of {params.table.n_trials} trials of {params.recover.steps} steps by "
        f"{params.search.objective} on those first items",
        f"zero-shot accuracy in %, ± one standard error; acc_norm for {', '.join(normalized) or 'none'}, acc for the "
        f"others; lm-eval {version('lm-eval')}",
        "gold log-prob.: mean log-probability of the right choice, in nats",
        f"memory: peak of recovery, {' and '.join(sorted(sources)) or 'not known yet'}",
    ]


def _bars(outcomes: Sequence[Outcome], params: Params) -> list[Path]:
    """Draw figure 1 from the cells: 16-bit, uniform 4-bit and mixed, with their memory."""
    from pipeline.results import report
    from pipeline.search.pareto import LABELS

    panels = []
    for ratio in params.table.ratios:
        own = [one for one in outcomes if one.result and one.cell.ratio == ratio]
        bars = [
            report.Bars(LABELS[one.cell.row], one.result.tasks, one.result.peak_memory_bytes or 0)
            for one in own
            if one.result and one.cell.row in report.COMPARED
        ]
        panels.append((f"{100 * ratio:g} % pruned", bars))
    drawn = {title: bars for title, bars in panels if bars}
    if not drawn:
        return []
    report.accuracy_and_memory(drawn, params.evaluate.tasks, REPORTS / "figure1.png")
    return [REPORTS / "figure1.png"]


class Cells:
    """Runs cells below a command's run, and keeps each finished one on disk and in MLflow.

    Args:
        run: The command's run.
        params: Its params.
        ratios: The pruning ratios that cells with the params' other settings will need.

    Raises:
        ValueError: The search's trials would see every item of a task, so that none is left to judge on.
    """

    def __init__(self, run: Run, params: Params, ratios: Sequence[float] = ()):
        from pipeline import device

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

    def all(self, wanted: Sequence[Cell], write: Callable[[Sequence[Outcome]], Any]) -> list[Outcome]:
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
        from pipeline.results import cells

        return cells.key(cell, self.origin)

    def outcome(self, cell: Cell, label: str) -> Outcome:
        """Return a cell's outcome: kept from before, or run now; its failure is recorded, not raised."""
        from pipeline.results import cells
        from pipeline.trial.result import Result

        key = self.key(cell)
        kept = read(key)
        if kept is not None:
            result = Result.from_json(kept["result"])
            console.note(f"{label}: kept from before")
            return Outcome(cell, result, run_id=self._agree(cell, key, kept, result))
        own = self._open(cell, key)
        console.note(label)
        try:
            result, study = self._compute(cell, own, label)
        except Exception as error:
            own.finish("FAILED", error)
            console.note(f"{label} failed: {type(error).__name__}: {error}")
            return Outcome(cell, error=f"{type(error).__name__}: {error}", run_id=own.run_id)
        record = {
            "title": cell.title,
            "run_id": own.run_id,
            "study": study,
            "result": result.as_json(),
            "definition": cells.definition(cell, self.origin),
        }
        storage.write_text(path_of(key), json.dumps(record, indent=1))
        self._log(own, result, study)
        own.finish()
        say(label, result)
        return Outcome(cell, result, run_id=own.run_id)

    def _open(self, cell: Cell, key: str) -> Run:
        own = self.run.child(cell.title, {"stage": "cell", "cell": key, "command": _owner(cell), "method": cell.row})
        params = cell.params
        shown = {"method": cell.row, "steps": params.table.steps, "limit": params.table.limit}
        own.params(shown | {"skip": params.evaluate.limit, "granularity": params.search.granularity})
        own.params(flatten(params.prune, "prune.") | flatten(params.quantize, "quantize."))
        return own

    def _log(self, own: Run, result: Any, study: str | None) -> None:
        own.params({"bits": result.bits})
        if study:
            own.tags({"study_digest": study})
        log_result(own, result)

    def _agree(self, cell: Cell, key: str, kept: dict[str, Any], result: Any) -> str:
        """Give a finished cell its finished run below its command's newest run, whatever the store holds of it."""
        finished = [one.run_id for one in tracking.tagged("cell", key) if one.status == "FINISHED"]
        if finished:
            run_id = finished[-1]
        else:  # a kill came before the run's end, or the store is another one
            own = tracking.reopen(kept["run_id"]) or self._open(cell, key)
            self._log(own, result, kept["study"])
            if kept["study"]:
                Recorder(own, kept["study"], cell.params, None).agree(
                    _study(kept["study"], cell.params.search.objective)
                )
            own.finish()
            run_id = own.run_id
        if _owner(cell) == self.command:
            tracking.move(run_id, self.run)
        return run_id

    def _compute(self, cell: Cell, own: Run, label: str) -> tuple[Any, str | None]:
        """Run one cell; return its result and the name of its study, if it held one."""
        from pipeline.search import pareto
        from pipeline.stages import trials
        from pipeline.trial import trial

        params = cell.params
        supplies = self._supplied(params)
        context = supplies.context
        count, study = len(context.units), None
        if cell.bits is not None:
            bits = bit_text.parse(cell.bits, count)
        elif cell.row in (pareto.UNTOUCHED, "llm_pruner"):
            bits = (bit_text.DENSE,) * count
        elif cell.row == "qpruner1":
            bits = (4,) * count
        elif cell.row == "qpruner2":
            bits = supplies.space.allocate(supplies.priors.mutual_information)
        else:
            bits, study = _searched(supplies, own)
        work = trial.Work(params.table.steps, params.table.limit, params.evaluate.limit)
        if cell.row == pareto.UNTOUCHED:
            return trials.untouched(params, context, work), study
        result, _ = trial.run(context, bits, work, progress=steps(label), keep=unfinished(self.key(cell)))
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


def _searched(supplies: Supplies, own: Run) -> tuple[tuple[int, ...], str]:
    """Hold QPruner3's search below its cell's run; return the best vector and the study's name."""
    from pipeline.results import cells
    from pipeline.search import pareto, search

    params = cells.changed(supplies.params, "search", n_trials=supplies.params.table.n_trials)
    settings, context = params.search, supplies.context
    history = search.import_history(settings.history, len(context.units), settings.objective)
    name = "table-" + study_name(params, supplies.pruned, supplies.bank)
    study = _study(name, settings.objective)
    own.tags({"study_digest": name})
    recorder = Recorder(own, name, params, context)
    recorder.agree(study)
    attempt = recorder.attempt(study, supplies.space)
    search.run(study, settings, supplies.space, supplies.priors, params.seed, attempt, history)
    trials = pareto.points(tracking.trials(name), settings.objective)
    found = pareto.best(pareto.judge(pareto.front(trials), trials, supplies.priors.sensitivity))  # as ``build`` chooses
    return bit_text.parse(found.bits, len(context.units)), name


def _study(name: str, objective: str) -> Any:
    from pipeline.search import search

    return search.Study(KEPT / "study", name, objective)


class Supplies:
    """What the cells of one set of params need: each made when first asked for, and kept for the next run.

    Args:
        params: The params.
        ratios: Pruning ratios that other cells need: what is missing of them is made with this one's, as one
            calibration serves all.
    """

    def __init__(self, params: Params, ratios: Sequence[float] = ()):
        from pipeline.compress.importance import MEASURED
        from pipeline.results import cells

        self.params = params
        base = storage.sha256(BASE / storage.CHECKSUMS)
        rows = [tracking.md5(ALPACA), params.data.validation_rows, params.seed]
        own = params.prune.ratio
        at = {ratio: digest(base, rows, cells.at_ratio(params, ratio).prune) for ratio in sorted({own, *ratios})}
        self._folders = {ratio: KEPT / f"pruned-{name}" for ratio, name in at.items()}
        self._pruned = at[own]
        self._bank = digest(self._pruned, params.quantize)
        importance = params.quantize.model_dump(include={"four_bit", "double_quant"})
        self._priors = digest(self._pruned, params.importance, importance, params.search.granularity, MEASURED)

    @cached_property
    def pruned(self) -> Path:
        """Return the folder of the pruned model."""
        own = self._folders[self.params.prune.ratio]
        return sound(own, lambda own: prune.write(self.params, self._missing(own)))

    def _missing(self, own: Path) -> dict[float, Path]:
        return {ratio: folder for ratio, folder in self._folders.items() if folder == own or not folder.exists()}

    @cached_property
    def bank(self) -> Path:
        """Return the folder of its layer bank."""
        pruned = self.pruned
        return sound(KEPT / f"bank-{self._bank}", lambda folder: quantize.write(self.params, pruned, folder))

    @cached_property
    def priors(self) -> Any:
        """Return the importance of its units."""
        from pipeline.compress.importance import Priors

        path = KEPT / f"importance-{self._priors}.json"
        kept = _read_json(path)
        return Priors.from_json(kept) if kept is not None else importance.write(self.params, self.pruned, path)

    @cached_property
    def context(self) -> Any:
        """Return what its trials share."""
        from pipeline.stages import trials

        return trials.load(self.params, self.pruned, self.bank)

    @cached_property
    def space(self) -> Any:
        """Return its feasible bit vectors."""
        from pipeline.stages import trials

        return trials.space(self.params, self.context)


def sound(folder: Path, make: Callable[[Path], Any]) -> Path:
    """Return a checkpoint folder that matches its checksums: as it is, or made now if it is missing or damaged."""
    if folder.exists():
        try:
            storage.verify(folder, "fetch")
            return folder
        except storage.CheckpointError as error:
            console.note(f"{str(error).partition(';')[0]}; making it again")
    make(folder)
    return folder


def path_of(key: str) -> Path:
    """Return where a finished cell is kept."""
    return KEPT / "cells" / f"{key}.json"


def read(key: str) -> dict[str, Any] | None:
    """Return what is kept of a finished cell, or None."""
    return _read_json(path_of(key))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        console.note(f"{path} is damaged; making it again")
        return None


def check_held_out(params: Params) -> None:
    """Refuse an ``evaluate.limit`` that leaves no item to judge cells on.

    Raises:
        ValueError: Naming the tasks.
    """
    limit = params.evaluate.limit
    counts = {
        task: sum(bool(line) for line in (BENCHMARKS / f"{task}.jsonl").read_text(encoding="utf-8").split("\n"))
        for task in params.evaluate.tasks
    }
    if full := [f"{task} ({count})" for task, count in counts.items() if not 0 < limit < count]:
        seen = f"the first {limit}" if limit else "all"
        raise ValueError(
            f"evaluate.limit: {limit} lets a search's trials see {seen} items of a task, which leaves none to judge "
            f"the table's cells on in {', '.join(full)}; set it to between 1 and {min(counts.values()) - 1}"
        )
