"""The zero-shot benchmarks: lm-eval's own task definitions on local items.

Each task is lm-eval's shipped definition (prompt, choices, metrics), included by a definition of ours that only points
it at a JSONL file. Nothing is asked of a hub.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import lm_eval.utils
import yaml

from pipeline.data import definitions

# Raw fields that lm-eval's definitions of the paper's seven tasks read.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "boolq": ("question", "passage", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}

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
    options: Mapping[str, Any] = field(default_factory=dict)


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


def load(names: Iterable[str], folder: str | Path) -> dict[str, Any]:
    """Return lm-eval's task objects on the items of ``<folder>/<task>.jsonl``, by name.

    Raises:
        FileNotFoundError: A task's file is missing.
    """
    names = tuple(names)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            path = (Path(folder) / f"{name}.jsonl").resolve()
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist; run: dvc repro fetch")
            (Path(scratch) / f"{name}.yaml").write_text(yaml.safe_dump(_on_local_items(name, path)))
        datasets.disable_progress_bars()  # reading a small file is no progress worth a bar
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = lm_eval.tasks.TaskManager(include_path=scratch, include_defaults=False)
        return manager.load(list(names))["tasks"]


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


def faults(name: str, items: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return of each item why it cannot be scored; an empty text if it can.

    Raises:
        Exception: Whatever lm-eval's definition stumbles on; its fields are known to lm-eval alone.
    """
    with tempfile.TemporaryDirectory() as scratch:
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (Path(scratch) / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        task = load([name], scratch)[name]
        with compiled_templates():
            found = [_answer_fault(task, document) for document in task.eval_docs]
            if not any(found):
                task.build_all_requests(rank=0, world_size=1)
        return found


def gold(task: Any, document: Mapping[str, Any]) -> list[int]:
    """Return the indices of an item's right choices."""
    choices = task.doc_to_choice(document)
    right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    every = right if isinstance(right, list) else [right]
    return [choices.index(one) if isinstance(one, str) else int(one) for one in every]


def _answer_fault(task: Any, document: Mapping[str, Any]) -> str:
    if task.OUTPUT_TYPE != "multiple_choice":
        return ""
    count = len(task.doc_to_choice(document))
    try:
        right = gold(task, document)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        return f"its answer is none of its {count} choices ({type(error).__name__}: {error})"
    if not right or not all(0 <= one < count for one in right):
        return f"its answer {right} is none of its {count} choices (0 to {count - 1})"
    return ""


def _on_local_items(name: str, path: Path) -> dict[str, Any]:
    own: dict[str, Any] = {
        "include": str(definitions.path(name)),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "custom_dataset": None,
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
        "fewshot_config": None,
        "num_fewshot": 0,
    }
    settings = definitions.settings(name)
    if "process_results" not in settings and settings.get("metric_list"):
        # lm-eval bootstraps the errors of the others (perplexity, F1) in new processes, and nothing here reads them.
        read = {definitions.metric(name), "acc", "acc_norm"}
        own["metric_list"] = [
            one for one in settings["metric_list"] if one["metric"] in read and one.get("aggregation", "mean") == "mean"
        ]
    return own
