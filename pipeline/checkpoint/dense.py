"""A built model as plain dense linears: on a CPU several times as fast as bitsandbytes' modules."""

from __future__ import annotations

from typing import cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers import PreTrainedModel

_ADAPTER = "default"  # PEFT's name of the only one


@torch.no_grad()
def dense(model: PeftModel) -> PreTrainedModel:
    """Return the built model with each linear dequantized once and its adapter added; takes the model apart.

    W' = W + scaling * B A, summed in 32 bits and rounded to the type that the model computes in. It answers as trials
    on a CPU do. bitsandbytes' int8 modules round what they receive, too, and so differ by that.
    """
    base = cast("PreTrainedModel", model.get_base_model())
    adapted = [(name, layer) for name, layer in base.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in adapted:
        inner = cast(nn.Linear, layer.get_base_layer())
        a, b = (cast(nn.Linear, part[_ADAPTER]).weight.float() for part in (layer.lora_A, layer.lora_B))
        weight = _weight(inner).float() + layer.scaling[_ADAPTER] * (b @ a)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=inner.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(base.config.dtype), requires_grad=False)
        if inner.bias is not None:
            linear.bias = inner.bias
        base.set_submodule(name, linear)
    return base.eval()


def _weight(linear: nn.Linear) -> torch.Tensor:
    """Return what a linear's codes stand for, [out, in]."""
    if isinstance(linear, bnb.nn.Linear8bitLt):
        return dequantize_bnb_weight(linear.weight, linear.state)
    return dequantize_bnb_weight(linear.weight) if isinstance(linear, bnb.nn.Linear4bit) else linear.weight
