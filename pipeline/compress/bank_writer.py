"""The codes of each linear with the start of its adapter (paper section 3.3, eq. 10), written as the layer bank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline import console
from pipeline.compress import codes, linear_grams, lowrank, quantize
from pipeline.compress.layer_bank import BITS
from pipeline.compress.quantize import Adapter, Settings, Stored
from pipeline.console import progress
from pipeline.errors import UserError

CPU = torch.device("cpu")


class BankError(UserError):
    """What a linear receives is not finite."""


@dataclass(frozen=True)
class Inputs:
    """What the linears of a group receive.

    Attributes:
        gram: X^T X of their inputs X, or a multiple of it: [in, in].
    """

    gram: torch.Tensor

    @cached_property
    def root(self) -> torch.Tensor:
        """Return the root that weighted adapters are fitted with, [in, in]."""
        return lowrank.root(self.gram)


def initialize(
    weights: Sequence[torch.Tensor], bits: int, settings: Settings, inputs: Inputs | None = None
) -> list[tuple[Stored, Adapter]]:
    """Quantize matrices together with their LoRA initializations.

    ``loftq``: alternate Q = quantize(W - s B A) and s B A = low_rank(W - Q) to lower ||W - (Q + s B A)|| (eq. 10). The
    scales of Q move with what is quantized, so that it may rise again: the iteration with the lowest one counts.
    ``weighted``: the same for ||X (W - (Q + s B A))^T||, X the inputs. ``pissa``: s B A holds the principal directions
    of W, Q the rest. ``gaussian``: A is normal, B zero.

    Args:
        weights: Each W, [out, in], of linears that receive the same inputs.
        bits: 4 or 8.
        settings: How they are quantized and the adapters initialized.
        inputs: What they receive; None: codes are rounded to the nearest, and ``weighted`` is ``loftq``.
    """
    scale = settings.scale
    dense = [weight.float() for weight in weights]
    if settings.init == "gaussian":
        drawn = [torch.randn(settings.r, weight.shape[1]) / settings.r for weight in weights]
        adapters = [Adapter(a, torch.zeros(len(weight), settings.r)) for a, weight in zip(drawn, weights, strict=True)]
        return list(zip(_rounded(weights, bits, settings, inputs), adapters, strict=True))
    if settings.init == "pissa":
        adapters = [quantize.low_rank(weight, settings.r, scale) for weight in dense]
        rest = [
            (weight - scale * adapter.b @ adapter.a).to(stored.dtype)
            for weight, adapter, stored in zip(dense, adapters, weights, strict=True)
        ]
        return list(zip(_rounded(rest, bits, settings, inputs), adapters, strict=True))
    root = inputs.root.float() if inputs is not None and settings.init == "weighted" else None
    bases, least = list(weights), [math.inf] * len(weights)
    best: dict[int, tuple[Stored, Adapter]] = {}
    for _ in range(settings.iterations):
        for place, stored in enumerate(_rounded(bases, bits, settings, inputs)):
            error = dense[place] - quantize.dequantize(stored, torch.float32)
            if root is None:
                adapter = quantize.low_rank(error, settings.r, scale)
            else:
                adapter = lowrank.weighted(error, root, settings.r, scale)
            product = scale * adapter.b @ adapter.a
            left = float((error - product if root is None else (error - product) @ root).norm())
            if not left >= least[place]:
                best[place], least[place] = (stored, adapter), left
            bases[place] = (dense[place] - product).to(weights[place].dtype)
    return [best[place] for place in range(len(weights))]


def _rounded(weights: Sequence[torch.Tensor], bits: int, settings: Settings, inputs: Inputs | None) -> Sequence[Stored]:
    if settings.method == "calibrated" and bits == 4 and inputs is not None:
        return codes.calibrated(weights, inputs.gram, bits, settings.four_bit, settings.double_quant)
    return [quantize.quantize(weight, bits, settings) for weight in weights]


def write(
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[Sequence[str]],
    settings: Settings,
    seed: int,
    folder: Path,
    device: torch.device = CPU,
    grams: Iterable[Mapping[str, torch.Tensor | None]] = (),
    tokens: int = 0,
) -> int:
    """Write the layer bank; return how many linears had too little calibration text, so that inputs were not heeded.

    Args:
        weights: Tensors of the pruned model, by name.
        groups: Full names of the linears, those with the same inputs together, block after block.
        settings: How they are quantized and the adapters initialized.
        seed: For Gaussian initialization and randomized SVD.
        folder: Where the bank goes: ``codes<bits>.safetensors`` and ``adapters<bits>.safetensors``.
        device: Where it is computed, a group at a time.
        grams: Of each block the Gram matrices of its linears' inputs (``linear_grams.collect``); read if
            ``settings.reads_inputs``.
        tokens: That they come from.

    Raises:
        BankError: A Gram matrix is not finite.
    """
    known = _inputs(groups, iter(grams), tokens) if settings.reads_inputs else (None for _ in groups)
    stored_at: dict[int, dict[str, torch.Tensor]] = {bits: {} for bits in BITS}
    adapters_at: dict[int, dict[str, torch.Tensor]] = {bits: {} for bits in BITS}
    unheeded = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for group, inputs in zip(progress(groups, "layer bank"), known, strict=True):
            unheeded += len(group) if settings.reads_inputs and inputs is None else 0
            here = [weights[f"{name}.weight"].to(device) for name in group]
            there = None if inputs is None else Inputs(inputs.gram.to(device))
            for bits in BITS:
                for name, (stored, adapter) in zip(group, initialize(here, bits, settings, there), strict=True):
                    stored_at[bits] |= {f"{name}.{key}": value.contiguous().cpu() for key, value in stored.items()}
                    adapters_at[bits] |= {f"{name}.lora_A": adapter.a.cpu(), f"{name}.lora_B": adapter.b.cpu()}
    for bits in BITS:
        save_file(stored_at[bits], folder / f"codes{bits}.safetensors")
        save_file(adapters_at[bits], folder / f"adapters{bits}.safetensors")
    (folder / "quantize.json").write_text(json.dumps(asdict(settings), indent=1))
    if unheeded:
        console.note(
            f"{unheeded} linears are rounded to the nearest: too few of {tokens} calibration tokens reach them; "
            f"{linear_grams.tokens_needed(_widest(weights, groups))} would do for each (quantize.samples, "
            "quantize.max_length)"
        )
    return unheeded


def _inputs(
    groups: Sequence[Sequence[str]], grams: Iterator[Mapping[str, torch.Tensor | None]], tokens: int
) -> Iterator[Inputs | None]:
    """Yield what each group receives; None where the tokens are too few to tell.

    Raises:
        BankError: A Gram matrix is not finite.
    """
    block: Mapping[str, torch.Tensor | None] = {}
    for group in groups:
        if group[0] not in block:
            block = next(grams)
        gram = block[group[0]]
        if gram is None:
            yield None
            continue
        if not gram.isfinite().all():
            raise BankError(
                f"{group[0]}: what this layer receives is not finite (NaN or infinite), so its codes cannot be "
                "calibrated; check the weights of the blocks up to it, compute in another type (dtype), or set "
                "quantize.method to nearest and quantize.init to loftq"
            )
        yield Inputs(gram) if linear_grams.enough_tokens(len(gram), tokens) else None


def _widest(weights: Mapping[str, torch.Tensor], groups: Sequence[Sequence[str]]) -> int:
    return max(weights[f"{group[0]}.weight"].shape[1] for group in groups)
