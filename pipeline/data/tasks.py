"""The zero-shot benchmarks: lm-eval's own task definitions on local items.

Each task is lm-eval's shipped definition (prompt, choices, metrics), included by a definition of ours that only points
it at a JSONL file. Nothing is asked of a hub.
"""

from __future__ import annotations

import errno
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import datasets
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.task import Task

from pipeline import documents, storage
from pipeline.data import definitions
from pipeline.data.items import FIELDS, Item, choices_fault
from pipeline.errors import UserError

__all__ = ["CHANCE", "FIELDS", "HubSource", "compiled_templates", "faults", "gold", "hub_source", "load"]

_ENVIRONMENT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)

CHANCE: Mapping[str, float] = {
    "boolq": 0.5,
    "piqa": 0.5,
    "hellaswag": 0.25,
    "winogrande": 0.5,
    "arc_easy": 0.25,
    "arc_challenge": 0.25,
    "openbookqa": 0.25,
}


@dataclass(frozen=True)
class HubSource:
    """Where a task's items are on a hub: data set, configuration, the split that lm-eval scores, further options."""

    path: str
    name: str | None
    split: str
    options: Mapping[str, object] = field(default_factory=dict)


def hub_source(task: str) -> HubSource:
    """Return where lm-eval's shipped definition takes a task's items from.

    Raises:
        DefinitionError: The definition names no data set.
    """
    settings = definitions.settings(task)
    split = settings.get("test_split") or settings.get("validation_split")
    if not settings.get("dataset_path") or not split:
        raise definitions.DefinitionError(
            f"lm-eval's definition of {task!r} names no data set; use path:<folder> with {task}.jsonl in it"
        )
    options = {
        key: value
        for key, value in (settings.get("dataset_kwargs") or {}).items()
        if key not in ("trust_remote_code", "streaming")
    }
    return HubSource(settings["dataset_path"], settings.get("dataset_name"), split, options)


def load(names: Iterable[str], folder: str | Path) -> dict[str, Task]:
    """Return lm-eval's task objects on the items of ``<folder>/<task>.jsonl``, by name.

    Raises:
        CheckpointError: A task's file is missing or damaged.
    """
    names = tuple(names)
    with scratch() as place:
        for name in names:
            path = (Path(folder) / f"{name}.jsonl").resolve()
            if not path.exists():
                raise storage.CheckpointError(f"{path} does not exist; run: dvc repro fetch")
            storage.read_lines(path, "fetch")  # what lm-eval says of a damaged file names neither file nor line
            (place / f"{name}.yaml").write_text(documents.write(on_local_items(name, path, place)))
        return defined(place, names)["tasks"]


def defined(place: Path, names: Iterable[str]) -> lm_eval.tasks.manager.TaskDict:
    """Return lm-eval's tasks, groups and which is in which, by the definitions in a folder alone."""
    datasets.disable_progress_bars()  # reading a small file is no progress worth a bar
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False)
    return manager.load(list(names))


@contextmanager
def compiled_templates() -> Iterator[None]:
    """Compile each of lm-eval's templates once for a while; it compiles one for every item and field."""
    environment = lm_eval.utils.env
    environment.from_string = _compiled
    try:
        yield
    finally:
        del environment.from_string  # the method is the class's again


_compiled = lru_cache(1024)(lm_eval.utils.env.from_string)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that is gone afterwards."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except FileNotFoundError as error:
        if "temporary directory" not in str(error):
            raise
        raise UserError(f"no folder for temporary files can be written: {error}; set TMPDIR to one that can") from None


def faults(name: str, items: Sequence[Item]) -> list[str]:
    """Return why lm-eval cannot ask or score each of a task's items; an empty text if it can.

    Raises:
        Exception: Whatever lm-eval's definition stumbles on in every item; its fields are known to lm-eval alone.
    """
    try:
        return _asked(name, items)
    except Exception as error:  # the definition's templates and functions raise whatever they stumble on
        if environment_fault(error):
            raise
        if len(items) == 1:
            return [str(error) if isinstance(error, _ItemError) else f"it cannot be asked ({_named(error)})"]
        if not isinstance(error, _ItemError) and _hopeless(name, items):
            raise
    middle = len(items) // 2
    return faults(name, items[:middle]) + faults(name, items[middle:])


class _ItemError(Exception):
    """An item's fault, where the definition leaves items out and so hides which one it is."""


def _hopeless(name: str, items: Sequence[Item]) -> bool:
    """Return whether the first, the last and the middle item fail by themselves, so that the file is at fault."""
    for item in (items[0], items[-1], items[len(items) // 2]):
        try:
            _asked(name, [item])
        except _ItemError:
            return False
        except Exception:  # noqa: S112  (see `faults`, which tells it)
            continue
        return False
    return True


def _asked(name: str, items: Sequence[Item]) -> list[str]:
    with scratch() as place:
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (place / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        task = load([name], place)[name]
    with compiled_templates():
        told = [_answer_fault(task, document) for document in task.eval_docs]
        if any(told) and len(told) != len(items):
            raise _ItemError(next(filter(None, told)))
        if not any(told):
            task.build_all_requests(rank=0, world_size=1)
            return [""] * len(items)
    return told


def environment_fault(error: BaseException | None) -> OSError | None:
    """Return the refusal of the operating system that caused an error: no room, no right to write; None: no such."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
            return error
        error = error.__cause__ or error.__context__
    return None


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def gold(task: Task, document: Item) -> list[int]:
    """Return the indices of an item's right choices."""
    choices = task.doc_to_choice(document)
    right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    answers = right if isinstance(right, list) else [right]
    return [choices.index(answer) if isinstance(answer, str) else int(answer) for answer in answers]


def _answer_fault(task: Task, document: Item) -> str:
    if task.OUTPUT_TYPE != "multiple_choice":
        return ""
    choices = task.doc_to_choice(document)
    if fault := choices_fault(choices):
        return fault
    count = len(choices)
    try:
        right = gold(task, document)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        return f"its answer is none of its {count} choices ({type(error).__name__}: {error})"
    if not right or not all(0 <= answer < count for answer in right):
        return f"its answer {right} is none of its {count} choices (0 to {count - 1})"
    return ""


def on_local_items(name: str, path: Path, cache: Path) -> dict[str, object]:
    """Return a definition that includes the shipped one of a task and points it at a file of items."""
    overridden: dict[str, object] = {
        "include": str(definitions.path(name)),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        # In memory, and nothing in the user's own cache: HOME need not be one that can be written.
        "dataset_kwargs": {
            "data_files": {"validation": str(path)},
            "cache_dir": str(cache / "cache"),
            "keep_in_memory": True,
        },
        "custom_dataset": None,
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
        "fewshot_config": None,
        "num_fewshot": 0,
    }
    settings = definitions.settings(name)
    if "process_results" not in settings and settings.get("metric_list") and definitions.has_accuracy(name):
        # lm-eval bootstraps the errors of the others (perplexity, F1) in new processes, and nothing here reads them.
        read = {definitions.metric(name), "acc", "acc_norm"}
        overridden["metric_list"] = [
            entry
            for entry in settings["metric_list"]
            if entry["metric"] in read and entry.get("aggregation", "mean") == "mean"
        ]
    return overridden
