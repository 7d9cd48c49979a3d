"""What stages that run trials share: the contexts and the feasible vectors that the params ask for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline import GIB, bits, device, identity, storage, tracking
from pipeline.bits import Vector
from pipeline.errors import UserError
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BANK, BASE, BENCHMARKS, PRUNED, TEACHER, UNTOUCHED, at_ratio
from pipeline.search.allocate import Space, Spaces
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
        cached_tokens=params.search.context,
    )


class Contexts:
    """The contexts of all pruning ratios: the data is loaded once, a model when a trial first needs it.

    The last model asked for stays loaded; its tensors go before the next ones come.

    Args:
        params: The params.
        folders: Ratio -> (pruned model, its layer bank).
        items: Folder of benchmark items.

    Raises:
        CheckpointError: A pruned model or a bank is missing or was changed.
        UserError: A vector in the params does not fit the model, or the model a GPU.
    """

    def __init__(self, params: Params, folders: Mapping[float, tuple[Path, Path]], items: Path = BENCHMARKS):
        gc.collect()
        gc.freeze()  # what is imported by now stays; looking through it took a third of a second a phase
        self.folders = dict(folders)
        ratio, (pruned, bank) = next(iter(self.folders.items()))
        for other, other_bank in self.folders.values():
            storage.verify(other, "prune")
            storage.verify(other_bank, "quantize")
        self._last = contexts.load(
            Sources(ratio, pruned, bank, ALPACA, items, BASE, TEACHER),
            settings(params),
            device.choose(params.device, params.dtype),
            granularity=params.search.granularity,
            task_names=params.evaluate.tasks,
            validation_rows=params.data.validation_rows,
            further=further.tasks(params, items),
        )
        for text in params.search.seed_bits:
            vector(text, params.prune.ratios, len(self._last.units))

    @property
    def any(self) -> Context:
        """Return the context that is loaded, for what all ratios share."""
        return self._last

    def at(self, ratio: float) -> Context:
        """Return the context of a ratio."""
        if self._last.ratio != ratio:
            self._last = contexts.at_ratio(self._last, ratio, *self.folders[ratio])
        return self._last


def folders(params: Params) -> dict[float, tuple[Path, Path]]:
    """Return where the pruned models and their layer banks lie, by ratio."""
    return {ratio: (at_ratio(PRUNED, ratio), at_ratio(BANK, ratio)) for ratio in params.prune.ratios}


def vector(text: str, ratios: Sequence[float], units: int) -> Vector:
    """Return the vector that a text such as ``0.2:4484`` means; without a ratio, where there is one.

    Raises:
        UserError: It does not fit the model, or its ratio is not searched.
    """
    parts = bits.split(text)
    ratio, letters = parts or (None, text)
    if ratio is None and len(ratios) > 1:
        raise UserError(f"vector {text!r} names no ratio; write one of {', '.join(f'{at:g}:...' for at in ratios)}")
    ratio = ratios[0] if ratio is None else ratio
    if ratio not in ratios:
        raise UserError(f"vector {text!r}: ratio {ratio:g} is none of prune.ratios; add it there")
    return Vector(ratio, bits.parse(letters, units))


def spaces(params: Params, loaded: Contexts) -> Spaces:
    """Return the feasible vectors: all limits of section ``search`` at once.

    Raises:
        SearchError: The limits leave no vector, or no unit above the lowest bits where some are asked for.
        UserError: They forbid one of the user's own seeds.
    """
    limits = params.search
    budget = None if limits.memory_budget_gib is None else int(limits.memory_budget_gib * GIB)
    alone = len(loaded.folders) == 1
    measured = {ratio: _space(params, loaded.at(ratio), budget if alone else None) for ratio in loaded.folders}
    feasible = Spaces(measured, {}) if alone else Spaces.within(measured, budget)
    for text in limits.seed_bits:
        if vector(text, params.prune.ratios, feasible.units) not in feasible:
            raise UserError(
                f"search.seed_bits: {text!r} is beyond search.bits, max_8bit_fraction, memory_budget_gib or "
                "average_bits; remove it or loosen the limit"
            )
    return feasible


def _space(params: Params, context: Context, budget: int | None) -> Space:
    """Measure the feasible bit vectors of one ratio."""
    limits, setting = params.search, context.memory_setting
    lowest = (limits.bits[0],) * len(context.units)
    predict: Callable[[tuple[int, ...]], int]
    if limits.memory == "training":

        def predict(choice: tuple[int, ...]) -> int:
            return memory.training(context.config, context.widths(choice), setting)[1]

    else:  # what a batch adds to the weights is that of the lowest bits: the logits, but in the smallest vocabularies
        least = context.predict(lowest).inference
        weights = memory.stored(context.config, context.widths(lowest), setting)

        def predict(choice: tuple[int, ...]) -> int:
            return least + memory.stored(context.config, context.widths(choice), setting) - weights

    return Space.of(
        predict,
        len(context.units),
        limits.max_8bit_fraction,
        budget,
        [sum(context.state[f"{name}.weight"].numel() for name in unit.linears) for unit in context.units],
        limits.average_bits,
        limits.bits,
    )


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
