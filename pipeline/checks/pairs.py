"""Faults that lie in two keys at once, in a task's name, or in what a path holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

from pipeline import bits, fits
from pipeline.architecture import FAMILIES, unsupported
from pipeline.checks.check import Check, reads
from pipeline.compress import structures
from pipeline.data import chat, definitions, further
from pipeline.data.items import ALPACA_FIELDS
from pipeline.errors import UserError, shown
from pipeline.params import Objective

_RUN_ID = 32  # digits of a run's id


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
        _, letters = bits.split(seed) or (None, seed)
        share = bits.share_raised(letters)
        if share > limit:
            yield (
                f"search.seed_bits: seed_bits {shown(seed)} has {len(letters) - letters.count('4')} of {len(letters)} "
                f"units above 4 bits ({share:.0%}), but max_8bit_fraction allows {limit:.0%}; lower the one or raise "
                "the other"
            )
            return


@reads("search.seed_bits", "search.bits", "prune.ratios")
def _seeds_are_searched(given: SimpleNamespace) -> Iterator[str]:
    ratios, widths = given.prune.ratios, given.search.bits
    for seed in given.search.seed_bits:
        yield from _searched(f"search.seed_bits: seed_bits {shown(seed)}", seed, ratios, widths)


@reads("build.choose", "search.bits", "prune.ratios")
def _choice_is_searched(given: SimpleNamespace) -> Iterator[str]:
    choose = given.build.choose
    if bits.split(choose) and len(choose) != _RUN_ID:
        yield from _searched(f"build.choose: {shown(choose)}", choose, given.prune.ratios, bits.WIDTHS)


def _searched(what: str, text: str, ratios: Sequence[float], widths: Sequence[int]) -> Iterator[str]:
    """Yield why a vector's text is none of those that are searched."""
    ratio, letters = bits.split(text) or (None, "")
    if ratio is None and len(ratios) > 1:
        yield f"{what} names no ratio, and prune.ratios has several; write it before a colon, such as 0.2:4484"
    elif ratio is not None and ratio not in ratios:
        yield f"{what} has ratio {ratio:g}, which is none of prune.ratios; add it there, or take one of them"
    if beyond := set(bits.read(letters)) - set(widths):
        yield f"{what} has {min(beyond)} bits, which are none of search.bits; add them there"


@reads("search.average_bits", "search.max_8bit_fraction")
def _average_leaves_room(given: SimpleNamespace) -> Iterator[str]:
    average, share = given.search.average_bits, given.search.max_8bit_fraction
    if average == 4 and share > 0:
        yield (
            f"search.average_bits: average_bits {average} leaves no unit at 8 bits, but max_8bit_fraction is {share}; "
            "raise the one or set the other to 0"
        )


@reads("data.format", "data.prompt")
def _messages_have_a_template(given: SimpleNamespace) -> Iterator[str]:
    if (given.data.format, given.data.prompt) == ("chat", "alpaca"):
        yield (
            "data.prompt: Alpaca's prompt holds no conversation, and data.format is chat; set data.prompt to chat, "
            "the model's own template"
        )


@reads("data.format", "data.names")
def _names_are_of_the_format(given: SimpleNamespace) -> Iterator[str]:
    fields = (*chat.FIELDS, *chat.ROLES) if given.data.format == "chat" else ALPACA_FIELDS
    for name, theirs in given.data.names.items():
        if name not in fields:
            yield (
                f"data.names: {name!r} is no name in rows of format {given.data.format}; they have {', '.join(fields)}"
            )
        elif theirs is None and name != "input":
            yield f"data.names: {name!r} is null, and only an input may be missing; name what the rows call it"


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


@reads("evaluate.further", "evaluate.tasks")
def _further_tasks_can_be_run(given: SimpleNamespace) -> Iterator[str]:
    for index, name in enumerate(given.evaluate.further):
        place = f"evaluate.further.{index}"
        if fault := _fault_of_further(name):
            yield f"{place}: {fault} (value {shown(name)})"
        elif twice := set(further.tasks_of([name])) & set(given.evaluate.tasks):
            yield f"{place}: {shown(name)} asks {', '.join(sorted(twice))}, which evaluate.tasks has; name it once"


@reads("evaluate.further", "evaluate.num_fewshot", "data.benchmarks")
def _further_items_are_there(given: SimpleNamespace) -> Iterator[str]:
    if given.data.benchmarks == "hub":
        return
    folder = Path(given.data.benchmarks.removeprefix("path:"))
    sound = [name for name in given.evaluate.further if _fault_of_further(name) is None]
    lost = [name for name in further.files(sound, given.evaluate.num_fewshot) if not (folder / name).exists()]
    if lost:
        named = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        yield (
            f"data.benchmarks: {folder} has no {named}, which evaluate.further asks for (<task>.fewshot.jsonl holds "
            "the examples that evaluate.num_fewshot shows); add it, or take the task out"
        )


def _fault_of_further(name: str) -> str | None:
    try:
        definitions.check_further(name)
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
    _seeds_are_searched,
    _choice_is_searched,
    _average_leaves_room,
    _messages_have_a_template,
    _names_are_of_the_format,
    _supported_family,
    _tasks_can_be_run,
    _items_are_there,
    _further_tasks_can_be_run,
    _further_items_are_there,
    _objective_is_measured,
)
