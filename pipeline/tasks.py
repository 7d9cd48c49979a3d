"""The seven zero-shot benchmarks: lm-eval's own task definitions on local items.

Each task is lm-eval's shipped definition (prompt, choices, metrics), included by a definition of ours that only points
it at a JSONL file. Nothing is asked of a hub.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import yaml

# Raw fields that lm-eval's definition of each task reads.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "boolq": ("question", "passage", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}

# The metric that the paper's tables agree with; the others report plain accuracy.
METRIC: Mapping[str, str] = {task: "acc" for task in FIELDS} | {
    "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
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

_SHIPPED: Mapping[str, str] = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


@dataclass(frozen=True)
class HubSource:
    """Where a task's items are on a hub: data set, configuration and the split that lm-eval scores."""

    path: str
    name: str | None
    split: str


def hub_source(task: str) -> HubSource:
    """Return where lm-eval's shipped definition takes a task's items from."""
    settings = _settings(_shipped(task))
    split = settings.get("test_split") or settings["validation_split"]
    return HubSource(settings["dataset_path"], settings.get("dataset_name"), split)


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
        lm_eval.api.task.tqdm = lambda items, **_: items  # building requests takes milliseconds
        manager = lm_eval.tasks.TaskManager(include_path=scratch, include_defaults=False)
        return manager.load(list(names))["tasks"]


def _on_local_items(name: str, path: Path) -> dict[str, Any]:
    return {
        "include": str(_shipped(name)),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }


def _shipped(task: str) -> Path:
    return Path(lm_eval.__file__).parent / "tasks" / _SHIPPED[task]


def _settings(path: Path) -> dict[str, Any]:
    """Read a shipped definition for its plain values; its ``!function`` values are not wanted here."""

    class Plain(yaml.SafeLoader):
        pass

    Plain.add_constructor("!function", lambda loader, node: None)
    settings = yaml.load(path.read_text(), Plain)  # noqa: S506  (a SafeLoader)
    if "include" in settings:
        settings = _settings(path.parent / settings["include"]) | settings
    return settings
