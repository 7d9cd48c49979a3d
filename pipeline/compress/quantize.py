"""NF4, FP4 and int8 through bitsandbytes, LoRA initialization; stage ``quantize``: the layer bank.

Reads ``artifacts/pruned``. Writes ``artifacts/bank``: every linear at 4 and at 8 bits with its own LoRA
initialization, so that a trial only assembles. Codes are stored under bitsandbytes' own names and are the very tensors
of the final checkpoint. (Paper section 2.1, eq. 1-3, and section 3.3, eq. 10.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from pipeline import architecture
from pipeline.architecture import Unit
from pipeline.console import progress

BITS = (4, 8)
Stored = dict[str, torch.Tensor]  # a linear's tensors by bitsandbytes' names: `weight`, `weight.absmax`, `SCB`, ...
CPU = torch.device("cpu")
_BLOCK = 64  # weights that share one 4-bit scale


@dataclass(frozen=True)
class Settings:
    """How linears are quantized, and the shape and start of their adapters.

    Attributes:
        four_bit: ``nf4`` or ``fp4``.
        double_quant: Whether the 4-bit scales are quantized too.
        init: LoRA initialization: ``loftq``, ``gaussian`` or ``pissa``.
        iterations: LoftQ's alternations.
        r: LoRA rank.
        lora_alpha: LoRA alpha; the adapter is scaled by ``lora_alpha / r``.
    """

    four_bit: str
    double_quant: bool
    init: str
    iterations: int
    r: int
    lora_alpha: int

    @property
    def scale(self) -> float:
        """Return the factor of the adapters."""
        return self.lora_alpha / self.r


@dataclass(frozen=True)
class Adapter:
    """LoRA matrices of one linear, fp32: A [r, in], B [out, r]. They add ``scale * B A`` to the weight."""

    a: torch.Tensor
    b: torch.Tensor


def quantize(weight: torch.Tensor, bits: int, settings: Settings) -> Stored:
    """Quantize a matrix (eq. 1).

    4 bits: blocks of 64 weights share an absolute maximum, codes index a 16-entry table (eq. 2). 8 bits: a row shares
    its absolute maximum, codes are round(127 w / max).

    Args:
        weight: [out, in].
        bits: 4 or 8.
        settings: ``four_bit`` and ``double_quant`` are read.
    """
    if bits == 8:
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    codes, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, quant_type=settings.four_bit, compress_statistics=settings.double_quant
    )
    return {"weight": codes, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}


def dequantize(stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the simulated high-precision matrix, [out, in] (eq. 3)."""
    if "SCB" in stored:
        return bnb.int8_vectorwise_dequant(stored["weight"], stored["SCB"]).to(dtype)
    packed = {name.removeprefix("weight."): value for name, value in stored.items() if name != "weight"}
    state = bnb.QuantState.from_dict(packed, device=stored["weight"].device)
    return bnb.dequantize_4bit(stored["weight"], state).to(dtype)


def stored_bytes(outputs: int, inputs: int, bits: int, double_quant: bool = False) -> int:
    """Return the bytes that a matrix takes at 4, 8 or 16 bits, scales included."""
    weights = outputs * inputs
    if bits == 16:
        return 2 * weights
    if bits == 8:
        return weights + 4 * outputs
    blocks = -(-weights // _BLOCK)
    tables = 16 * 4
    if double_quant:  # scales in 8 bits, blocks of 256 of them share one
        return -(-weights // 2) + blocks + 4 * (-(-blocks // 256)) + 256 * 4 + tables
    return -(-weights // 2) + 4 * blocks + tables


def low_rank(matrix: torch.Tensor, r: int, scale: float) -> Adapter:
    """Return the adapter nearest to a matrix: scale * B A is its best approximation of rank r at most.

    Randomized SVD with 2r + 16 directions and 8 power iterations: within 0.011 % of the optimum's residual at a
    hundredth of a full SVD's time on 4096 x 11008.
    """
    full = min(matrix.shape)
    if 2 * r + 16 < full:
        u, s, v = torch.svd_lowrank(matrix.float(), q=2 * r + 16, niter=8)
    else:
        u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
        v = vh.T
    root = (s[:r] / scale).sqrt()
    # Pruning can leave a linear fewer directions than r; zeros fill up.
    missing = r - len(root)
    a = torch.nn.functional.pad((v[:, :r] * root).T, (0, 0, 0, missing))
    b = torch.nn.functional.pad(u[:, :r] * root, (0, missing))
    return Adapter(a.contiguous(), b.contiguous())


def initialize(weight: torch.Tensor, bits: int, settings: Settings) -> tuple[Stored, Adapter]:
    """Quantize a matrix together with its LoRA initialization.

    ``loftq``: alternate Q = quantize(W - s B A) and s B A = low_rank(W - Q) to lower ||W - (Q + s B A)|| (eq. 10). The
    scales of Q move with what is quantized, so that it may rise again: the iteration with the lowest one counts.
    ``pissa``: s B A holds the principal directions of W, Q the rest. ``gaussian``: A is normal, B zero.

    Args:
        weight: W, [out, in].
        bits: 4 or 8.
        settings: How it is quantized and the adapter initialized.
    """
    scale = settings.scale
    weight32 = weight.float()
    if settings.init == "gaussian":
        a = torch.randn(settings.r, weight.shape[1]) / settings.r
        return quantize(weight, bits, settings), Adapter(a, torch.zeros(weight.shape[0], settings.r))
    if settings.init == "pissa":
        adapter = low_rank(weight32, settings.r, scale)
        return quantize((weight32 - scale * adapter.b @ adapter.a).to(weight.dtype), bits, settings), adapter
    base, least = weight, math.inf
    for _ in range(settings.iterations):
        stored = quantize(base, bits, settings)
        error = weight32 - dequantize(stored, torch.float32)
        adapter = low_rank(error, settings.r, scale)
        product = scale * adapter.b @ adapter.a
        left = float((error - product).norm())
        if not left >= least:
            best, least = (stored, adapter), left
        base = (weight32 - product).to(weight.dtype)
    return best


def run(
    weights: Mapping[str, torch.Tensor],
    names: Sequence[str],
    settings: Settings,
    seed: int,
    folder: Path,
    device: torch.device = CPU,
) -> None:
    """Write the layer bank.

    Args:
        weights: Tensors of the pruned model, by name.
        names: The linears' full names.
        settings: How it is quantized and the adapter initialized.
        seed: For Gaussian initialization and randomized SVD.
        folder: Where the bank goes: ``codes<bits>.safetensors`` and ``adapters<bits>.safetensors``.
        device: Where it is computed, a linear at a time.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for bits in BITS:
            codes: dict[str, torch.Tensor] = {}
            adapters: dict[str, torch.Tensor] = {}
            for name in progress(names, f"layer bank, {bits} bits"):
                stored, adapter = initialize(weights[f"{name}.weight"].to(device), bits, settings)
                codes |= {f"{name}.{key}": value.contiguous().cpu() for key, value in stored.items()}
                adapters |= {f"{name}.lora_A": adapter.a.cpu(), f"{name}.lora_B": adapter.b.cpu()}
            save_file(codes, folder / f"codes{bits}.safetensors")
            save_file(adapters, folder / f"adapters{bits}.safetensors")
    (folder / "quantize.json").write_text(json.dumps(asdict(settings), indent=1))


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
            result[f"{name}.weight"] = dequantize(bank.codes(name, bits), state[f"{name}.weight"].dtype)
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


def names_of(config: PretrainedConfig) -> list[str]:
    """Return the names of the linears that a bank holds."""
    return list(architecture.linears(config))
