"""What stages that run trials share: the context and the feasible bit vectors that the params ask for."""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path

from pipeline import GIB, bits, device, identity, storage, tracking
from pipeline.errors import UserError
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BANK, BASE, BENCHMARKS, PRUNED, TEACHER, UNTOUCHED
from pipeline.search.allocate import Space
from pipeline.settings import settings_of
from pipeline.stages import further
from pipeline.trial import context as contexts
from pipeline.trial import memory, recover, trial
from pipeline.trial.context import Context, Settings, Sources
from pipeline.trial.result import Result
from pipeline.trial.trial import Work


def settings(params: Params) -> Settings:
    """Return how a trial is run."""
    return Settings(
        recover=settings_of(recover.Settings, params.recover),
        limit=params.evaluate.limit,
        batch_tokens=params.evaluate.batch_tokens,
        seed=params.seed,
    )


def load(params: Params, pruned: Path = PRUNED, bank: Path = BANK, items: Path = BENCHMARKS) -> Context:
    """Load and verify what trials share.

    Raises:
        CheckpointError: The pruned model or the bank is missing or was changed.
        UserError: A bit string in the params does not fit the model, or the model a GPU.
    """
    gc.collect()
    gc.freeze()  # what is imported by now stays; looking through it took a third of a second a phase
    context = contexts.load(
        Sources(pruned, bank, ALPACA, items, BASE, TEACHER),
        settings(params),
        device.choose(params.device, params.dtype),
        granularity=params.search.granularity,
        task_names=params.evaluate.tasks,
        validation_rows=params.data.validation_rows,
        further=further.tasks(params, items),
    )
    for seed in params.search.seed_bits:
        bits.parse(seed, len(context.units))
    return context


def space(params: Params, context: Context) -> Space:
    """Return the feasible bit vectors: all limits of section ``search`` at once.

    Raises:
        ValueError: The limits leave no vector, or no unit at 8 bits where some are asked for.
        UserError: They forbid one of the user's own seeds.
    """
    limits = params.search
    budget = limits.memory_budget_gib
    feasible = Space.of(
        lambda vector: memory.training(context.config, context.widths(vector), context.memory_setting)[1],
        len(context.units),
        limits.max_8bit_fraction,
        None if budget is None else int(budget * GIB),
        [sum(context.state[f"{name}.weight"].numel() for name in unit.linears) for unit in context.units],
        limits.average_bits,
    )
    for seed in limits.seed_bits:
        if bits.parse(seed, len(context.units)) not in feasible:
            raise UserError(
                f"search.seed_bits: {seed!r} is beyond search.max_8bit_fraction, memory_budget_gib or average_bits; "
                "remove it or loosen the limit"
            )
    return feasible


def untouched(params: Params, context: Context, work: Work | None = None) -> Result:
    """Return the base model's result: kept from an earlier search of the same data and settings, or measured now."""
    work = work or Work(further=True)
    recovery = context.settings.recover
    name = digest(
        storage.sha256(BASE / storage.CHECKSUMS),
        tracking.md5(ALPACA),
        [tracking.md5(BENCHMARKS / f"{task}.jsonl") for task in params.evaluate.tasks],
        [params.data.validation_rows, recovery.max_length, recovery.micro_batch_size, context.settings.seed],
        [params.evaluate.tasks, work.limit, work.skip, context.settings.limit, context.settings.batch_tokens],
        asdict(context.memory_setting),
        [params.search.granularity, str(context.compute)],
        identity.code(*identity.TRIAL),
        *further.named(params),
    )
    return trial.untouched_result(context, BASE, UNTOUCHED / f"{name}.json", work)
