"""lm-eval's shipped task definitions, read as plain YAML: where one is, what it scores, whether it can be run here.

lm-eval itself is not imported: that and its own index take seconds, and ``checks`` asks here before anything loads.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Required, TypedDict

from pipeline import documents
from pipeline.errors import UserError

# The paper's seven, so that they need no search.
_SEVEN: Mapping[str, str] = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
# The metric that the paper's tables agree with, where it is not plain accuracy.
_PAPER_METRIC = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "openbookqa": "acc_norm"}
_TYPES = ("multiple_choice", "loglikelihood")  # of which items have an accuracy that a search can go by
_FURTHER_TYPES = (*_TYPES, "generate_until", "loglikelihood_rolling")
_MEANS = ("acc", "acc_norm", "acc_bytes", "exact_match")  # lm-eval takes their mean over items unless told otherwise
_NAME = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#\[\]]+)""", re.M)
_TAGS = re.compile(rb"""^["']?tag["']?:((?:[ \t]*[^\s\-][^\n#]*)|(?:[ \t]*(?:\n[ \t]*-[^\n]*)+))""", re.M)


class Metric(TypedDict, total=False):
    """A metric of a definition, as far as it is read here."""

    metric: Required[str]
    aggregation: str
    higher_is_better: bool


class Definition(TypedDict, total=False):
    """A task's definition, as far as it is read here."""

    include: str | list[str]
    dataset_path: str
    dataset_name: str | None
    dataset_kwargs: dict[str, object] | None
    test_split: str | None
    validation_split: str | None
    metric_list: list[Metric]
    output_type: str
    training_split: str | None
    fewshot_split: str | None
    fewshot_config: dict[str, object] | None
    num_fewshot: int | None
    generation_kwargs: dict[str, object]
    unsafe_code: bool


class Group(TypedDict, total=False):
    """A group's definition: of what lm-eval takes which means."""

    group: Required[str]
    task: Required[list[str]]
    aggregate_metric_list: object
    metadata: object


class DefinitionError(UserError, ValueError):
    """A task that lm-eval does not ship or that is not scored by log-likelihoods; says what to do."""


def folder() -> Path:
    """Return the folder of lm-eval's definitions."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DefinitionError("lm-eval is not installed; run: make setup")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _scanned() -> tuple[dict[str, tuple[str, Path]], dict[str, list[str]]]:
    """Return name -> (``task`` or ``group``, file) of every definition, and tag -> its tasks; a second's reading."""
    index: dict[str, tuple[str, Path]] = {}
    tags: dict[str, list[str]] = {}
    for where, _, names in os.walk(folder()):
        for name in names:
            if name.endswith(".yaml"):
                path = Path(where, name)
                content = path.read_bytes()
                keys = {key.decode(): value.decode() for key, value in _NAME.findall(content)}
                kind = "task" if "task" in keys else "group"  # a group lists its tasks below `task:`, not beside it
                if kind in keys and keys[kind] not in index:
                    index[keys[kind]] = (kind, path)
                    for tag in _tags(content) if kind == "task" else ():
                        tags.setdefault(tag, []).append(keys[kind])
    return index, tags


def _tags(content: bytes) -> list[str]:
    found = _TAGS.search(content)
    return re.findall(r"[\w.-]*\w", found[1].decode()) if found else []


def _index() -> dict[str, tuple[str, Path]]:
    return _scanned()[0]


def path(task: str) -> Path:
    """Return the file of a task's definition.

    Raises:
        DefinitionError: lm-eval ships no such task.
    """
    if task in _SEVEN:
        return folder() / _SEVEN[task]
    kind, file = _index().get(task, ("", Path()))
    if kind == "group":
        raise DefinitionError(
            f"{task!r} is a group of lm-eval's tasks; name the tasks in it, see {file}, or name it in evaluate.further"
        )
    if not kind:
        close = difflib.get_close_matches(task, [name for name, (kind, _) in _index().items() if kind == "task"])
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise DefinitionError(f"lm-eval ships no task {task!r}; {meant}the paper's are {', '.join(_SEVEN)}")
    return file


@cache
def settings(task: str) -> Definition:
    """Return the plain values of a task's definition, what it includes among them; functions read as their names.

    Raises:
        DefinitionError: lm-eval ships no such task.
    """
    return _read(path(task))


def _read(file: Path) -> Definition:
    values: Definition = documents.read(file, functions=True)
    names = values.pop("include", [])
    included: Definition = {}
    for name in [names] if isinstance(names, str) else names:
        included |= _read(file.parent / name)
    return included | values


def metric(task: str) -> str:
    """Return the metric that counts as a task's accuracy: the paper's, ``acc``, or the first that is a mean of hits.

    Raises:
        DefinitionError: The task has none.
    """
    if task in _SEVEN:
        return _PAPER_METRIC.get(task, "acc")
    listed = settings(task).get("metric_list") or [{"metric": "acc"}]
    means = [
        entry["metric"]
        for entry in listed
        if entry.get("higher_is_better", True)
        and entry.get("aggregation", "mean" if entry["metric"] in _MEANS else "") == "mean"
    ]
    if not means:
        names = ", ".join(str(entry["metric"]) for entry in listed)
        raise DefinitionError(
            f"task {task!r} reports {names}: no accuracy that could be averaged with the others; take it out"
        )
    return "acc" if "acc" in means else means[0]


def has_accuracy(task: str) -> bool:
    """Return whether a task is scored by log-likelihoods and has a metric that counts as its accuracy."""
    try:
        check(task)
    except DefinitionError:
        return False
    return True


def check(task: str) -> None:
    """Refuse a task that a search cannot go by.

    Raises:
        DefinitionError: It is unknown, is not scored by log-likelihoods of continuations, or has no accuracy.
    """
    if task in _SEVEN:
        return
    kind = kind_of(task)
    if kind not in _TYPES:
        how = {"generate_until": "by the text a model writes", "loglikelihood_rolling": "by perplexity of whole texts"}
        elsewhere = "; name it in evaluate.further" if kind in _FURTHER_TYPES else ""
        raise DefinitionError(
            f"task {task!r} is scored {how.get(kind, 'by code of its own')} (lm-eval's type {kind}); "
            f"only tasks of type {' or '.join(_TYPES)} can be used{elsewhere}"
        )
    metric(task)


def kind_of(task: str) -> str:
    """Return lm-eval's type of a task, such as ``multiple_choice``; ``python`` where it is code.

    Raises:
        DefinitionError: lm-eval ships no such task.
    """
    values = settings(task)
    return "python" if "class" in values else values.get("output_type", "generate_until")


def expanded(name: str) -> tuple[list[str], list[Group]]:
    """Return the tasks that a name stands for, and the groups of whose results lm-eval takes means, outer ones first.

    Args:
        name: Of a task, a group or a tag.

    Raises:
        DefinitionError: lm-eval ships nothing of that name, or the group gives its tasks settings of its own.
    """
    index, tags = ({}, {}) if name in _SEVEN else _scanned()
    if index.get(name, ("",))[0] != "group":
        if name in index or name not in tags:
            path(name)
            return [name], []
        return sorted(tags[name]), []
    values = documents.read(index[name][1], functions=True)
    members = [values["task"]] if isinstance(values["task"], str) else values["task"]
    found: list[str] = []
    listed: list[str] = []
    below: list[Group] = []
    for member in members:
        if not isinstance(member, str):
            raise DefinitionError(
                f"group {name!r} changes the settings of its tasks, which is not followed here; name its tasks one by "
                f"one, see {index[name][1]}"
            )
        inside, groups = expanded(member)
        found, below = found + inside, below + groups
        listed += [member] if member in index else inside
    own: Group = {"group": name, "task": listed}
    for key in ("aggregate_metric_list", "metadata"):
        if key in values:
            own[key] = values[key]
    return found, [own, *below]


def check_further(name: str) -> None:
    """Refuse a task, group or tag that cannot be run beside the search.

    Raises:
        DefinitionError: It is unknown, is code, or runs code that a model writes.
    """
    for task in expanded(name)[0]:
        kind = kind_of(task)
        if kind not in _FURTHER_TYPES:
            raise DefinitionError(f"task {task!r} is scored by code of its own (lm-eval's type {kind}), not run here")
        if settings(task).get("unsafe_code"):
            raise DefinitionError(f"task {task!r} runs code that the model writes, which is not done here; take it out")
