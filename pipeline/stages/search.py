"""Stage ``search``: trials of seeds, then Bayesian optimization (paper algorithm 1); references outside the front.

Reads ``artifacts/pruned``, ``artifacts/bank``, ``reports/importance.json`` and the data. Writes the study's journal,
``artifacts/study/journal.log``, and ``reports/trials.csv``, ``trials.parquet``, ``history.json`` and ``search.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import get_args

import pandas as pd

from pipeline import GIB, architecture, checkpoint, console, storage, tracking
from pipeline.architecture import Unit
from pipeline.compress.priors import Priors
from pipeline.params import Objective, Params, flatten
from pipeline.paths import ALPACA, BENCHMARKS, REPORTS, STUDY
from pipeline.search import search
from pipeline.search.history import export_history, import_history
from pipeline.search.study import Record, Study
from pipeline.stages import priors, trials
from pipeline.stages.attempts import Attempts
from pipeline.stages.recorder import Recorder, search_settings, study_identity
from pipeline.stages.work import answers_of, crew
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    folders = trials.folders(params)
    units = architecture.units(checkpoint.load_config(next(iter(folders.values()))[0]), params.search.granularity)
    settings, ratios = search_settings(params, len(units)), params.prune.ratios
    history = import_history(params.search.history, len(units), ratios, settings.objective, params.search.bits)
    known = _priors(params, units)
    contexts = trials.Contexts(params, folders)
    identity = study_identity(params, [folder for pair in folders.values() for folder in pair])
    run.params(flatten(params.recover, "recover.") | flatten(params.evaluate, "evaluate."))
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")
    run.dataset(ALPACA, "alpaca", "training")
    spaces = trials.spaces(params, contexts)
    for ratio, bytes_ in spaces.too_large.items():
        console.note(f"ratio {ratio:g} takes {bytes_ / GIB:.3f} GiB at the lowest bits, above the budget: not searched")
    study = Study(STUDY, identity, settings.objective, settings.memory)
    run.tags({"study_digest": study.name, "journal": study.journal})
    tracking.show_search(run, study.name, settings.objective)
    recorder = Recorder(run, study, params, spaces)
    recorder.announce()
    recorder.take_up(answers_of(study))
    recorder.agree()
    screen = console.Search(settings.n_trials)
    with tracking.patient():
        with screen, crew(params, contexts, study, screen) as hands:
            attempts = Attempts(recorder, hands, screen)
            attempts.references(contexts.any, params.prune.ratios)
            ended = search.run(study, settings, search.Problem(spaces, known, history), attempts)
        console.note(f"search ended: {ended.reason}")
        figures = _write(study, ended, run)
    run.metrics(figures)
    for table in ("trials.csv", "trials.parquet", "history.json"):
        run.artifact(REPORTS / table)


def _priors(params: Params, units: Sequence[Unit]) -> dict[float, Priors]:
    """Return the importance of the units at each ratio, as stage ``importance`` measured it.

    Raises:
        CheckpointError: It is of other units, or lacks a figure.
    """
    known = priors.read(params)
    for prior in known.values():
        figures = (prior.mutual_information, prior.sensitivity, prior.dense_gains)
        named = list(prior.units) == [unit.name for unit in units]
        numbers = all(isinstance(value, int | float) for values in figures for value in values)
        if not named or not numbers or any(len(values) != len(units) for values in figures):
            raise storage.CheckpointError(
                f"{REPORTS / 'importance.json'} does not have a figure for each of this model's {len(units)} units; "
                f"{storage.again('importance')}"
            )
    return known


def _write(study: Study, ended: search.Ended, run: Run) -> dict[str, float | None]:
    """Write all files of reports; return the search's figures."""
    finished = study.finished()
    figures: dict[str, float | None] = {
        "finished": len(finished),
        "failed": ended.failed,
        **{
            f"best_{name}": max((record.result.score(name)[0] for record in finished), default=None)
            for name in get_args(Objective)
        },
    }
    names = {"study": study.name, "journal": study.journal, "search_run": run.run_id}
    _write_tables(finished, export_history(study.name, [record.result for record in finished]))
    storage.write_text(REPORTS / "search.json", json.dumps(names | {"ended": ended.reason} | figures, indent=1))
    return figures


def _write_tables(finished: Sequence[Record], history: Mapping[str, object]) -> None:
    trials = pd.DataFrame(
        {
            "trial": int(record.name.removeprefix("trial ")),
            "run_id": record.run_id,
            "method": record.method,
            "ratio": record.result.ratio,
            "bits": record.result.bits,
            "memory_source": record.result.memory_source,
            **record.result.metrics(),
        }
        for record in finished
    )
    storage.write_text(REPORTS / "trials.csv", trials.to_csv(index=False))
    storage.write_bytes(REPORTS / "trials.parquet", trials.to_parquet(index=False))
    storage.write_text(REPORTS / "history.json", json.dumps(history, indent=1))
