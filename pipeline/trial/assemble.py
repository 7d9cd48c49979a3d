"""The model of a bit vector: assembled from the layer bank, with adapters at their initialization."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import PreTrainedModel

from pipeline import checkpoint
from pipeline.compress import layer_bank
from pipeline.trial.adapters import linear_of, lora_config, train_in_full, use_byte_dropout
from pipeline.trial.context import Context


def assemble(context: Context, bits: Sequence[int], *, real: bool | None = None) -> PeftModel:
    """Build the model of a bit vector from the bank, with adapters at their initialization.

    Args:
        context: What trials share.
        bits: Bits of each unit.
        real: bitsandbytes' own modules (the default on CUDA), or weights dequantized once (elsewhere:
            equal for 4 bits, and several times faster than bitsandbytes is on a CPU).
    """
    widths = context.widths(bits)
    real = context.device.type == "cuda" if real is None else real
    if real:
        model = mixed_model(context, widths)
    else:
        simulated = layer_bank.simulated(context.state, context.bank, widths)
        model = checkpoint.from_state(context.config, simulated, context.device)
    on_cpu = context.device.type == "cpu"
    # On a CPU, adapters in the weights' type, byte dropout and plain attention double the speed of a training step.
    config = lora_config(context.config, context.bank.settings, context.settings.recover.dropout)
    with torch.random.fork_rng():  # a dense linear's adapter is drawn
        torch.manual_seed(context.settings.seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=not on_cpu)
    if on_cpu:
        use_byte_dropout(adapted, config.lora_dropout)
        model.set_attn_implementation("eager")
    set_adapters(adapted, context.bank, widths)
    if context.settings.recover.train == "full":
        train_in_full(adapted, {name for name, width in widths.items() if width != 16})
    return adapted


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Add the adapters to dense weights for a while: two thirds of the matrix products go, the sum is the same.

    The weights are put back as they were, to the bit.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    weights = [cast(nn.Linear, layer.get_base_layer()).weight for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    adapters = cast(LoraModel, model.base_model)
    adapters.merge_adapter()
    try:
        yield
    finally:
        adapters.unmerge_adapter()
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def trained_state(model: PeftModel, widths: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the tensors that full training may have changed, by the names they have in the pruned model."""
    state = {}
    for name, weight in model.get_base_model().named_parameters(remove_duplicate=False):  # a tied head by both names
        linear, _, kind = name.rpartition(".")
        quantized = kind == "weight" and widths.get(linear_of(name), 16) != 16
        if "lora_" not in name and not quantized:
            state[f"{linear.removesuffix('.base_layer')}.{kind}"] = weight.detach().cpu()
    return state


def mixed_model(context: Context, widths: Mapping[str, int]) -> PreTrainedModel:
    """Build a model of bitsandbytes' modules from the bank's codes, on the context's device."""
    config = copy.deepcopy(context.config)
    settings = context.bank.settings
    named = {name: bits for name, bits in widths.items() if bits != 16}
    if named:
        mixed = checkpoint.MixedBitsConfig(named, settings.four_bit, settings.double_quant)
        config.quantization_config = mixed.to_dict()
    return checkpoint.from_state(config, layer_bank.quantized(context.state, context.bank, widths), context.device)


def set_adapters(model: PeftModel, bank: layer_bank.Bank, widths: Mapping[str, int]) -> None:
    """Give each linear the bank's initialization for its bits; a dense linear keeps PEFT's (B = 0)."""
    base = model.get_base_model()
    with torch.no_grad():
        for name, bits in widths.items():
            if bits == 16:
                continue
            layer, adapter = cast(LoraLayer, base.get_submodule(name)), bank.adapter(name, bits)
            cast(nn.Linear, layer.lora_A["default"]).weight.copy_(adapter.a)
            cast(nn.Linear, layer.lora_B["default"]).weight.copy_(adapter.b)
