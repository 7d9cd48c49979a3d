"""Faults that lie in two keys at once, in a task's name, or in what a path holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

from pipeline import fits
from pipeline.architecture import FAMILIES, unsupported
from pipeline.checks.check import Check, reads
from pipeline.compress import structures
from pipeline.data import definitions
from pipeline.errors import UserError, shown
from pipeline.params import Objective


@reads("prune.samples", "prune.importance", "prune.compensate")
def _needs_samples(given: SimpleNamespace) -> Iterator[str]:
    prune = given.prune
    if prune.samples == 0 and structures.calibrated(prune.importance, prune.compensate):
        yield (
            f"prune.samples: samples is 0, but importance {prune.importance!r} or compensation needs rows; "
            "set samples to 10 or more"
        )


@reads("prune.noise", "prune.importance", "prune.compensate")
def _noise_is_read(given: SimpleNamespace) -> Iterator[str]:
    prune = given.prune
    if prune.noise and not structures.fitted(prune.importance, prune.compensate):
        yield (
            f"prune.noise: noise {prune.noise:g} changes what layers receive, which importance "
            f"{prune.importance!r} without compensation does not read; set noise to 0"
        )


@reads("prune.steps", "prune.importance")
def _random_once(given: SimpleNamespace) -> Iterator[str]:
    if given.prune.importance == "random" and given.prune.steps > 1:
        yield f"prune.steps: steps is {given.prune.steps}, but random scores do not get better; set it to 1"


@reads("prune.importance", "prune.compensate")
def _surgeon_refits(given: SimpleNamespace) -> Iterator[str]:
    if given.prune.importance == "surgeon" and not given.prune.compensate:
        yield (
            "prune.importance: 'surgeon' scores what is lost after the rest was refitted, but compensate is false; "
            "set compensate to true or take another importance"
        )


def _ordered(key: str) -> Check:
    @reads(f"prune.{key}")
    def check(given: SimpleNamespace) -> Iterator[str]:
        span = getattr(given.prune, key)
        if 0 <= span.last < span.first:
            yield f"prune.{key}: first {span.first} comes after last {span.last}; swap them (-1 is the last block)"

    return check


@reads("prune.shapes", "prune.structures", "prune.attention_blocks", "prune.mlp_blocks")
def _one_shape_spares_none(given: SimpleNamespace) -> Iterator[str]:
    if fault := structures.spared(given.prune):
        yield fault


@reads("recover.batch_size", "recover.micro_batch_size")
def _micro_batches(given: SimpleNamespace) -> Iterator[str]:
    whole, part = given.recover.batch_size, given.recover.micro_batch_size
    if whole % part:
        yield f"recover.batch_size: batch_size {whole} is no multiple of micro_batch_size {part}; set one so that it is"


@reads("recover.patience", "recover.validate_every")
def _patience_has_losses(given: SimpleNamespace) -> Iterator[str]:
    if given.recover.patience and not given.recover.validate_every:
        yield (
            f"recover.patience: patience {given.recover.patience} counts validation losses, but validate_every is 0; "
            "set validate_every, or patience to 0"
        )


@reads("recover.target", "recover.train")
def _teacher_has_a_head(given: SimpleNamespace) -> Iterator[str]:
    if (given.recover.target, given.recover.train) == ("teacher", "full"):
        yield (
            "recover.target: the teacher's predictions are kept for a head that is not trained, and train 'full' "
            "trains it; set train to lora, or target to answers"
        )


@reads("recover.target", "recover.answers_weight")
def _answers_are_weighed(given: SimpleNamespace) -> Iterator[str]:
    if given.recover.target == "answers" and given.recover.answers_weight:
        yield (
            f"recover.answers_weight: {given.recover.answers_weight} is the answers' share beside a teacher, but "
            "target is answers alone; set answers_weight to 0, or target to teacher"
        )


@reads("quantize.samples", "quantize.method", "quantize.init")
def _codes_have_text(given: SimpleNamespace) -> Iterator[str]:
    quantize = given.quantize
    if quantize.samples == 0 and (quantize.method == "calibrated" or quantize.init == "weighted"):
        yield (
            f"quantize.samples: samples is 0, but method {quantize.method!r} with init {quantize.init!r} reads "
            "calibration text; set samples to 48 or more"
        )


def _warmup_ends(key: str) -> Check:
    section = key.partition(".")[0]

    @reads("recover.warmup_steps", key)
    def check(given: SimpleNamespace) -> Iterator[str]:
        warmup, steps = given.recover.warmup_steps, getattr(given, section).steps
        if warmup > steps > 0:
            yield (
                f"recover.warmup_steps: {warmup} steps of warmup do not end within the {steps} of {key}, so the "
                "learning rate is never reached; lower it"
            )

    return check


@reads("importance.samples", "importance.max_length", "importance.clusters")
def _enough_tokens(given: SimpleNamespace) -> Iterator[str]:
    tokens = given.importance.samples * given.importance.max_length
    if tokens < given.importance.clusters:
        yield (
            f"importance.clusters: {given.importance.clusters} clusters of at most {tokens} tokens "
            "(samples x max_length); lower it or raise samples"
        )


@reads("search.seed_bits", "search.max_8bit_fraction")
def _seeds_within_limit(given: SimpleNamespace) -> Iterator[str]:
    limit = given.search.max_8bit_fraction
    for seed in given.search.seed_bits:
        share = seed.count("8") / len(seed)
        if share > limit:
            yield (
                f"search.seed_bits: seed_bits {shown(seed)} has {seed.count('8')} of {len(seed)} units at 8 bits "
                f"({share:.0%}), but max_8bit_fraction allows {limit:.0%}; lower the one or raise the other"
            )
            return


@reads("search.average_bits", "search.max_8bit_fraction")
def _average_leaves_room(given: SimpleNamespace) -> Iterator[str]:
    average, share = given.search.average_bits, given.search.max_8bit_fraction
    if average == 4 and share > 0:
        yield (
            f"search.average_bits: average_bits {average} leaves no unit at 8 bits, but max_8bit_fraction is {share}; "
            "raise the one or set the other to 0"
        )


@reads("model.source")
def _supported_family(given: SimpleNamespace) -> Iterator[str]:
    source = given.model.source
    folder = Path(source.removeprefix("path:"))
    if not source.startswith("path:"):
        return
    if not (folder / "config.json").is_file():
        yield f"model.source: {folder / 'config.json'} does not exist; name a folder with a model (value {source!r})"
        return
    try:
        family = getattr(fits.read(folder), "model_type", None)
    except UserError as error:
        yield f"model.source: {error}; name a folder with a model"
        return
    if family not in FAMILIES:
        yield f"model.source: {unsupported(family)} (value {source!r})"


@reads("evaluate.tasks")
def _tasks_can_be_run(given: SimpleNamespace) -> Iterator[str]:
    for index, task in enumerate(given.evaluate.tasks):
        if fault := _fault_of_task(task):
            yield f"evaluate.tasks.{index}: {fault} (value {shown(task)})"


@reads("evaluate.tasks", "data.benchmarks")
def _items_are_there(given: SimpleNamespace) -> Iterator[str]:
    if given.data.benchmarks == "hub":
        return
    folder = Path(given.data.benchmarks.removeprefix("path:"))
    lost = [
        f"{task}.jsonl"
        for task in given.evaluate.tasks
        if _fault_of_task(task) is None and not (folder / f"{task}.jsonl").exists()
    ]
    if lost:
        yield f"data.benchmarks: {folder} has no {', '.join(lost)}; add it or take the task out of evaluate.tasks"


def _fault_of_task(task: str) -> str | None:
    try:
        definitions.check(task)
    except UserError as error:
        return str(error)
    return None


@reads("pareto.objective", "evaluate.tasks")
def _objective_is_measured(given: SimpleNamespace) -> Iterator[str]:
    measured = (*get_args(Objective), *given.evaluate.tasks)
    if given.pareto.objective not in measured:
        yield (
            f"pareto.objective: {shown(given.pareto.objective)} is not among evaluate.tasks, so nothing measures it; "
            f"use one of {', '.join(measured)}"
        )


CHECKS: tuple[Check, ...] = (
    _needs_samples,
    _noise_is_read,
    _random_once,
    _surgeon_refits,
    _ordered("attention_blocks"),
    _ordered("mlp_blocks"),
    _one_shape_spares_none,
    _micro_batches,
    _patience_has_losses,
    _teacher_has_a_head,
    _answers_are_weighed,
    _codes_have_text,
    _warmup_ends("recover.steps"),
    _warmup_ends("build.steps"),
    _enough_tokens,
    _seeds_within_limit,
    _average_leaves_room,
    _supported_family,
    _tasks_can_be_run,
    _items_are_there,
    _objective_is_measured,
)
