"""LoRA over frozen linears as one autograd function for all linears that read the same input.

Plain PEFT keeps of each linear its input in 32 bits, what dropout made of it, a mask and, in a gated MLP, each product
on the way. Here an input is kept once, in its own type, with one mask of a byte a value; what can be computed again
from it is. A quantized weight is dequantized once in the forward pass and once in the backward pass. Adapters multiply
in the input's type. All linears that read an input see the same dropout of it; each value is dropped as likely as in
PEFT, by the bytes of ``adapters.ByteDropout``.

Below, x is [T, inputs], A of a linear [r, inputs], B [outputs, r], s the scale of its adapter, and with the mask m
    y = base(x) + s (m x) A' B'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.trial import adapters
from pipeline.trial.loss import unwrapped

Gradients = list[torch.Tensor]  # of A and B of each linear in turn

_GATED = 3  # linears of an MLP whose gate is not stored with what it gates


@dataclass(frozen=True)
class Linears:
    """Frozen linears that read the same input, each with an adapter.

    Attributes:
        bases: The linears.
        scales: Of their adapters.
        threshold: Of how many of 256 bytes a value of the input is dropped.
    """

    bases: Sequence[nn.Module]
    scales: Sequence[float]
    threshold: int

    def parted(self, tensors: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Return apart what the input is computed from and A and B of each adapter, which stand at the end."""
        count = len(tensors) - 2 * len(self.bases)
        return tensors[:count], tensors[count:]


@dataclass(frozen=True)
class Read:
    """What linears make of one input before their bases: kept from the forward to the backward pass.

    Attributes:
        x: The input, [T, inputs].
        kept: Which values dropout keeps, [T, inputs]; None: all.
        low: (m x) A' of all linears beside each other, [T, r of all].
    """

    x: torch.Tensor
    kept: torch.Tensor | None
    low: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, weights: Sequence[torch.Tensor], threshold: int) -> Read:
        """Draw the mask and multiply by all A at once."""
        kept = adapters.kept(x, threshold) if threshold else None
        return Read(x, kept, _dropped(x, kept, threshold) @ _beside(weights, x.dtype).T)


def _dropped(x: torch.Tensor, kept: torch.Tensor | None, threshold: int) -> torch.Tensor:
    return x if kept is None else x * kept * (256 / (256 - threshold))


def _beside(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the matrices A of all linears below each other: every second one of the weights."""
    return torch.cat([a.to(dtype) for a in weights[::2]])


def weight_of(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return a frozen linear's weight, [outputs, inputs], dequantized as bitsandbytes does in a backward pass."""
    if isinstance(base, bitsandbytes.nn.Linear8bitLt):
        state = base.state
        return state.CB.to(dtype, copy=True).mul_(state.SCB[:, None] * (1 / 127))
    if isinstance(base, bitsandbytes.nn.Linear4bit):
        return dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state).to(dtype)
    return cast(nn.Linear, base).weight


def _outputs(read: Read, linears: Linears, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return y of each linear."""
    found = []
    parts = read.low.split([len(a) for a in weights[::2]], 1)
    for base, scale, part, b in zip(linears.bases, linears.scales, parts, weights[1::2], strict=True):
        found.append(base(read.x).addmm_(part, b.to(part.dtype).T, alpha=scale))
    return found


def _gradients(
    read: Read, linears: Linears, weights: Sequence[torch.Tensor], outer: Sequence[torch.Tensor], wanted: bool
) -> tuple[torch.Tensor | None, Gradients]:
    """Return the gradients of x, if wanted, and of A and B of each linear from those of their outputs."""
    dtype, inner = read.x.dtype, None
    sizes = [len(a) for a in weights[::2]]
    low, of_b = torch.empty_like(read.low), []
    for base, scale, gradient, b, part, into in zip(
        linears.bases, linears.scales, outer, weights[1::2], read.low.split(sizes, 1), low.split(sizes, 1), strict=True
    ):
        of_b.append((gradient.T @ part).mul_(scale).to(b.dtype))
        into.copy_((gradient @ b.to(dtype)).mul_(scale))
        if wanted:
            weight = weight_of(base, dtype)
            inner = gradient @ weight if inner is None else inner.addmm_(gradient, weight)
            del weight
    of_a = (low.T @ _dropped(read.x, read.kept, linears.threshold)).split(sizes)
    if inner is not None:
        inner += _dropped(low @ _beside(weights, dtype), read.kept, linears.threshold)
    pairs = zip(of_a, of_b, weights[::2], strict=True)
    return inner, [gradient for a, b, weight in pairs for gradient in (a.to(weight.dtype), b)]


def _input(given: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what linears read: the one tensor that is given, or silu(gate) up of two."""
    if len(given) == 1:
        return given[0]
    gate, up = given
    return nn.functional.silu(gate).mul_(up)


def _of_given(given: Sequence[torch.Tensor], inner: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gradients of what is given from that of the input, which is overwritten."""
    if len(given) == 1:
        return (inner,)
    gate, up = given
    of_up = nn.functional.silu(gate).mul_(inner)
    return torch.ops.aten.silu_backward(inner.mul_(up), gate), of_up


class _Adapted(torch.autograd.Function):
    """Linears that read one input. What the input is computed from is kept, and the input is computed again from it."""

    @staticmethod
    def forward(ctx: Any, linears: Linears, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given, weights = linears.parted(tensors)
        read = Read.of(_input(given), weights, linears.threshold)
        ctx.linears = linears
        ctx.save_for_backward(read.kept, read.low, *tensors)
        return tuple(_outputs(read, linears, weights))

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, low, *tensors = ctx.saved_tensors
        given, weights = ctx.linears.parted(tensors)
        wanted = any(ctx.needs_input_grad[1 : 1 + len(given)])
        inner, others = _gradients(Read(_input(given), kept, low), ctx.linears, weights, outer, wanted)
        of_given = (None,) * len(given) if inner is None else _of_given(given, inner)
        return None, *of_given, *others


def _applied(layers: Sequence[LoraLayer], *given: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of layers that read the same input.

    Args:
        layers: Adapted linears.
        given: The input, [..., inputs], or gate and up of a gated MLP. Rows are flat in the products.
    """
    weights = [cast(nn.Linear, half["default"]).weight for layer in layers for half in (layer.lora_A, layer.lora_B)]
    bases, scales = zip(*((layer.get_base_layer(), layer.scaling["default"]) for layer in layers), strict=True)
    linears = Linears(bases, scales, _threshold(layers[0]))
    outputs = _Adapted.apply(linears, *(x.flatten(0, -2) for x in given), *weights)
    return [output.unflatten(0, given[0].shape[:-1]) for output in outputs]


def _threshold(layer: LoraLayer) -> int:
    """Return of how many of 256 bytes a value is dropped now."""
    dropout = layer.lora_dropout["default"]
    if not dropout.training:
        return 0
    return dropout.threshold if isinstance(dropout, adapters.ByteDropout) else round(256 * getattr(dropout, "p", 0))


@contextmanager
def used(model: PeftModel) -> Iterator[None]:
    """Let a model's adapted linears compute together for a while; blocks with a base that is trained stay plain."""
    base = cast(PreTrainedModel, unwrapped(model))
    about, changed = architecture.description(base.config), list[Any]()

    def give(module: Any, forward: Callable[..., Any]) -> None:
        module.forward = forward
        changed.append(module)

    for index in range(base.config.num_hidden_layers):
        layers = {
            name: cast(LoraLayer, base.get_submodule(architecture.linear_name(index, name)))
            for name in architecture.linear_names(base.config)
        }
        if any(weight.requires_grad for layer in layers.values() for weight in layer.get_base_layer().parameters()):
            continue
        for group in ("qkv", "o"):
            _give_together([layers[name] for name in about.groups[group]], give)
        for names in architecture.mlps(base.config):
            if len(names) != _GATED or getattr(base.config, about.activation) != "silu":
                continue
            *before, down = [layers[name] for name in names]
            mlp = base.get_submodule(architecture.linear_name(index, names[0]).rpartition(".")[0])
            give(mlp, lambda x, before=before, down=down: _applied([down], *_applied(before, x))[0])
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _give_together(layers: Sequence[LoraLayer], give: Callable[..., None]) -> None:
    """Let the first layer compute all; transformers asks for the others right after it, with the same input."""
    waiting: dict[int, torch.Tensor] = {}

    def first(x: torch.Tensor) -> torch.Tensor:
        output, *others = _applied(layers, x)
        waiting.update(enumerate(others))
        return output

    give(layers[0], first)
    for number, layer in enumerate(layers[1:]):
        give(layer, lambda x, number=number: waiting.pop(number))
