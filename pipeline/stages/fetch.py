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
    run.metrics(fetch.run(params.model, params.data, params.evaluate.tasks))
    run.dataset(ALPACA, "alpaca", "training")
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")
