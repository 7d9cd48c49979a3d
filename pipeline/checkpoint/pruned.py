"""Pruned models: a class for each family whose blocks have a shape each (config field ``block_shapes``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.architecture import BlockShape, channels_field, description, head_dim, shapes
from pipeline.checkpoint.experts import Experts
from pipeline.families import FAMILIES, Family

STORED = torch.bfloat16  # what every checkpoint holds, whatever a machine computes in


class _OfBlock:
    """What a block is built from and reads later: the whole model's config, but for the block's own sizes."""

    def __init__(self, whole: PretrainedConfig, shape: BlockShape):
        self._whole = whole
        self.num_attention_heads, self.num_key_value_heads = shape.heads, shape.kv_heads
        setattr(self, channels_field(whole), shape.channels)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "_whole":  # a copy asks before it has any attribute
            raise AttributeError(name)
        return getattr(self._whole, name)


class _PrunedConfig:
    """Adds ``block_shapes``: [heads, kv_heads, channels] of each block."""

    def validate_architecture(self) -> None:
        """Accept head counts that do not divide the hidden size: pruning takes whole heads."""

    def block(self, index: int) -> _OfBlock:
        """Return the config of one block; what it shares with the whole model it reads there, also later."""
        config = cast("PretrainedConfig", self)
        return _OfBlock(config, shapes(config)[index])


class _PrunedModel:
    """Builds each block at its own shape, with each expert a module of its own."""

    def __init__(self, config: _PrunedConfig, *args: object, **kwargs: object):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(config, "block_shapes", None):
            for index, block in enumerate(self.model.layers):  # type: ignore[attr-defined]
                block = type(block)(config.block(index), index)
                if (about := description(config).experts) is not None:  # type: ignore[arg-type]
                    block.set_submodule(about.module, Experts(block.get_submodule(about.module)))
                self.model.layers[index] = block  # type: ignore[attr-defined]
            self.post_init()  # type: ignore[attr-defined]


def _classes(family: str, about: Family) -> type[PreTrainedModel]:
    """Return a family's model class with a shape for each block; ``config_class`` is its config's."""

    def derived(name: str, base: str, mixin: type, **fields: object) -> type:
        fields |= {"__module__": __name__, "__doc__": f"{base} with a shape for each block."}
        return type(name, (mixin, getattr(transformers, base)), fields)

    name = about.model_class.removesuffix("ForCausalLM")
    config = derived(
        f"Pruned{name}Config", about.config_class, _PrunedConfig, model_type=f"pruned_{family}", block_shapes=None,
        __annotations__={"block_shapes": list | None},
    )  # fmt: skip
    return derived(f"Pruned{about.model_class}", about.model_class, _PrunedModel, config_class=config)


PRUNED: dict[str, type[PreTrainedModel]] = {family: _classes(family, about) for family, about in FAMILIES.items()}


def _config_class(model_class: type[PreTrainedModel]) -> type[PretrainedConfig]:
    return cast("type[PretrainedConfig]", model_class.config_class)  # only the base class may have none


def pruned_config(config: PretrainedConfig, block_shapes: list[BlockShape]) -> PretrainedConfig:
    """Return the ``pruned_*`` config of a model whose blocks have these shapes."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    # Qwen2 has no such field and takes hidden size / heads, which is wrong for a block that has lost heads.
    fields["head_dim"] = head_dim(config)
    fields["block_shapes"] = [[shape.heads, shape.kv_heads, shape.channels] for shape in block_shapes]
    return _config_class(PRUNED[config.model_type.removeprefix("pruned_")])(**fields)


def buildable(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config under which a model is built here: its own, or ``pruned_*`` where experts become linears."""
    if getattr(config, "block_shapes", None) or description(config).experts is None:
        return config
    return pruned_config(config, shapes(config))


def from_state(
    config: PretrainedConfig, state: dict[str, torch.Tensor], device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Build a model from tensors in memory, without touching the disk; it computes in the type of its embeddings."""
    name = config.model_type.removeprefix("pruned_")
    config = copy.deepcopy(config)
    config.dtype = state["model.embed_tokens.weight"].dtype
    # Without a device of its own, transformers puts a quantized model on a GPU and any other on the CPU.
    model = PRUNED[name].from_pretrained(None, config=config, state_dict=state, device_map=device)
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
    for model_class in PRUNED.values():
        config_class = _config_class(model_class)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
