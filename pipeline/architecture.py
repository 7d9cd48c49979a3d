"""What the supported families look like inside: blocks, coupled structures, linears.

The only module that knows where heads, channels and linears are; torch is imported where a tensor is made, so that
settings are checked without it. Llama, Mistral, Qwen2 and Qwen3 share one
decoder block: grouped-query attention with ``q, k, v, o`` projections, then a gated MLP with ``gate, up, down``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = ATTENTION + MLP
TARGET_MODULES = [name.split(".")[1] for name in LINEARS]

# Coupled structures (paper section 3.1): removing an output neuron of a root removes the outputs that are multiplied
# with it and the inputs that read it. Followed from q and from gate through the block's graph, that closes on these.
COUPLED = {
    "attention": ((ATTENTION[0], "out"), (ATTENTION[1], "out"), (ATTENTION[2], "out"), (ATTENTION[3], "in")),
    "mlp": ((MLP[0], "out"), (MLP[1], "out"), (MLP[2], "in")),
}

# What one bit choice covers, finest last. Serving runtimes fuse q, k, v and gate, up, so that `group` is portable.
GRANULARITIES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "block": (("block", LINEARS),),
    "group": (("qkv", ATTENTION[:3]), ("o", ATTENTION[3:]), ("gate_up", MLP[:2]), ("down", MLP[2:])),
    "linear": tuple((name.split(".")[1], (name,)) for name in LINEARS),
}


class Config(Protocol):
    """What is read of a model's config: of transformers' own, pruned or not, or of a ``config.json`` as it is."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def model_type(self) -> str:
        """The family, as transformers names it."""


@dataclass(frozen=True)
class BlockShape:
    """Size of one transformer block.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads; each goes together with ``heads / kv_heads`` query heads.
        channels: MLP channels.
    """

    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Unit:
    """Linears that share one bit choice.

    Attributes:
        name: Such as ``3`` (a block) or ``3.qkv``.
        block: Index of the block.
        linears: Full module names.
    """

    name: str
    block: int
    linears: tuple[str, ...]


def family(config: Config) -> str:
    """Return the family of a config, pruned or not.

    Raises:
        ValueError: The family has no adapter.
    """
    name = config.model_type.removeprefix("pruned_")
    if name not in FAMILIES:
        raise ValueError(f"model family {config.model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    return name


def head_dim(config: Config) -> int:
    """Return the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shapes(config: Config) -> list[BlockShape]:
    """Return the shape of each block of a config, pruned or not."""
    pruned = getattr(config, "block_shapes", None)
    if pruned:
        return [BlockShape(*shape) for shape in pruned]
    whole = BlockShape(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return [whole] * config.num_hidden_layers


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of a causal language model."""
    return cast("nn.ModuleList", model.get_submodule("model.layers"))


def linear_name(block: int, name: str) -> str:
    """Return the full module name of a block's linear, such as ``model.layers.3.mlp.up_proj``."""
    return f"model.layers.{block}.{name}"


def linears(config: Config) -> Iterator[str]:
    """Yield the full name of every linear of every block, in the order of the blocks."""
    for block in range(config.num_hidden_layers):
        for name in LINEARS:
            yield linear_name(block, name)


def units(config: Config, granularity: str) -> tuple[Unit, ...]:
    """Return the units of a model: block by block, in the order of ``GRANULARITIES``."""
    return tuple(
        Unit(
            name=str(block) if granularity == "block" else f"{block}.{part}",
            block=block,
            linears=tuple(linear_name(block, name) for name in names),
        )
        for block in range(config.num_hidden_layers)
        for part, names in GRANULARITIES[granularity]
    )


def group_count(shape: BlockShape, kind: str) -> int:
    """Return how many coupled structures of a kind a block has: key/value heads or MLP channels."""
    return shape.kv_heads if kind == "attention" else shape.channels


def member_indices(config: Config, shape: BlockShape, name: str, groups: torch.Tensor) -> torch.Tensor:
    """Return the rows (or columns) of a linear that belong to coupled structures.

    Args:
        config: The model's config.
        shape: Shape of the block.
        name: The linear within its block, such as ``self_attn.q_proj``.
        groups: Indices of the structures, [n].

    Returns:
        Indices into the coupled dimension, [n * width], group by group.
    """
    import torch

    width = group_width(config, shape, name)
    return (groups[:, None] * width + torch.arange(width)).flatten()


def group_width(config: Config, shape: BlockShape, name: str) -> int:
    """Return how many rows or columns of a linear one coupled structure takes."""
    if name in MLP:
        return 1
    rows = head_dim(config)
    queries = name in (ATTENTION[0], ATTENTION[3])
    return rows * (shape.heads // shape.kv_heads) if queries else rows


def group_parameters(config: Config, shape: BlockShape, kind: str) -> int:
    """Return the number of parameters that leave with one coupled structure, biases included."""
    total = 0
    for name, side in COUPLED[kind]:
        width = group_width(config, shape, name)
        total += width * config.hidden_size
        total += width if side == "out" and has_bias(config, name) else 0
    return total


def has_bias(config: Config, name: str) -> bool:
    """Return whether a linear of this family carries a bias."""
    if family(config) == "qwen2":
        return name in ATTENTION[:3]
    if name in MLP:
        return bool(getattr(config, "mlp_bias", False))
    return bool(getattr(config, "attention_bias", False))


def linear_shape(config: Config, shape: BlockShape, name: str) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear in a block of this shape."""
    hidden, size = config.hidden_size, head_dim(config)
    queries, keys = shape.heads * size, shape.kv_heads * size
    return {
        ATTENTION[0]: (queries, hidden),
        ATTENTION[1]: (keys, hidden),
        ATTENTION[2]: (keys, hidden),
        ATTENTION[3]: (hidden, queries),
        MLP[0]: (shape.channels, hidden),
        MLP[1]: (shape.channels, hidden),
        MLP[2]: (hidden, shape.channels),
    }[name]


def dense_parameters(config: Config) -> int:
    """Return the number of parameters outside the linears' weights: embeddings, norms, biases, the head unless tied."""
    hidden = config.hidden_size
    total = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden + hidden
    for shape in shapes(config):
        total += 2 * hidden + (2 * head_dim(config) if family(config) == "qwen3" else 0)
        total += sum(linear_shape(config, shape, name)[0] for name in LINEARS if has_bias(config, name))
    return total


def parameters(config: Config) -> int:
    """Return the number of a model's parameters, a tied head counted once."""
    linear = (linear_shape(config, shape, name) for shape in shapes(config) for name in LINEARS)
    return dense_parameters(config) + sum(outputs * inputs for outputs, inputs in linear)


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Give a list that a forward pass fills with each block's output, [B, L, hidden].

    Transformers' own ``hidden_states`` end with the state after the last norm, not with the last block's output.
    """
    outputs: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _, inputs, output: outputs.append(output)) for block in blocks(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
