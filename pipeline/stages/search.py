"""Stage ``search``: trials of seeds, then Bayesian optimization (paper algorithm 1); references outside the front.

Reads ``artifacts/pruned``, ``artifacts/bank``, ``reports/importance.json`` and the data. Writes the study's journal,
``artifacts/study/journal.log``, and ``reports/trials.csv``, ``trials.parquet``, ``history.json`` and ``search.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pandas as pd

from pipeline import architecture, checkpoint, console, storage
from pipeline.compress.importance import Priors
from pipeline.params import Objective, Params, flatten
from pipeline.paths import ALPACA, BANK, BENCHMARKS, PRUNED, REPORTS, STUDY
from pipeline.search import search
from pipeline.stages.recorder import Recorder, study_name, trial_name
from pipeline.stages.shell import made
from pipeline.tracking import Run
from pipeline.trial import trial
from pipeline.trial.trial import Result


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    settings = params.search
    units = architecture.units(checkpoint.load_config(PRUNED), settings.granularity)
    history = search.import_history(settings.history, len(units), settings.objective)
    context = trial.load(params, PRUNED, BANK, ALPACA, BENCHMARKS)
    name = study_name(params, PRUNED, BANK)
    run.params(flatten(params.recover, "recover.") | flatten(params.evaluate, "evaluate."))
    run.tags({"study_digest": name})
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")
    run.dataset(ALPACA, "alpaca", "training")
    priors = Priors.from_json(made("importance"))
    space = trial.space(context)
    study = search.Study(STUDY, name, settings.objective)
    recorder = Recorder(run, name, params, context)
    recorder.agree(study)
    attempt = recorder.attempt(study, space)
    with recorder.screen:
        recorder.references(study)
        ended = search.run(study, settings, space, priors, params.seed, attempt, history)
    console.note(f"search ended: {ended.reason}")
    finished = study.finished()
    results = [Result.from_json(record["result"]) for record in finished]
    figures = {
        "finished": len(finished),
        "failed": ended.failed,
        **{f"best_{name}": max((one.score(name)[0] for one in results), default=None) for name in get_args(Objective)},
    }
    run.metrics(figures)
    summary = {"study": name, "search_run": run.run_id, "ended": ended.reason, **figures}
    _write_tables(finished, results, search.export_history(name, results))
    storage.write_text(REPORTS / "search.json", json.dumps(summary, indent=1))
    for table in ("trials.csv", "trials.parquet", "history.json"):
        run.artifact(REPORTS / table)


def _write_tables(finished: Sequence[Mapping[str, Any]], results: Sequence[Result], history: Any) -> None:
    trials = pd.DataFrame(
        {
            "trial": trial_name(record["number"]).removeprefix("trial "),
            **{key: record[key] for key in ("run_id", "method")},
            "bits": result.bits,
            "memory_source": result.memory_source,
            **result.metrics(),
        }
        for record, result in zip(finished, results, strict=True)
    )
    trials.to_csv(REPORTS / "trials.csv", index=False)
    trials.to_parquet(REPORTS / "trials.parquet", index=False)
    storage.write_text(REPORTS / "history.json", json.dumps(history, indent=1))
