"""Stage ``evaluate``: score the built checkpoint, with bitsandbytes' modules, on items that no trial saw.

Further tasks (``evaluate.further``, ``evaluate.text``) are asked here, too.

Reads ``artifacts/final`` and ``data/benchmarks``. Writes ``reports/evaluate.json``.
"""

from __future__ import annotations

from pipeline import checkpoint, console, device, storage
from pipeline.data import tasks
from pipeline.params import Params
from pipeline.paths import BENCHMARKS, FINAL
from pipeline.stages import further as beside
from pipeline.stages.shell import keep_figures
from pipeline.tracking import Run
from pipeline.trial import evaluate, further


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    storage.verify(FINAL, "build")
    compute = device.choose(params.device, params.dtype)
    model = checkpoint.load_final(FINAL, compute.device, compute.dtype)
    loaded = tasks.load(params.evaluate.tasks, BENCHMARKS)
    skip = evaluate.seen(loaded, params.evaluate.limit)
    if not skip:
        console.note("evaluate: the trials saw every item of a task, so the built model is scored on the same items")
    scores = evaluate.run(
        model,
        checkpoint.load_tokenizer(FINAL),
        loaded,
        params.evaluate.final_limit,
        params.evaluate.batch_tokens,
        lambda batches: console.progress(batches, "evaluate: batches"),
        skip,
    )
    run.tags({"held_out": str(skip > 0).lower()})
    figures = {
        "accuracy": scores.mean,
        "accuracy_stderr": scores.mean_stderr,
        "gold_logprob": scores.gold_logprob,
        "gold_logprob_stderr": scores.gold_logprob_stderr,
        "items": scores.items,
        "unseen_items": scores.items if skip else 0,  # that no trial was scored on
        **scores.accuracy,
    }
    figures |= {f"{task}_stderr": error for task, error in scores.stderr.items()} | scores.other
    if asked := beside.tasks(params):
        figures |= further.run(
            model,
            checkpoint.load_tokenizer(FINAL),
            asked,
            params.evaluate.batch_tokens,
            lambda batches: console.progress(batches, "evaluate: further tasks, batches"),
        )
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")
    keep_figures(run, "evaluate", figures)
