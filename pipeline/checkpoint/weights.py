"""Whether a model folder holds the model that its config describes, judged before anything loads.

A loader makes up what it does not find: a tensor that is missing, or has another name, becomes a random one. Names and
shapes are therefore compared with those of the model itself, built on ``meta`` tensors; values are read once.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline.checkpoint.configs import first_line
from pipeline.checkpoint.headers import DENSE, INDEX, WHOLE, Tensor, WeightsError, tensors, weight_files
from pipeline.checkpoint.pruned import buildable
from pipeline.console import note
from pipeline.storage import write_text

_WRAPPERS = ("module.", "base_model.model.")  # of data parallel training and of PEFT, before a name
_COMPILED = "_orig_mod."  # of torch.compile, anywhere in it
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints hold it; models compute it
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SHOWN = 5  # names of a list


@dataclass(frozen=True)
class Weights:
    """The weights of a folder that hold what its config describes.

    Attributes:
        files: The files that hold them.
        names: Name in the files -> name in the model.
        places: Name in the files -> the file.
        parameters: Number of parameters, a tied head counted once.
    """

    files: tuple[Path, ...]
    names: Mapping[str, str]
    places: Mapping[str, Path]
    parameters: int

    @property
    def renamed(self) -> bool:
        """Whether the files use other names than the model."""
        return any(name != clean for name, clean in self.names.items())


def check(folder: Path, config: PretrainedConfig) -> Weights:
    """Compare the weights of a folder with the model that its config describes, and read each value once.

    Raises:
        WeightsError: A file is damaged; a tensor is missing, unexpected, of another shape, or holds no numbers.
    """
    files = weight_files(folder)
    held = tensors(files)
    expected = _shapes(config)
    names = _clean_names(held, expected)
    given = {clean: held[name] for name, clean in names.items()}
    _compare(given, expected, config)
    if any(name != clean for name, clean in names.items()):
        example = next((name, clean) for name, clean in names.items() if name != clean)
        note(f"the weights are named as in {example[0]}; they are taken as {example[1]} and its like")
    _read_values(files, {name: clean for name, clean in names.items() if clean in expected}, config)
    counted = [shape for name, shape in expected.items() if not (config.tie_word_embeddings and name == _HEAD)]
    places = {name: tensor.file for name, tensor in held.items()}
    return Weights(tuple(files), names, places, sum(map(math.prod, counted)))


def copy(weights: Weights, folder: Path) -> None:
    """Copy weights into another folder, under the names that the model gives them."""
    for file in weights.files:
        if not weights.renamed:
            shutil.copyfile(file, folder / file.name)
            continue
        with safe_open(file, "pt") as stored:
            # In memory one file at a time.
            part = {weights.names[name]: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        save_file(part, folder / file.name, metadata={"format": "pt"})
    if weights.files[0].name != WHOLE:  # the index anew: transformers stumbles over some that are understood here
        places = {weights.names[name]: file.name for name, file in weights.places.items()}
        write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": places}, indent=1))


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a model's tensors, without the memory for them."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(buildable(config), trust_remote_code=False)
    except Exception as error:  # of many kinds, all of them from values out of the file
        raise WeightsError(
            f"config.json describes no model that can be built: {first_line(error)}; take the model's own config"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _clean_names(held: Iterable[str], expected: Mapping[str, object]) -> dict[str, str]:
    """Return name in the files -> name in the model; what wrappers put before it is taken off."""
    names: dict[str, str] = {}
    for name in held:
        clean = name.replace(_COMPILED, "")
        while wrapper := next((prefix for prefix in _WRAPPERS if clean.startswith(prefix)), ""):
            clean = clean.removeprefix(wrapper)
        if clean not in expected and f"model.{clean}" in expected:  # saved without its language model's head
            clean = f"model.{clean}"
        names[name] = clean
    if len(set(names.values())) < len(names):
        first: dict[str, str] = {}
        twice = next((name, first[clean]) for name, clean in names.items() if first.setdefault(clean, name) != name)
        raise WeightsError(f"the weights hold {names[twice[0]]} twice, as {' and '.join(twice)}; save the model again")
    return names


def _compare(given: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], config: PretrainedConfig) -> None:
    if adapters := [name for name in given if "lora_" in name]:
        raise WeightsError(f"the weights hold an adapter ({adapters[0]}); merge it first: model.merge_and_unload()")
    optional = {_HEAD} if config.tie_word_embeddings else set()
    faults = []
    blocks = {int(match[1]) for name in given if (match := _BLOCK.match(name))}
    if blocks and max(blocks) + 1 != config.num_hidden_layers:
        faults.append(f"config.json says {config.num_hidden_layers} blocks, and the weights have {max(blocks) + 1}")
    else:
        missing = [name for name in expected if name not in given and name not in optional]
        unexpected = [name for name in given if name not in expected and not _COMPUTED.search(name)]
        if missing:
            faults.append(f"the weights lack {_listed(missing)}")
        if unexpected:
            faults.append(f"the weights hold {_listed(unexpected)}, which the model does not have")
    for name, tensor in given.items():
        if name not in expected:
            continue
        if 0 in tensor.shape:
            faults.append(f"{name} in {tensor.file.name} is empty: its shape is {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            faults.append(f"{name} has shape {list(tensor.shape)}, and config.json asks for {list(expected[name])}")
        elif tensor.dtype not in DENSE:
            faults.append(f"{name} is stored as {tensor.dtype}: quantized, or no weight")
    if faults:
        shown = faults[:_SHOWN] + ([f"and {len(faults) - _SHOWN} more faults"] if len(faults) > _SHOWN else [])
        files = ", ".join(sorted({tensor.file.name for tensor in given.values()})[:3])
        raise WeightsError(
            f"{files}: {'; '.join(shown)}. Nothing is made up for what does not fit: take config and weights of the "
            "same model, or save it again with transformers' save_pretrained"
        )


def _read_values(files: Iterable[Path], names: Mapping[str, str], config: PretrainedConfig) -> None:
    """Read tensor by tensor; refuse NaN, infinities, and weights that are all zero."""
    compared: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
                    if name in names:
                        tensor = stored.get_tensor(name)
                        _refuse_values(file, name, tensor)
                        if config.tie_word_embeddings and names[name] in (_HEAD, _EMBEDDING):
                            compared[names[name]] = tensor
        except SafetensorError as error:
            raise WeightsError(f"{file.name} cannot be read: {error}; download it again") from None
    if len(compared) == 2 and not torch.equal(*compared.values()):
        raise WeightsError(
            f"config.json ties {_HEAD} to {_EMBEDDING}, and the weights hold two different ones; set "
            "tie_word_embeddings to false, or leave one of them out"
        )


def _refuse_values(file: Path, name: str, tensor: torch.Tensor) -> None:
    low, high = (float(value) for value in tensor.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        kind = "NaN" if math.isnan(low) or math.isnan(high) else "infinite values"
        raise WeightsError(f"{file.name}: {name} holds {kind}; take a sound checkpoint of the model")
    if low == high == 0 and not name.endswith(".bias"):
        raise WeightsError(f"{file.name}: {name} is all zeros; take a sound checkpoint of the model")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
