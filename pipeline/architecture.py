"""What follows from a family's description: blocks, coupled structures, linears, sizes, units of bits.

Families are described in ``families``; torch is imported where a tensor is made, so that settings are checked without
it. A block is attention, then a gated MLP. Its structures are key/value heads with their query heads, and MLP channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from pipeline.families import CHANNELS, FAMILIES, HEAD, HIDDEN, KEYS, QUERIES, REASONS, Family, Linear

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["FAMILIES", "BlockShape", "Config", "Unit"]

# Kinds of coupled structures (paper section 3.1), by what leaves with one: removing an output neuron of a root removes
# the outputs that are multiplied with it and the inputs that read it. Followed from q and from gate through the block's
# graph, that closes on these.
KINDS = {"attention": (QUERIES, KEYS), "mlp": (CHANNELS,)}
_KIND_OF = {axis: kind for kind, axes in KINDS.items() for axis in axes}
GRANULARITIES = ("block", "group", "linear")  # what one bit choice covers, finest last; `group` is portable


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


@dataclass(frozen=True)
class Member:
    """A part of a linear that coupled structures share out among them.

    Attributes:
        linear: The linear's name within its block.
        dim: 0: of its rows, which the structures put out; 1: of its columns, which read them.
        start: Its first row or column.
        width: Rows or columns of one structure.
        size: Rows or columns of all of them.
        bias: Whether each of its rows has a bias.
    """

    linear: str
    dim: int
    start: int
    width: int
    size: int
    bias: bool


def family(config: Config) -> str:
    """Return the family of a config, pruned or not.

    Raises:
        ValueError: The family has no description.
    """
    name = config.model_type.removeprefix("pruned_")
    if name not in FAMILIES:
        raise ValueError(unsupported(config.model_type))
    return name


def supported(name: object) -> bool:
    """Return whether a ``model_type`` is that of a supported family, pruned or not."""
    return isinstance(name, str) and name.removeprefix("pruned_") in FAMILIES


def unsupported(name: object) -> str:
    """Return what to say of a ``model_type`` that is not supported."""
    reason = f" ({REASONS[str(name)]})" if str(name) in REASONS else ""
    return (
        f"model family {str(name)[:40]!r} is not supported{reason}; use one of {', '.join(FAMILIES)}. Another one "
        "takes a description of its linears, norms and what couples them (docs/families.md)"
    )


def defaults(name: object) -> Mapping[str, object]:
    """Return what a ``config.json`` of a ``model_type`` may leave out, where most families have another default."""
    return FAMILIES[str(name).removeprefix("pruned_")].defaults if supported(name) else {}


def description(config: Config) -> Family:
    """Return the description of a config's family."""
    return FAMILIES[family(config)]


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


def linear_names(config: Config) -> tuple[str, ...]:
    """Return the names that a block's linears have within it."""
    return tuple(linear.name for linear in description(config).linears)


def linear_of(config: Config, name: str) -> Linear:
    """Return the description of a linear by its name within its block."""
    return next(linear for linear in description(config).linears if linear.name == name)


def target_modules(config: Config) -> list[str]:
    """Return the names by which PEFT finds the linears."""
    return [name.rpartition(".")[2] for name in linear_names(config)]


def linears(config: Config) -> Iterator[str]:
    """Yield the full name of every linear of every block, in the order of the blocks."""
    for block in range(config.num_hidden_layers):
        for name in linear_names(config):
            yield linear_name(block, name)


def parts(config: Config, granularity: str) -> Mapping[str, tuple[str, ...]]:
    """Return what one bit choice covers in a block, in the order of the computation: name -> linears."""
    if granularity == "group":
        return description(config).groups
    names = linear_names(config)
    return {"block": names} if granularity == "block" else {name.rpartition(".")[2]: (name,) for name in names}


def units(config: Config, granularity: str) -> tuple[Unit, ...]:
    """Return the units of a model: block by block, in the order of ``parts``."""
    return tuple(
        Unit(
            name=str(block) if granularity == "block" else f"{block}.{part}",
            block=block,
            linears=tuple(linear_name(block, name) for name in names),
        )
        for block in range(config.num_hidden_layers)
        for part, names in parts(config, granularity).items()
    )


def group_count(shape: BlockShape, kind: str) -> int:
    """Return how many coupled structures of a kind a block has: key/value heads or MLP channels."""
    return shape.kv_heads if kind == "attention" else shape.channels


def width(config: Config, shape: BlockShape, axis: str) -> int:
    """Return how many rows, columns or values that stand for an axis one coupled structure takes."""
    if axis == CHANNELS:
        return 1
    return head_dim(config) * (shape.heads // shape.kv_heads if axis == QUERIES else 1)


def size(config: Config, shape: BlockShape, axis: str) -> int:
    """Return how many rows, columns or values stand for an axis in a block of this shape."""
    if axis in (HIDDEN, HEAD):
        return config.hidden_size if axis == HIDDEN else head_dim(config)
    return group_count(shape, _KIND_OF[axis]) * width(config, shape, axis)


def kept(
    config: Config, shape: BlockShape, axes: Sequence[str], keep: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """Return which rows, columns or values stay, [kept], where some of the structures do; None: all of them.

    Args:
        config: The model's config.
        shape: Shape of the block.
        axes: What they stand for, part after part.
        keep: Kind -> indices of the structures that stay, [n].
    """
    import torch

    if all(axis not in _KIND_OF or len(keep[_KIND_OF[axis]]) == group_count(shape, _KIND_OF[axis]) for axis in axes):
        return None
    start, indices = 0, []
    for axis in axes:
        if (kind := _KIND_OF.get(axis)) is None:
            here = torch.arange(size(config, shape, axis))
        else:
            each = width(config, shape, axis)
            here = (keep[kind][:, None] * each + torch.arange(each)).flatten()
        indices.append(start + here)
        start += size(config, shape, axis)
    return torch.cat(indices)


def members(config: Config, shape: BlockShape, kind: str) -> Iterator[Member]:
    """Yield what the coupled structures of a kind consist of in a block of this shape, the linear that reads them last.

    Parts of a fused matrix are members of their own, as the matrices that it consists of would be.
    """
    for linear in description(config).linears:
        bias = has_bias(config, linear)
        for dim, axes in enumerate((linear.outputs, (linear.inputs,))):
            start = 0
            for axis in axes:
                rows = size(config, shape, axis)
                if axis in KINDS[kind]:
                    yield Member(linear.name, dim, start, width(config, shape, axis), rows, bias and dim == 0)
                start += rows


def reader(config: Config, kind: str) -> str:
    """Return the linear that reads a kind's structures, by its name within its block."""
    return next(linear.name for linear in description(config).linears if linear.inputs in KINDS[kind])


def group_parameters(config: Config, shape: BlockShape, kind: str) -> int:
    """Return the number of parameters that leave with one coupled structure, biases and norms included."""
    linear = sum(member.width * (config.hidden_size + member.bias) for member in members(config, shape, kind))
    norms = description(config).norms.values()
    return linear + sum(width(config, shape, axis) for axis in norms if axis in KINDS[kind])


def has_bias(config: Config, linear: Linear) -> bool:
    """Return whether a linear carries a bias."""
    return bool(getattr(config, linear.bias, False)) if isinstance(linear.bias, str) else linear.bias


def linear_shape(config: Config, shape: BlockShape, name: str) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear in a block of this shape."""
    linear = linear_of(config, name)
    return sum(size(config, shape, axis) for axis in linear.outputs), size(config, shape, linear.inputs)


def dense_parameters(config: Config) -> int:
    """Return the number of parameters outside the linears' weights: embeddings, norms, biases, the head unless tied."""
    hidden, about = config.hidden_size, description(config)
    total = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden + hidden
    for shape in shapes(config):
        total += sum(size(config, shape, axis) for axis in about.norms.values())
        total += sum(linear_shape(config, shape, each.name)[0] for each in about.linears if has_bias(config, each))
    return total


def parameters(config: Config) -> int:
    """Return the number of a model's parameters, a tied head counted once."""
    linear = (linear_shape(config, shape, name) for shape in shapes(config) for name in linear_names(config))
    return dense_parameters(config) + sum(outputs * inputs for outputs, inputs in linear)


def window(config: Config) -> int | None:
    """Return the tokens that blocks with a sliding window see at a time; None: no block has one."""
    if not description(config).window or not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


@contextmanager
def block_outputs(model: nn.Module, linear: str | None = None) -> Iterator[list[torch.Tensor]]:
    """Give a list that a forward pass fills with each block's output, or that of one of its linears, [B, L, hidden].

    Transformers' own ``hidden_states`` end with the state after the last norm, not with the last block's output.
    """
    outputs: list[torch.Tensor] = []
    modules = [block if linear is None else block.get_submodule(linear) for block in blocks(model)]
    handles = [module.register_forward_hook(lambda _, inputs, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
