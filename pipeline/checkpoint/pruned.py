"""Pruned models: Llama, Mistral, Qwen2 and Qwen3 whose blocks have a shape each (config field ``block_shapes``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.architecture import BlockShape, head_dim, shapes

STORED = torch.bfloat16  # what every checkpoint holds, whatever a machine computes in


class _PrunedConfig:
    """Adds ``block_shapes``: [heads, kv_heads, channels] of each block."""

    def validate_architecture(self) -> None:
        """Accept head counts that do not divide the hidden size: pruning takes whole heads."""

    def block(self, index: int) -> PretrainedConfig:
        """Return the config that one block is built from."""
        config = cast("PretrainedConfig", copy.copy(self))
        shape = shapes(config)[index]
        config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
        config.intermediate_size = shape.channels
        return config


class _PrunedModel:
    """Builds each block at its own shape."""

    def __init__(self, config: _PrunedConfig, *args: object, **kwargs: object):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(config, "block_shapes", None):
            for index, block in enumerate(self.model.layers):  # type: ignore[attr-defined]
                smaller = type(block)(config.block(index), index)
                # The attention reads settings that apply to the whole model, such as the implementation, from here.
                smaller.self_attn.config = config
                self.model.layers[index] = smaller  # type: ignore[attr-defined]
            self.post_init()  # type: ignore[attr-defined]


class PrunedLlamaConfig(_PrunedConfig, LlamaConfig):
    """Llama with a shape for each block."""

    model_type = "pruned_llama"
    block_shapes: list | None = None


class PrunedMistralConfig(_PrunedConfig, MistralConfig):
    """Mistral with a shape for each block."""

    model_type = "pruned_mistral"
    block_shapes: list | None = None


class PrunedQwen2Config(_PrunedConfig, Qwen2Config):
    """Qwen2 with a shape for each block."""

    model_type = "pruned_qwen2"
    block_shapes: list | None = None


class PrunedQwen3Config(_PrunedConfig, Qwen3Config):
    """Qwen3 with a shape for each block."""

    model_type = "pruned_qwen3"
    block_shapes: list | None = None


class PrunedLlamaForCausalLM(_PrunedModel, LlamaForCausalLM):
    """Llama whose blocks have a shape each."""

    config_class = PrunedLlamaConfig


class PrunedMistralForCausalLM(_PrunedModel, MistralForCausalLM):
    """Mistral whose blocks have a shape each."""

    config_class = PrunedMistralConfig


class PrunedQwen2ForCausalLM(_PrunedModel, Qwen2ForCausalLM):
    """Qwen2 whose blocks have a shape each."""

    config_class = PrunedQwen2Config


class PrunedQwen3ForCausalLM(_PrunedModel, Qwen3ForCausalLM):
    """Qwen3 whose blocks have a shape each."""

    config_class = PrunedQwen3Config


_PRUNED: dict[str, type[PreTrainedModel]] = {
    "llama": PrunedLlamaForCausalLM,
    "mistral": PrunedMistralForCausalLM,
    "qwen2": PrunedQwen2ForCausalLM,
    "qwen3": PrunedQwen3ForCausalLM,
}


def _config_class(model_class: type[PreTrainedModel]) -> type[PretrainedConfig]:
    return cast("type[PretrainedConfig]", model_class.config_class)  # only the base class may have none


def pruned_config(config: PretrainedConfig, block_shapes: list[BlockShape]) -> PretrainedConfig:
    """Return the ``pruned_*`` config of a model whose blocks have these shapes."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    # Qwen2 has no such field and takes hidden size / heads, which is wrong for a block that has lost heads.
    fields["head_dim"] = head_dim(config)
    fields["block_shapes"] = [[shape.heads, shape.kv_heads, shape.channels] for shape in block_shapes]
    return _config_class(_PRUNED[config.model_type.removeprefix("pruned_")])(**fields)


def from_state(
    config: PretrainedConfig, state: dict[str, torch.Tensor], device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Build a model from tensors in memory, without touching the disk; it computes in the type of its embeddings."""
    name = config.model_type.removeprefix("pruned_")
    config = copy.deepcopy(config)
    config.dtype = state["model.embed_tokens.weight"].dtype
    # Without a device of its own, transformers puts a quantized model on a GPU and any other on the CPU.
    model = _PRUNED[name].from_pretrained(None, config=config, state_dict=state, device_map=device)
    compute_in(model, config.dtype)
    return model


def stored(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a dense model's tensors in the type that checkpoints hold."""
    return {name: tensor.to(STORED) for name, tensor in state.items()}


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model compute in a type: dense weights and biases are cast, codes stay; changes the model."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for parameter in model.parameters():  # buffers keep theirs: rotary frequencies need 32 bits
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def register() -> None:
    """Make the pruned model types known to transformers; safe to call again."""
    for model_class in _PRUNED.values():
        config_class = _config_class(model_class)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
