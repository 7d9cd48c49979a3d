"""One trial: a bit vector -> assembled, recovered and evaluated model -> figures.

Search, references and build all come through here; there is no second way to turn bits into a score.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from peft import PeftModel

from pipeline import console, storage
from pipeline.bits import DENSE, Vector
from pipeline.trial import context as contexts
from pipeline.trial import evaluate, further, memory, recover
from pipeline.trial.assemble import assemble, merged
from pipeline.trial.context import Context, Passes
from pipeline.trial.memory import Peak
from pipeline.trial.recover import Rows, Steps
from pipeline.trial.result import Memory, Result

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a trial does with its model.

    Attributes:
        steps: Optimizer steps; None: the settings' own.
        limit: Items of a task, 0: all; None: the settings' own.
        skip: First items of each task that are left out.
        trained: False: it is only measured (the untouched model).
        further: Whether further tasks are asked, too (``Context.further``).
    """

    steps: int | None = None
    limit: int | None = None
    skip: int = 0
    trained: bool = True
    further: bool = False


class Phases:
    """Times the phases of a trial and measures their peak memory, where that can be measured."""

    def __init__(self, context: Context):
        self.device = context.device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int | None] = {}

    def run(self, phase: str, work: Callable[[], T]) -> T:
        """Return what some work returns."""
        start = time.perf_counter()
        result, self.peaks[phase] = memory.measured(work, self.device)
        self.seconds[phase] = time.perf_counter() - start
        return result

    def of_run(self, passes: Passes, predicted: Peak, trained: bool) -> dict[str, int]:
        """Return what a GPU measured, by its name in MLflow, beside what was predicted for passes of that size."""
        training, inference = self.peaks["recover"], self.peaks["evaluate"]
        if training is None or inference is None:
            return {}
        figures = {"run_inference_memory_bytes": inference, "run_batch_tokens": passes.tokens}
        if trained:
            figures |= {
                "run_peak_memory_bytes": training,
                "run_predicted_memory_bytes": predicted.training,
                "run_micro_batch_size": passes.rows,
            }
        return figures


def run(
    context: Context,
    bits: Sequence[int],
    work: Work | None = None,
    *,
    progress: Steps = iter,
    keep: Path | None = None,
) -> tuple[Result, PeftModel]:
    """Assemble, recover and evaluate one bit vector.

    Args:
        context: What trials share.
        bits: Bits of each unit: 4, 8 or 16.
        work: How long it is trained and what it is judged on; None: as the settings say.
        progress: Wraps the recovery's steps.
        keep: Where an unfinished recovery is kept (``recover.run``).

    Returns:
        The result and the recovered model.
    """
    work = work or Work()
    settings, tokenizer = context.settings, context.tokenizer
    steps = (settings.recover.steps if work.steps is None else work.steps) if work.trained else 0
    limit = settings.limit if work.limit is None else work.limit
    passes = context.passes(bits, memory.room(context.device))
    recovery = replace(settings.recover, steps=steps, micro_batch_size=passes.rows)
    targets = None
    if context.teacher and steps:  # before the phases: what the dense model takes is no part of a trial
        trained = recover.rows_of(context.train, recovery, settings.seed)
        targets = context.teacher.targets(trained, recovery.whole)
    rows = Rows(context.train, context.validation, tokenizer.pad_token_id, targets)
    phases = Phases(context)
    model = phases.run("assemble", lambda: assemble(context, bits))
    recovered = phases.run("recover", lambda: recover.run(model, rows, recovery, settings.seed, progress, keep))
    model.eval()

    def evaluated() -> evaluate.Scores:
        # On a GPU the adapters stay beside bitsandbytes' modules, as they will be served.
        with nullcontext() if context.device.type == "cuda" else merged(model):
            return evaluate.run(model, tokenizer, context.tasks, limit, passes.tokens, skip=work.skip)

    def asked_further() -> dict[str, float]:
        assert context.further is not None
        with nullcontext() if context.device.type == "cuda" else merged(model):
            return further.run(model, tokenizer, context.further, settings.batch_tokens)

    scores = phases.run("evaluate", evaluated)
    if work.further and context.further:
        scores = replace(scores, other=scores.other | phases.run("further", asked_further))
    peak = context.predict(bits)
    of_run = phases.of_run(passes, context.predict_run(bits, passes), work.trained)
    peaks = Memory(peak.training if work.trained else None, peak.inference, peak.source, of_run)
    return Result.of(Vector(context.ratio, tuple(bits)), scores, recovered, peaks, phases.seconds), model


def untouched_result(context: Context, base: Path, kept: Path, work: Work | None = None) -> Result:
    """Return the result of the base model, before pruning, out of a file or measured now and kept there.

    It depends on the base model, the data and the settings alone, so that all searches share it.

    Args:
        context: What trials share; of its pruned model nothing is read but how many units there are.
        base: The base model.
        kept: The file, named by all that the result depends on.
        work: What it is judged on.

    Raises:
        CheckpointError: The base model is missing or was changed.
    """
    if kept.exists():
        try:
            return Result.from_json(json.loads(kept.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError):
            console.note(f"{kept} is damaged; the untouched model is measured again")
    bits = (DENSE,) * len(context.units)
    result, _ = run(contexts.untouched(context, base), bits, replace(work or Work(), trained=False))
    storage.write_text(kept, json.dumps(result.as_json(), indent=1))
    return result
