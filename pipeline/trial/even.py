"""An evenly pruned model stands for a pruned one before pruning: each block loses the same share.

A real pruning gives blocks their own shapes, and the search predicts those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline import GIB, architecture, checkpoint
from pipeline.architecture import BlockShape, Config
from pipeline.errors import UserError
from pipeline.trial import memory
from pipeline.trial.setting import Setting

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MARGIN = 0.95  # no pruning of the same ratio was seen to need less than this share of the even one's peak


class TooMuch(UserError):
    """A ratio that a model's blocks do not hold."""


def config_of(values: Mapping[str, object], origin: str) -> PretrainedConfig:
    """Return a config of transformers.

    Args:
        values: What its ``config.json`` holds.
        origin: What to call it in messages.

    Raises:
        UserError: The family is not supported, or a value is wrong.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    plain = {key: value for key, value in values.items() if key not in ("model_type", "quantization_config")}
    kind = str(values.get("model_type"))
    if not architecture.supported(kind):
        raise UserError(f"{origin}: {architecture.unsupported(kind)}")
    try:
        config = AutoConfig.for_model(kind, **plain)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{origin} is no valid config of {kind}: {error}") from None
    if fault := architecture.unlike(config):
        raise UserError(f"{origin} describes a model that is not supported: {fault}")
    return config


def pruned(config: PretrainedConfig, ratio: float, multiple_of: int = 1) -> PretrainedConfig:
    """Return the config of a model whose blocks each lose the same heads and channels.

    Heads go as far as whole key/value heads allow, channels make up the ratio.

    Args:
        config: The model's config.
        ratio: Of the whole model's parameters.
        multiple_of: The channels that stay are rounded down to a multiple of it.

    Raises:
        TooMuch: The blocks do not hold so many parameters.
    """
    before = architecture.shapes(config)
    share = ratio * architecture.parameters(config) / sum(_removable(config, shape) for shape in before)
    exact = [_smaller(config, shape, share) for shape in before] if share < 1 else []
    shapes = [replace(shape, channels=shape.channels // multiple_of * multiple_of) for shape in exact]
    if not shapes or any(shape.channels < 1 for shape in shapes):
        raise TooMuch(f"ratio {ratio} is more than the blocks hold; give a smaller one")
    return checkpoint.pruned_config(config, shapes)


def _smaller(config: Config, shape: BlockShape, share: float) -> BlockShape:
    """Return a block without a share of what can be removed from it: whole heads up to it, the rest in channels."""
    heads = min(int(share * shape.kv_heads + 1e-9), shape.kv_heads - 1)
    left = share * _removable(config, shape) - heads * architecture.group_parameters(config, shape, "attention")
    channels = round(left / architecture.group_parameters(config, shape, "mlp"))
    queries = shape.heads // shape.kv_heads
    return BlockShape(shape.heads - heads * queries, shape.kv_heads - heads, shape.channels - channels)


def _removable(config: Config, shape: BlockShape) -> int:
    return sum(
        architecture.group_parameters(config, shape, kind) * architecture.group_count(shape, kind)
        for kind in architecture.KINDS
    )


def bits_of(config: Config, eights: int, rest: int = 4) -> dict[str, int]:
    """Return the bits of each linear with the last ``eights`` blocks at 8 bits: those cost most by a hair."""
    first = config.num_hidden_layers - eights
    units = architecture.units(config, "block")
    return {name: 8 if unit.block >= first else rest for unit in units for name in unit.linears}


def least_training_gib(config: Config, ratio: float, multiple_of: int, setting: Setting) -> float:
    """Return the least peak memory of recovery that a ratio allows: all units at 4 bits, less a margin.

    Args:
        config: The model's config, transformers' own or one that ``fits.read`` returns.
        ratio: Of the whole model's parameters.
        multiple_of: The channels that stay in a block are a multiple of it.
        setting: Batch and adapter sizes.

    Raises:
        UserError: Transformers refuses the config, or the blocks do not hold so many parameters.
    """
    smaller = pruned(config_of(vars(config), "model.source"), ratio, multiple_of)
    return _MARGIN * memory.training(smaller, bits_of(smaller, 0), setting)[1] / GIB
