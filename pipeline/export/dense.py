"""A built model's weights as plain tensors: codes turned back into weights, adapters added or beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline import architecture, checkpoint, storage
from pipeline.compress import quantize
from pipeline.compress.quantize import Stored
from pipeline.device import Compute

Load = Callable[[str], torch.Tensor]  # from a name to a tensor


@dataclass(frozen=True)
class Adapter:
    """LoRA matrices of a linear, fp32: ``a`` [r, in], ``b`` [out, r], with the factor in ``b``. They add b a."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def delta(self) -> torch.Tensor:
        """Return what they add to the weight: [out, in]."""
        return self.b @ self.a


@dataclass(frozen=True)
class Dense:
    """A model as tensors, each turned back into weights when it is asked for.

    Attributes:
        config: As transformers loads it, with the shapes of the blocks.
        tensors: Name, as in the checkpoint -> tensor; without the quantized weights.
        codes: Full name of a quantized linear -> its tensors by bitsandbytes' names.
        bits: Full name of a quantized linear -> 4 or 8.
        adapters: Full name of a linear -> its adapter.
    """

    config: Any
    tensors: Mapping[str, torch.Tensor]
    codes: Mapping[str, Stored]
    bits: Mapping[str, int]
    adapters: Mapping[str, Adapter]

    def base(self, name: str) -> torch.Tensor:
        """Return a linear's weight as its codes say, fp32: [out, in]."""
        if name in self.codes:
            return quantize.dequantize(self.codes[name], torch.float32)
        return self.tensors[f"{name}.weight"].float()

    def merged(self, name: str) -> torch.Tensor:
        """Return a linear's weight with its adapter added, fp32: [out, in]."""
        weight = self.base(name)
        return weight + self.adapters[name].delta if name in self.adapters else weight

    def model(self, compute: Compute) -> PreTrainedModel:
        """Return the model with plain dense linears: on a CPU several times as fast as bitsandbytes' modules.

        Weights are summed in 32 bits and rounded to the type that the model computes in, as in trials on a CPU.
        bitsandbytes' int8 modules round what they receive, too, and so differ by that.
        """
        config = copy.deepcopy(self.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        state = dict(self.tensors) | {f"{name}.weight": self.merged(name) for name in architecture.linears(config)}
        state = {name: value.to(compute.dtype) for name, value in state.items()}
        return checkpoint.from_state(config, state, compute.device).eval()


def read(folder: str | Path) -> Dense:
    """Read a checkpoint, untouched or built, without building a model."""
    folder = Path(folder)
    config = checkpoint.load_config(folder)
    settings = getattr(config, "quantization_config", None) or {}
    bits: dict[str, int] = dict((settings if isinstance(settings, dict) else settings.to_dict()).get("linear_bits", {}))
    codes: dict[str, Stored] = {name: {} for name in bits}
    tensors: dict[str, torch.Tensor] = {}
    for key, value in checkpoint.load_state(folder).items():
        head, _, tail = key.partition("_proj.")
        if (name := f"{head}_proj") in codes and tail != "bias":
            codes[name][tail] = value
        else:
            tensors[key] = value
    return Dense(config, tensors, codes, bits, _adapters(folder / checkpoint.ADAPTER))


def _adapters(folder: Path) -> dict[str, Adapter]:
    if not folder.exists():
        return {}
    settings = storage.read_json(folder / "adapter_config.json", "build", {"r": int, "lora_alpha": int})
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        name.removeprefix("base_model.model."): Adapter(
            tensors[f"{name}.lora_A.weight"].float(), scale * tensors[f"{name}.lora_B.weight"].float()
        )
        for name in names
    }
