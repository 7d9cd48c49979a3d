"""What follows from a family's description: blocks, coupled structures, linears, sizes, units of bits.

Families are described in ``families``; torch is imported where a tensor is made, so that settings are checked without
it. A block is attention, then a gated MLP or experts, each a gated MLP. Its structures are key/value heads with their
query heads, and MLP channels; of experts a channel of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
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
        channels: MLP channels; of experts those of each.
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
    """Return the description of a config's family, with the linears of each of its experts."""
    about = FAMILIES[family(config)]
    return about if about.experts is None else _with_experts(family(config), experts(config))


@cache
def _with_experts(name: str, count: int) -> Family:
    """Return a family's description with the linears of each of so many experts in place of those named with ``*``."""
    about = FAMILIES[name]

    def each(names: Sequence[str]) -> tuple[str, ...]:
        shared = [name for name in names if "*" not in name]
        own = [name.replace("*", str(index)) for index in range(count) for name in names if "*" in name]
        return (*shared, *own)

    known = {name: linear for linear in about.linears for name in each([linear.name])}
    names = each([linear.name for linear in about.linears])
    return replace(
        about,
        linears=tuple(replace(known[name], name=name) for name in names),
        groups={group: each(members) for group, members in about.groups.items()},
    )


def experts(config: Config) -> int:
    """Return the number of experts of a block; 0: it has one MLP."""
    about = FAMILIES[family(config)].experts
    return 0 if about is None else next((value for key in about.count if (value := getattr(config, key, None))), 0)


def expert_fields(name: object) -> tuple[str, ...]:
    """Return the fields with counts of experts that a ``config.json`` of a ``model_type`` may have."""
    about = FAMILIES[str(name).removeprefix("pruned_")].experts if supported(name) else None
    return () if about is None else about.fields


def channels_field(config: Config) -> str:
    """Return the field of a config with the channels of an MLP or of an expert."""
    about = FAMILIES[family(config)].experts
    return "intermediate_size" if about is None else about.width


def unlike(config: Config) -> str | None:
    """Return why the description of a config's family does not fit it, or None."""
    if (about := FAMILIES[family(config)].experts) is None:
        return None
    if getattr(config, about.chosen) > experts(config):
        return f"{about.chosen} is more than the {experts(config)} experts"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        return "some blocks have an MLP in place of experts (mlp_only_layers, decoder_sparse_step): all must be alike"
    return None


def head_dim(config: Config) -> int:
    """Return the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shapes(config: Config) -> list[BlockShape]:
    """Return the shape of each block of a config, pruned or not."""
    pruned = getattr(config, "block_shapes", None)
    if pruned:
        return [BlockShape(*shape) for shape in pruned]
    channels = getattr(config, channels_field(config))
    whole = BlockShape(config.num_attention_heads, config.num_key_value_heads, channels)
    return [whole] * config.num_hidden_layers


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of a causal language model."""
    return cast("nn.ModuleList", model.get_submodule("model.layers"))


def linear_name(block: int, name: str) -> str:
    """Return the full module name of a block's linear, such as ``model.layers.3.mlp.up_proj``."""
    return f"model.layers.{block}.{name}"


def linear_names(config: Config) -> tuple[str, ...]:
    """Return the names that a block's linears have within it."""
    return tuple(description(config).by_name)


def linear_of(config: Config, name: str) -> Linear:
    """Return the description of a linear by its name within its block."""
    return description(config).by_name[name]


def target_modules(config: Config) -> list[str]:
    """Return the names by which PEFT finds the linears."""
    return list(parts(config, "linear"))


def linears(config: Config) -> Iterator[str]:
    """Yield the full name of every linear of every block, in the order of the blocks."""
    for block in range(config.num_hidden_layers):
        for name in linear_names(config):
            yield linear_name(block, name)


def parts(config: Config, granularity: str) -> Mapping[str, tuple[str, ...]]:
    """Return what one bit choice covers in a block, in the order of the computation: name -> linears.

    Experts share theirs: they are many, and which of them a text needs only the text tells.
    """
    if granularity == "group":
        return description(config).groups
    names = linear_names(config)
    if granularity == "block":
        return {"block": names}
    alike: dict[str, tuple[str, ...]] = {}
    for name in names:
        last = name.rpartition(".")[2]
        alike[last] = (*alike.get(last, ()), name)
    return alike


def same_inputs(config: Config) -> tuple[tuple[str, ...], ...]:
    """Return the linears of a block, those together that read the same inputs."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for linear in description(config).linears:
        key = linear.name.rpartition(".")[0], linear.inputs
        found[key] = (*found.get(key, ()), linear.name)
    return tuple(found.values())


def mlps(config: Config) -> tuple[tuple[str, ...], ...]:
    """Return the linears of a block's MLP, or of each of its experts, in the order of the computation."""
    found: dict[str, tuple[str, ...]] = {}
    groups = description(config).groups
    for name in (*groups["gate_up"], *groups["down"]):
        at = name.rpartition(".")[0]
        found[at] = (*found.get(at, ()), name)
    return tuple(found.values())


def expert_of(config: Config, name: str) -> int | None:
    """Return the number of the expert that a linear of a block belongs to, by its name there; None: to none."""
    about = description(config).experts
    if about is None or not name.startswith(f"{about.module}."):
        return None
    return int(name.removeprefix(f"{about.module}.").partition(".")[0])


def tokens_read(config: Config, name: str, tokens: int) -> int:
    """Return how many of a pass's tokens a linear of a block reads; of an expert if all are chosen equally often."""
    about, expert = description(config).experts, expert_of(config, name)
    if about is None or expert is None:
        return tokens
    return evenly(tokens * getattr(config, about.chosen), experts(config))[expert]


def evenly(total: int, count: int) -> list[int]:
    """Return how many of ``total`` tokens each of ``count`` experts reads if they are shared out evenly."""
    return [total // count + (index < total % count) for index in range(count)]


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
        total += experts(config) * hidden  # the router
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
