"""What the params ask of the model, judged by its config alone, where that is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

from pipeline import fits
from pipeline.architecture import FAMILIES
from pipeline.checks.check import Check, reads
from pipeline.compress import structures
from pipeline.errors import UserError
from pipeline.export import limits

_PRUNABLE = ("prune.structures", "prune.multiple_of", "prune.attention_blocks", "prune.mlp_blocks")


def at_hand(source: str | None) -> SimpleNamespace | None:
    """Return the config of a supported model that is here; None for any other, or if the source is at fault."""
    if source is None:
        return None
    try:
        config = fits.at_hand(source)
    except (OSError, UserError):  # listed by the check of the source
        return None
    return config if getattr(config, "model_type", None) in FAMILIES else None


def checks(config: SimpleNamespace) -> Iterator[Check]:
    """Yield the checks against a config."""
    yield Check((), lambda given: _some(fits.dense(config)))
    fault = fits.unusable(config)
    yield Check((), lambda given: _some(fault))
    if fault or not fits.complete(config):
        return
    yield Check(
        ("export.formats",), lambda given: _some(limits.gguf(config) if "gguf" in given.export.formats else None)
    )
    for key in ("attention_blocks", "mlp_blocks"):
        yield _block_range(config, key)
    yield _one_shape(config)
    yield _experts(config)
    yield _ratio(config, "prune.ratios", lambda given: given.prune.ratios)
    yield _ratio(config, "table.ratios", lambda given: given.table.ratios)
    yield _ratio(config, "ablation.ratio", lambda given: [given.ablation.ratio])
    yield Check(("quantize.r",), lambda given: _some(fits.rank(config, given.quantize.r)))
    for section in ("prune", "importance", "recover"):
        yield _length(config, section)
    yield _budget(config)
    yield Check(
        ("search.seed_bits", "search.granularity"),
        lambda given: _some(fits.seed_bits(config, given.search.seed_bits, given.search.granularity)),
    )
    yield Check(
        ("build.choose", "search.granularity"),
        lambda given: _some(fits.choice(config, given.build.choose, given.search.granularity)),
    )


def _some(fault: str | None) -> Iterator[str]:
    if fault:
        yield fault


def _block_range(config: SimpleNamespace, key: str) -> Check:
    return Check((f"prune.{key}",), lambda given: _some(structures.block_range(config, key, getattr(given.prune, key))))


def _one_shape(config: SimpleNamespace) -> Check:
    @reads("prune.shapes", "prune.structures", "prune.attention_blocks", "prune.mlp_blocks")
    def check(given: SimpleNamespace) -> Iterator[str]:
        if structures.spared(given.prune) is None:  # else a fault without the model
            yield from _some(structures.spared(given.prune, config.num_hidden_layers))

    return check


def _experts(config: SimpleNamespace) -> Check:
    return Check(
        ("prune.importance", "prune.compensate", "prune.ratios"),
        lambda given: _some(
            structures.experts_fault(config, given.prune.importance, given.prune.compensate, given.prune.ratios)
        ),
    )


def _ratio(config: SimpleNamespace, key: str, ratios: Callable[[SimpleNamespace], Iterable[float]]) -> Check:
    @reads(*_PRUNABLE, key)
    def check(given: SimpleNamespace) -> Iterator[str]:
        for ratio in ratios(given):
            yield from _some(structures.ratio(config, given.prune, key, ratio))

    return check


def _length(config: SimpleNamespace, section: str) -> Check:
    return Check(
        (f"{section}.max_length",),
        lambda given: _some(fits.length(config, section, getattr(given, section).max_length)),
    )


def _budget(config: SimpleNamespace) -> Check:
    """Make the check that the budget of memory can be met by 4 bits everywhere.

    The shapes of blocks are known after pruning only, and the search then judges exactly. This judges the prediction
    for blocks that all lose the same share, which traces a model, less a margin.
    """

    @reads(
        "search.memory_budget_gib",
        "search.memory",
        "prune.ratios",
        "prune.multiple_of",
        "quantize",
        "recover",
        "evaluate",
    )
    def check(given: SimpleNamespace) -> Iterator[str]:
        budget, ratio = given.search.memory_budget_gib, given.prune.ratios[-1]
        if budget is None or given.search.memory != "training":
            return
        from pipeline.checks.memory import memory_setting  # which import torch
        from pipeline.trial import even

        setting = memory_setting(given.recover, given.evaluate, given.quantize)
        try:
            least = even.least_training_gib(config, ratio, given.prune.multiple_of, setting)
        except UserError:  # the config's or the ratio's own fault
            return
        if budget < least:
            yield (
                f"search.memory_budget_gib: {budget} GiB, but recovery with {ratio:g} pruned and 4 bits "
                f"everywhere takes about {least:.3g}; raise it, prune more, or lower recover.micro_batch_size "
                "(`mlflow run . -e plan` tells what fits)"
            )

    return check
