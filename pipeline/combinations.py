"""Faults of ``params.yaml`` that lie in two keys at once, or in what a path holds.

Each check takes the raw document and returns a line, or None. It may stumble over what is itself at fault: ``params``
lists that and goes on, so that no fault hides another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import fits
from pipeline.architecture import FAMILIES
from pipeline.data import definitions


def _needs_samples(raw: Any) -> str | None:
    prune = raw["prune"]
    needing = fits.calibrated(prune["importance"], prune["compensate"])
    if prune["samples"] == 0 and needing:
        return (
            f"prune.samples: samples is 0, but importance {prune['importance']!r} or compensation needs rows; "
            "set samples to 10 or more"
        )
    return None


def _noise_is_read(raw: Any) -> str | None:
    prune = raw["prune"]
    if prune["noise"] and not fits.fitted(prune["importance"], prune["compensate"]):
        return (
            f"prune.noise: noise {prune['noise']} changes what layers receive, which importance "
            f"{prune['importance']!r} without compensation does not read; set noise to 0"
        )
    return None


def _micro_batches(raw: Any) -> str | None:
    whole, part = raw["recover"]["batch_size"], raw["recover"]["micro_batch_size"]
    if whole % part:
        return (
            f"recover.batch_size: batch_size {whole} is no multiple of micro_batch_size {part}; set one so that it is"
        )
    return None


def _patience_has_losses(raw: Any) -> str | None:
    recover = raw["recover"]
    if recover["patience"] and not recover["validate_every"]:
        return (
            f"recover.patience: patience {recover['patience']} counts validation losses, but validate_every is 0; "
            "set validate_every, or patience to 0"
        )
    return None


def _seeds_within_limit(raw: Any) -> str | None:
    limit = raw["search"]["max_8bit_fraction"]
    for bits in raw["search"]["seed_bits"]:
        share = bits.count("8") / len(bits)
        if share > limit:
            return (
                f"search.seed_bits: seed_bits {bits!r} has {bits.count('8')} of {len(bits)} units at 8 bits "
                f"({share:.0%}), but max_8bit_fraction allows {limit:.0%}; lower the one or raise the other"
            )
    return None


def _average_leaves_room(raw: Any) -> str | None:
    average, share = raw["search"]["average_bits"], raw["search"]["max_8bit_fraction"]
    if average == 4 and share > 0:
        return (
            f"search.average_bits: average_bits {average} leaves no unit at 8 bits, but max_8bit_fraction is {share}; "
            "raise the one or set the other to 0"
        )
    return None


def _ordered(raw: Any, key: str) -> str | None:
    span = raw["prune"][key]
    if 0 <= span["last"] < span["first"]:
        return f"prune.{key}: first {span['first']} comes after last {span['last']}; swap them (-1 is the last block)"
    return None


def _supported_family(raw: Any) -> str | None:
    source = raw["model"]["source"]
    folder = Path(source.removeprefix("path:"))
    if not source.startswith("path:") or not folder.exists():
        return None
    if not (folder / "config.json").exists():
        return f"model.source: {folder / 'config.json'} does not exist; name a folder with a model (value {source!r})"
    try:
        family = getattr(fits.read(folder), "model_type", None)
    except ValueError as error:
        return f"model.source: {folder / 'config.json'} cannot be read ({error}); name a folder with a model"
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        return f"model.source: model family {family!r} is not supported (value {source!r}); use one of {known}"
    return None


def _items_are_there(raw: Any) -> str | None:
    folder = Path(raw["data"]["benchmarks"].removeprefix("path:"))
    if raw["data"]["benchmarks"] == "hub" or not folder.is_dir():
        return None
    lost = [task for task in raw["evaluate"]["tasks"] if _known(task) and not (folder / f"{task}.jsonl").exists()]
    if lost:
        names = ", ".join(f"{task}.jsonl" for task in lost)
        return f"data.benchmarks: {folder} has no {names}; add it or take the task out of evaluate.tasks"
    return None


def _known(task: str) -> bool:
    try:
        definitions.check(task)
    except definitions.DefinitionError:
        return False
    return True


def _random_once(raw: Any) -> str | None:
    prune = raw["prune"]
    if prune["importance"] == "random" and prune["steps"] > 1:
        return f"prune.steps: steps is {prune['steps']}, but random scores do not get better; set it to 1"
    return None


def _surgeon_refits(raw: Any) -> str | None:
    if raw["prune"]["importance"] == "surgeon" and raw["prune"]["compensate"] is False:
        return (
            "prune.importance: 'surgeon' scores what is lost after the rest was refitted, but compensate is false; "
            "set compensate to true or take another importance"
        )
    return None


def _warmup_ends(raw: Any) -> str | None:
    warmup = raw["recover"]["warmup_steps"]
    for key, steps in (("recover.steps", raw["recover"]["steps"]), ("build.steps", raw["build"]["steps"])):
        if warmup > steps > 0:
            return (
                f"recover.warmup_steps: {warmup} steps of warmup do not end within the {steps} of {key}, so the "
                "learning rate is never reached; lower it"
            )
    return None


def _enough_tokens(raw: Any) -> str | None:
    section = raw["importance"]
    tokens = section["samples"] * section["max_length"]
    if tokens < section["clusters"]:
        return (
            f"importance.clusters: {section['clusters']} clusters of at most {tokens} tokens (samples x max_length); "
            "lower it or raise samples"
        )
    return None


CHECKS: tuple[Callable[[Any], str | None], ...] = (
    _needs_samples,
    _noise_is_read,
    _micro_batches,
    _patience_has_losses,
    _seeds_within_limit,
    _average_leaves_room,
    partial(_ordered, key="attention_blocks"),
    partial(_ordered, key="mlp_blocks"),
    _supported_family,
    _items_are_there,
    _random_once,
    _surgeon_refits,
    _warmup_ends,
    _enough_tokens,
)
