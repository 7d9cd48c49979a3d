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
from pipeline.data import chat, further, items, models, packages, prompts, rows, tasks
from pipeline.data.alpaca import TextRow, asked
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
        form: Of the rows: ``alpaca`` or ``chat`` (``messages``).
        names: Our name of a field or a role -> the rows' own, where it differs; None: they have no such field.
        prompt: What rows are written in: ``alpaca`` (its prompt) or ``chat`` (the model's chat template).
        further: Tasks, groups and tags that are asked beside the search.
        num_fewshot: Examples that they show before each question; None: as each is defined.
        text: ``path:<file>`` of a text whose perplexity is measured.
    """

    model: str
    alpaca: str
    benchmarks: str
    tasks: tuple[str, ...]
    validation_rows: int
    sha256: str = ""
    max_skipped: float = 0.01
    prompts: Mapping[str, int] = field(default_factory=dict)
    form: str = "alpaca"
    names: Mapping[str, str | None] = field(default_factory=dict)
    prompt: str = "alpaca"
    further: tuple[str, ...] = ()
    num_fewshot: int | None = None
    text: str | None = None


def run(sources: Sources) -> dict[str, float]:
    """Fetch everything; return figures for tracking.

    Raises:
        FetchError: Sources cannot be had or do not hold what they should; all that is wrong with the data at once.
    """
    faults: list[str] = []

    def read(kind: Callable[..., tuple[list[T], list[int]]], *named: object) -> tuple[list[T], list[int]]:
        try:
            return kind(*named)
        except FetchError as error:
            faults.append(str(error))
            return [], []

    texts, skipped = read(alpaca, sources.alpaca, sources.max_skipped, sources.form, sources.names)
    if texts and (few := _too_few(texts, sources)):
        faults.append(few)
    asked_tasks = [*sources.tasks, *further.tasks_of(sources.further)]
    benchmarks = {task: read(benchmark, sources.benchmarks, task, sources.max_skipped) for task in asked_tasks}
    examples = {
        file: read(_examples, sources.benchmarks, task, further.shots(task, sources.num_fewshot))[0]
        for task in further.tasks_of(sources.further)
        if (file := further.examples_file(task, sources.num_fewshot))
    }
    text = read(_text, sources.text)[0]
    if faults:
        raise FetchError("\n".join(faults))
    read_rows = len(texts) + len(skipped)
    with models.fetched(sources.model, sources.sha256) as (folder, parameters):
        tokenizer = checkpoint.load_tokenizer(folder)
        if sources.prompt == "chat":
            numbers = [number for number in range(1, read_rows + 1) if number not in skipped]
            texts = _conversations(texts, numbers, tokenizer, sources)
        _refuse_long_prompts(texts, tokenizer, sources)
        layers = checkpoint.load_config(folder).num_hidden_layers
    storage.write_text(ALPACA, _lines(texts))
    with storage.writing(BENCHMARKS) as folder:
        written = {f"{task}.jsonl": questions for task, (questions, _) in benchmarks.items()} | examples
        for file, values in (written | ({f"{further.TEXT}.jsonl": text} if text else {})).items():
            (folder / file).write_text(_lines(values), encoding="utf-8")
    return {
        "alpaca_rows": len(texts),
        "alpaca_skipped": read_rows - len(texts),
        "benchmark_items": sum(len(questions) for questions, _ in benchmarks.values()),
        "benchmark_skipped": sum(len(skipped) for _, skipped in benchmarks.values()),
        "layers": layers,
        "parameters": parameters,
    }


def _lines(values: Iterable[object]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _too_few(texts: Sequence[TextRow], sources: Sources) -> str:
    if len(texts) > sources.validation_rows:
        return ""
    return (
        f"data.alpaca: {sources.alpaca} has {len(texts)} rows and data.validation_rows holds out "
        f"{sources.validation_rows}; lower validation_rows or name a larger file"
    )


def _conversations(
    texts: Sequence[TextRow], numbers: Sequence[int], tokenizer: PreTrainedTokenizerBase, sources: Sources
) -> list[TextRow]:
    """Return rows, of these numbers in their file, as conversations that the model's chat template can write."""
    if not tokenizer.chat_template:
        raise FetchError(
            f"data.prompt: chat is the model's own template, and the tokenizer of {sources.model} has none; set "
            "data.prompt (and data.format) to alpaca, or name a model that was trained to chat"
        )
    chats = [
        row
        if "messages" in row
        else {"messages": prompts.conversation(row["instruction"], row["input"], row["output"])}
        for row in texts
    ]
    faults = [chat.template_fault(row["messages"], tokenizer) for row in chats]
    kept = usable(chats, faults, f"data.alpaca: {sources.alpaca}", "row", sources.max_skipped, numbers)
    if few := _too_few(kept, sources):
        raise FetchError(few)
    return kept


def _refuse_long_prompts(texts: Sequence[TextRow], tokenizer: PreTrainedTokenizerBase, sources: Sources) -> None:
    """Refuse rows of which none leaves room for its response; the stages that read them come late."""
    shortest = sorted(texts, key=lambda row: len(asked(row, tokenizer)[0]))
    for name, most in sources.prompts.items():
        if not any(len(asked(row, tokenizer)[1]) < most for row in shortest):
            raise FetchError(
                f"{name}: {most} tokens leave no room for a response after any prompt of data.alpaca "
                f"({sources.alpaca}); the shortest has {min(len(asked(row, tokenizer)[1]) for row in shortest[:100])}. "
                f"Raise {name}"
            )


def alpaca(
    source: str,
    max_skipped: float = 0.0,
    form: str = "alpaca",
    names: Mapping[str, str | None] | None = None,
) -> tuple[list[TextRow], list[int]]:
    """Return rows and the numbers of those left out.

    Args:
        source: Where they are.
        max_skipped: Share of them that may be left out.
        form: ``alpaca``, rows of ``instruction``, ``input`` and ``output``, or ``chat``, rows of ``messages``.
        names: Our name of a field or a role -> the rows' own, where it differs; None: they have no such field.

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
    of_columns, fault = (chat.of_columns, chat.fault) if form == "chat" else (items.of_columns, items.alpaca_fault)
    named = [of_columns(row, names or {}) for row in raw]
    faults = [fault(row) for row in named]
    kept = usable(named, faults, what, "row", max_skipped)
    return cast("list[TextRow]", kept), _faulty(faults)  # ``fault`` passes no others


def _faulty(faults: Sequence[str]) -> list[int]:
    return [number for number, fault in enumerate(faults, 1) if fault]


def benchmark(source: str, task: str, max_skipped: float = 0.0) -> tuple[list[items.Item], list[int]]:
    """Return a benchmark's items in the raw fields that lm-eval's task reads, and the numbers of those left out.

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
                f"data.benchmarks: {path} does not exist, and section evaluate names {task}. Add the file "
                f"(fields: {fields}) or take the task out"
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
    return cast("list[items.Item]", kept), _faulty(faults)


def _examples(source: str, task: str, count: int) -> tuple[list[object], list[int]]:
    """Return the rows that a task's examples are taken from.

    Raises:
        FetchError: They cannot be had, or are fewer than the examples.
    """
    if source == "hub":
        where = tasks.hub_source(task)
        what = f"data.benchmarks: hub data set {where.path}"
        found = _hub_rows(where.path, split=further.examples_split(task), name=where.name, **where.options)
    else:
        path = Path(source.removeprefix("path:")) / f"{task}.fewshot.jsonl"
        what = f"data.benchmarks: {path}"
        found = rows.read(path, what)
    if len(found) < count:
        raise FetchError(
            f"{what} has {len(found)} examples and evaluate.num_fewshot shows {count} of them; add some or lower it"
        )
    return found, []


def _text(source: str | None) -> tuple[list[dict[str, str]], list[int]]:
    """Return a text file as one item.

    Raises:
        FetchError: It cannot be read, or is empty.
    """
    if source is None:
        return [], []
    path = Path(source.removeprefix("path:"))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FetchError(f"evaluate.text: {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FetchError(
            f"evaluate.text: {path} is no UTF-8 text (byte {error.start}); convert it, such as with iconv"
        ) from None
    if not text.strip():
        raise FetchError(f"evaluate.text: {path} is empty; name a text")
    return [{further.TEXT: text}], []


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
            f"data: hub data set {path} ({split}) cannot be had: {packages.reason(str(error))}. Check that this "
            "machine reaches the hub, or use path:<file or folder>"
        ) from error
