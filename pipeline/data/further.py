"""Tasks beside those that a search goes by: lm-eval's of any kind, in groups, with examples; perplexity of a text.

Items lie beside the others, ``<task>.jsonl``, and the examples that are shown before a question in
``<task>.fewshot.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import documents, storage
from pipeline.data import definitions

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

TEXT = "text"  # the task that is a text file's perplexity
_PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def tasks_of(names: Iterable[str]) -> list[str]:
    """Return the tasks that names of tasks, groups and tags stand for, each once."""
    return list(dict.fromkeys(task for name in names for task in definitions.expanded(name)[0]))


def shots(task: str, num_fewshot: int | None) -> int:
    """Return how many examples a task shows before each question: as many as are asked for, or as defined."""
    return (definitions.settings(task).get("num_fewshot") or 0) if num_fewshot is None else num_fewshot


def examples_file(task: str, num_fewshot: int | None) -> str:
    """Return the name of the file that a task's examples come from; empty if it shows none or brings its own."""
    config = definitions.settings(task).get("fewshot_config") or {}
    return f"{task}.fewshot.jsonl" if shots(task, num_fewshot) and "samples" not in config else ""


def files(names: Iterable[str], num_fewshot: int | None) -> list[str]:
    """Return the names of the files that tasks, groups and tags read."""
    return [file for task in tasks_of(names) for file in (f"{task}.jsonl", examples_file(task, num_fewshot)) if file]


def examples_split(task: str) -> str:
    """Return the split of a task's data set on a hub that its examples come from, as lm-eval chooses it."""
    settings = definitions.settings(task)
    named = (settings.get("fewshot_config") or {}).get("split") or settings.get("fewshot_split")
    splits = (settings.get("training_split"), settings.get("validation_split"), settings.get("test_split"))
    return str(named or next(split for split in splits if split))


def load(names: Sequence[str], folder: Path, num_fewshot: int | None, text: bool = False) -> TaskDict:
    """Return lm-eval's tasks and groups on the items of a folder.

    Args:
        names: Of tasks, groups and tags.
        folder: Holds ``files(names, num_fewshot)``, and ``text.jsonl`` if asked for it.
        num_fewshot: Examples before each question; None: as each task is defined.
        text: Whether the perplexity of a text is among them.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    from pipeline.data import tasks  # which imports lm-eval

    wanted = [*files(names, num_fewshot), *([f"{TEXT}.jsonl"] if text else [])]
    if lost := [file for file in wanted if not (folder / file).exists()]:
        raise storage.CheckpointError(f"{folder} has no {', '.join(lost)}; run: dvc repro fetch")
    for file in wanted:
        storage.read_lines(folder / file, "fetch")
    known, top = {name: definitions.expanded(name) for name in names}, list[str]()
    with tasks.scratch() as place:
        for name, (inside, groups) in known.items():
            top += [name] if groups else inside
            for group in groups:
                (place / f"{group['group']}.group.yaml").write_text(documents.write(group))
            for task in inside:
                (place / f"{task}.yaml").write_text(documents.write(_definition(task, folder, num_fewshot, place)))
        if text:
            (place / f"{TEXT}.yaml").write_text(documents.write(_perplexity((folder / f"{TEXT}.jsonl"), place)))
        return tasks.defined(place, dict.fromkeys([*top, *([TEXT] if text else [])]))


def _definition(task: str, folder: Path, num_fewshot: int | None, cache: Path) -> dict[str, object]:
    """Return a definition that points the shipped one at files, with examples that are no items."""
    from pipeline.data import tasks

    found = tasks.on_local_items(task, (folder / f"{task}.jsonl").resolve(), cache)
    found.pop("metric_list", None)  # all that it reports is wanted
    found["num_fewshot"] = shots(task, num_fewshot)
    config = definitions.settings(task).get("fewshot_config") or {}
    if "samples" in config:
        found.pop("fewshot_config")  # of the definition itself
    if file := examples_file(task, num_fewshot):
        found["dataset_kwargs"]["data_files"]["fewshot"] = str((folder / file).resolve())  # type: ignore[index]
        found["fewshot_split"] = "fewshot"
        found["fewshot_config"] = {"sampler": config["sampler"]} if "sampler" in config else None
    return found


def _perplexity(file: Path, cache: Path) -> dict[str, object]:
    return {
        "task": TEXT,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(file.resolve())},
            "cache_dir": str(cache / "cache"),
            "keep_in_memory": True,
        },
        "output_type": "loglikelihood_rolling",
        "validation_split": "validation",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": metric} for metric in _PERPLEXITIES],
    }
