"""Stage ``search``: trials of seeds, then Bayesian optimization (paper algorithm 1); references outside the front.

Reads ``artifacts/pruned``, ``artifacts/bank``, ``reports/importance.json`` and the data. Writes the study's journal,
``artifacts/study/journal.log``, and ``reports/trials.csv``, ``trials.parquet``, ``history.json`` and ``search.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import get_args

import pandas as pd

from pipeline import architecture, checkpoint, console, storage, tracking
from pipeline.architecture import Unit
from pipeline.compress.importance import Priors
from pipeline.params import Objective, Params, flatten
from pipeline.paths import ALPACA, BANK, BENCHMARKS, PRUNED, REPORTS, STUDY
from pipeline.search import search
from pipeline.search.history import export_history, import_history
from pipeline.search.study import Record, Study
from pipeline.stages import trials
from pipeline.stages.recorder import Recorder, search_settings, study_identity
from pipeline.stages.shell import made
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    settings = search_settings(params)
    units = architecture.units(checkpoint.load_config(PRUNED), params.search.granularity)
    history = import_history(params.search.history, len(units), settings.objective)
    priors = _priors(units)
    context = trials.load(params)
    identity = study_identity(params, PRUNED, BANK)
    run.params(flatten(params.recover, "recover.") | flatten(params.evaluate, "evaluate."))
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")
    run.dataset(ALPACA, "alpaca", "training")
    space = trials.space(params, context)
    study = Study(STUDY, identity, settings.objective)
    run.tags({"study_digest": study.name, "journal": study.journal})
    tracking.show_search(run, study.name, settings.objective)
    recorder = Recorder(run, study, params, context, space)
    recorder.announce()
    recorder.agree()
    with tracking.patient():
        with recorder.screen:
            recorder.references()
            ended = search.run(study, settings, search.Problem(space, priors, history), recorder.attempt())
        console.note(f"search ended: {ended.reason}")
        figures = _write(study, ended, run)
    run.metrics(figures)
    for table in ("trials.csv", "trials.parquet", "history.json"):
        run.artifact(REPORTS / table)


def _priors(units: Sequence[Unit]) -> Priors:
    """Return the importance of a model's units, as stage ``importance`` measured it.

    Raises:
        CheckpointError: It is of other units, or lacks a figure.
    """
    priors = Priors.from_json(made("importance"))
    figures = (priors.mutual_information, priors.sensitivity)
    named = list(priors.units) == [unit.name for unit in units]
    complete = all(len(values) == len(units) and all(isinstance(v, int | float) for v in values) for values in figures)
    if not named or not complete:
        raise storage.CheckpointError(
            f"{REPORTS / 'importance.json'} does not have a figure for each of this model's {len(units)} units; "
            f"{storage.again('importance')}"
        )
    return priors


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
            "bits": record.result.bits,
            "memory_source": record.result.memory_source,
            **record.result.metrics(),
        }
        for record in finished
    )
    storage.write_text(REPORTS / "trials.csv", trials.to_csv(index=False))
    storage.write_bytes(REPORTS / "trials.parquet", trials.to_parquet(index=False))
    storage.write_text(REPORTS / "history.json", json.dumps(history, indent=1))
