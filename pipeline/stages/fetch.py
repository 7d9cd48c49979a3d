"""Stage ``fetch``: base model, Alpaca rows and benchmark items.

Reads what sections ``model`` and ``data`` name. Writes ``artifacts/base``, ``data/alpaca.jsonl`` and
``data/benchmarks``.
"""

from __future__ import annotations

from pipeline.data import fetch
from pipeline.params import Params, flatten
from pipeline.paths import ALPACA, BENCHMARKS
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    run.params(flatten(params.model, "model.") | flatten(params.data, "data."))
    run.metrics(fetch.run(sources(params)))
    run.dataset(ALPACA, "alpaca", "training")
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")


def sources(params: Params) -> fetch.Sources:
    """Return what the params ask for, and how long a prompt may be where rows are read with theirs."""
    prompts = {
        "importance.max_length": params.importance.max_length,
        "recover.max_length": params.recover.max_length,
    }
    if params.prune.text == "rows":
        prompts["prune.max_length"] = params.prune.max_length
    return fetch.Sources(
        model=params.model.source,
        alpaca=params.data.alpaca,
        benchmarks=params.data.benchmarks,
        tasks=params.evaluate.tasks,
        validation_rows=params.data.validation_rows,
        sha256=params.model.sha256,
        max_skipped=params.data.max_skipped,
        prompts=prompts,
        form=params.data.format,
        names={str(name): theirs for name, theirs in params.data.names.items()},
        prompt=params.data.prompt,
        further=params.evaluate.further,
        num_fewshot=params.evaluate.num_fewshot,
        text=params.evaluate.text,
    )
