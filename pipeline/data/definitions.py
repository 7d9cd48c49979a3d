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
_TYPES = ("multiple_choice", "loglikelihood")
_MEANS = ("acc", "acc_norm", "acc_bytes", "exact_match")  # lm-eval takes their mean over items unless told otherwise
_NAME = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#\[\]]+)""", re.M)


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


class DefinitionError(UserError, ValueError):
    """A task that lm-eval does not ship or that is not scored by log-likelihoods; says what to do."""


def folder() -> Path:
    """Return the folder of lm-eval's definitions."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DefinitionError("lm-eval is not installed; run: make setup")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _index() -> dict[str, tuple[str, Path]]:
    """Return name -> (``task`` or ``group``, file) of every definition; a second's reading."""
    index: dict[str, tuple[str, Path]] = {}
    for where, _, names in os.walk(folder()):
        for name in names:
            if name.endswith(".yaml"):
                path = Path(where, name)
                keys = {key.decode(): value.decode() for key, value in _NAME.findall(path.read_bytes())}
                kind = "task" if "task" in keys else "group"  # a group lists its tasks below `task:`, not beside it
                if kind in keys:
                    index.setdefault(keys[kind], (kind, path))
    return index


def path(task: str) -> Path:
    """Return the file of a task's definition.

    Raises:
        DefinitionError: lm-eval ships no such task.
    """
    if task in _SEVEN:
        return folder() / _SEVEN[task]
    kind, file = _index().get(task, ("", Path()))
    if kind == "group":
        raise DefinitionError(f"{task!r} is a group of lm-eval's tasks; name the tasks in it, see {file}")
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


def check(task: str) -> None:
    """Refuse a task that cannot be run here.

    Raises:
        DefinitionError: It is unknown, is not scored by log-likelihoods of continuations, or has no accuracy.
    """
    if task in _SEVEN:
        return
    values = settings(task)
    kind = "python" if "class" in values else values.get("output_type", "generate_until")
    if kind not in _TYPES:
        how = {"generate_until": "by the text a model writes", "loglikelihood_rolling": "by perplexity of whole texts"}
        raise DefinitionError(
            f"task {task!r} is scored {how.get(kind, 'by code of its own')} (lm-eval's type {kind}); "
            f"only tasks of type {' or '.join(_TYPES)} can be used"
        )
    metric(task)
