"""The layer bank on disk: every linear at 4 and at 8 bits with its LoRA initialization. A trial only assembles.

Codes are stored under bitsandbytes' own names and are the very tensors of the final checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from pipeline import architecture
from pipeline.architecture import Unit
from pipeline.compress import quantize
from pipeline.compress.quantize import Adapter, Settings, Stored

BITS = (4, 8)


class Bank:
    """The layer bank on disk, read tensor by tensor."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.settings = Settings(**json.loads((folder / "quantize.json").read_text()))
        self._codes = {bits: safe_open(folder / f"codes{bits}.safetensors", "pt") for bits in BITS}
        self._adapters = {bits: safe_open(folder / f"adapters{bits}.safetensors", "pt") for bits in BITS}
        self._keys: dict[int, dict[str, list[str]]] = {bits: {} for bits in BITS}
        for bits in BITS:
            for key in self._codes[bits].keys():  # noqa: SIM118  (safe_open is no mapping)
                head, _, tail = key.partition("_proj.")
                self._keys[bits].setdefault(f"{head}_proj", []).append(tail)

    @property
    def scale(self) -> float:
        """Return the factor of the adapters, lora_alpha / r."""
        return self.settings.scale

    def codes(self, name: str, bits: int) -> Stored:
        """Return a linear's stored tensors at a bit-width."""
        return {key: self._codes[bits].get_tensor(f"{name}.{key}") for key in self._keys[bits][name]}

    def adapter(self, name: str, bits: int) -> Adapter:
        """Return a linear's LoRA initialization at a bit-width."""
        tensors = self._adapters[bits]
        return Adapter(tensors.get_tensor(f"{name}.lora_A"), tensors.get_tensor(f"{name}.lora_B"))


def linear_bits(units: Iterable[Unit], bits: Sequence[int]) -> dict[str, int]:
    """Return each linear's bits from the bits of the units."""
    return {name: width for unit, width in zip(units, bits, strict=True) for name in unit.linears}


def simulated(state: Mapping[str, torch.Tensor], bank: Bank, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return a dense model's tensors with each linear replaced by its simulated quantization; 16 leaves it dense."""
    result = dict(state)
    for name, bits in widths.items():
        if bits != 16:
            result[f"{name}.weight"] = quantize.dequantize(bank.codes(name, bits), state[f"{name}.weight"].dtype)
    return result


def quantized(state: Mapping[str, torch.Tensor], bank: Bank, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return a mixed-bit model's tensors: codes for the quantized linears, the rest as it is."""
    result = {name: value for name, value in state.items() if name.removesuffix(".weight") not in widths}
    for name, bits in widths.items():
        if bits == 16:
            result[f"{name}.weight"] = state[f"{name}.weight"]
        else:
            result |= {f"{name}.{key}": value for key, value in bank.codes(name, bits).items()}
    return result


def groups_of(config: PretrainedConfig) -> list[tuple[str, ...]]:
    """Return the names of the linears that a bank holds; those that receive the same inputs stand together."""
    together = architecture.same_inputs(config)
    return [
        tuple(architecture.linear_name(block, name) for name in names)
        for block in range(config.num_hidden_layers)
        for names in together
    ]


def names_of(config: PretrainedConfig) -> list[str]:
    """Return the names of the linears that a bank holds."""
    return [name for group in groups_of(config) for name in group]
