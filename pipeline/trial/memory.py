"""Peak memory of training and inference: predicted from shapes, and measured on CUDA.

The prediction is the peak of the bytes that PyTorch's allocator is asked for in one step of ``recover`` and in one
forward pass of ``evaluate`` on CUDA, from a trace of the real modules without data (``traced``). It takes rows to be
full and every position to be labelled. Left out, and needed on a real GPU: the CUDA context, cuBLAS workspaces, the
allocator's rounding (to 512 bytes, and up to 1 MiB for large tensors) and fragmentation. Optimizer states that
bitsandbytes pages are in managed memory, which the allocator does not count. Within 0.8 % of an H100's own peaks on
LLaMA-7B's shapes (docs/results.md). Experts are taken to be chosen equally often: what they keep of all tokens is the
same however they share them, and only the passing needs of the busiest one are not.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from pipeline import architecture
from pipeline.architecture import BlockShape
from pipeline.compress.quantize import stored_bytes
from pipeline.families import QUERIES
from pipeline.trial.setting import Setting

T = TypeVar("T")
_USED = 0.9  # share of a GPU's free memory that a prediction may fill: the rest is rounding, fragments and workspaces


@dataclass(frozen=True)
class Peak:
    """Peak bytes of training and of inference, and where the figures come from: ``measured`` or ``predicted``."""

    training: int
    inference: int
    source: str


def predict(config: PretrainedConfig, widths: Mapping[str, int], setting: Setting) -> Peak:
    """Predict peak memory on CUDA from shapes alone.

    Training as in ``training``. Inference peaks in the widest block or at the logits; each kind of block is traced
    apart. Both equal a trace of the whole to the byte, unless the last block is far smaller than others. The first call
    for a model takes seconds, later ones milliseconds.

    Args:
        config: The model's config, pruned or not.
        widths: Bits of each linear: 4, 8 or 16.
        setting: Batch and adapter sizes.
    """
    weights, peak = training(config, widths, setting)
    model, widest = config.to_json_string(use_diff=False), 0
    for index, ((shape, bits), kind) in enumerate(zip(_blocks(config, widths), _kinds(config), strict=True)):
        alone = (shape.heads, shape.kv_heads, shape.channels, kind)
        others = _other_kinds(config, index)
        twice = _of_blocks(config, [index, index, *others])  # only a first block's input is all that lives
        at_four = [(4,) * len(bits)] * len(others)
        block_weights, block_peak = _traced(twice, (model, alone), (bits, bits, *at_four), setting, "inference")
        widest = max(widest, block_peak - block_weights)
    return Peak(peak, weights + widest + cache(config, setting.cached_tokens), "predicted")


def cache(config: PretrainedConfig, tokens: int) -> int:
    """Return the bytes of the keys and values of some tokens, in 16 bits."""
    heads = sum(shape.kv_heads for shape in architecture.shapes(config))
    return 2 * 2 * heads * architecture.head_dim(config) * tokens


def stored(config: PretrainedConfig, widths: Mapping[str, int], setting: Setting) -> int:
    """Return the bytes that the linears of a model store."""
    return sum(
        _held(architecture.linear_shape(config, shape, name), width, setting)
        for shape, bits in _blocks(config, widths)
        for name, width in zip(architecture.linear_names(config), bits, strict=True)
    )


def training(config: PretrainedConfig, widths: Mapping[str, int], setting: Setting) -> tuple[int, int]:
    """Return (bytes of the model alone, peak bytes of training it), predicted from shapes.

    Training peaks while the loss or the last block is computed, when all that earlier blocks keep is alive. So one
    trace, with the earlier blocks at 4 bits, serves all bit vectors that agree in the last block; each earlier block
    adds what its own bits add (``_added``).

    Args:
        config: As for ``predict``.
        widths: As for ``predict``.
        setting: As for ``predict``.
    """
    blocks = _blocks(config, widths)
    model = config.to_json_string(use_diff=False)
    if setting.full:  # a block's widths say what it trains, so each is traced as it is
        return _traced(config, model, tuple(bits for _, bits in blocks), setting, "training")
    weights, peak = _last_block_at(config, model, blocks[-1][1], setting)
    added: dict[Hashable, tuple[int, int]] = {}  # by what it depends on: experts are many linears
    for index, (shape, bits) in enumerate(blocks[:-1]):
        kind = index == 0, shape, bits
        if kind not in added:
            added[kind] = _added(config, index, shape, bits, setting)
        stored, kept = added[kind]
        weights += stored
        peak += stored + kept
    return weights, peak


def _blocks(config: PretrainedConfig, widths: Mapping[str, int]) -> list[tuple[BlockShape, tuple[int, ...]]]:
    """Return of each block its shape and the bits of its linears."""
    names = architecture.linear_names(config)
    return [
        (shape, tuple(widths[architecture.linear_name(index, name)] for name in names))
        for index, shape in enumerate(architecture.shapes(config))
    ]


def _kinds(config: PretrainedConfig) -> list[tuple[object, ...]]:
    """Return what blocks differ in besides their shapes, such as whether they attend within a window."""
    fields = [getattr(config, name, None) for name in architecture.description(config).per_block]
    return [tuple(values and values[block] for values in fields) for block in range(config.num_hidden_layers)]


def _other_kinds(config: PretrainedConfig, block: int) -> list[int]:
    """Return a block of each other type of layers: all types' rotary positions live through the whole pass."""
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    return [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind != kinds[block]]


def _added(
    config: PretrainedConfig, block: int, shape: BlockShape, bits: tuple[int, ...], setting: Setting
) -> tuple[int, int]:
    """Return the bytes by which a block stores and keeps for backward more than at 4 bits.

    An 8-bit linear keeps its 16-bit input, also under gradient checkpointing. Linears that read the same one share it.
    Without checkpointing most attentions keep o_proj's anyway, and what block 0's attention reads needs no gradient.
    """
    names = architecture.linear_names(config)
    width = dict(zip(names, bits, strict=True))  # by the linear's name
    stored = 0
    for name in names:
        size = architecture.linear_shape(config, shape, name)
        stored += _held(size, width[name], setting) - _held(size, 4, setting)
    tokens = setting.tokens // setting.rows * setting.rows
    if setting.fast:
        return stored, 0  # fused adapters keep that input at any bits
    kept_anyway = architecture.description(config).output_kept
    again = setting.gradient_checkpointing  # frees what autograd saved, which these inputs are not
    kept = 0
    for place, group in enumerate(architecture.same_inputs(config)):
        inputs = architecture.linear_of(config, group[0]).inputs
        free = not again and (inputs == QUERIES and kept_anyway or (block == 0 and place == 0))
        if not free and any(width[name] == 8 for name in group):
            read = architecture.tokens_read(config, group[0], tokens)
            kept += 2 * read * architecture.size(config, shape, inputs)
    return stored, kept


def _held(size: tuple[int, int], bits: int, setting: Setting) -> int:
    offset = 4 if bits == 4 and setting.double_quant else 0  # a checkpoint has it among the settings
    return stored_bytes(*size, bits, setting.double_quant) + offset


def _of_blocks(config: PretrainedConfig, indices: Sequence[int]) -> PretrainedConfig:
    """Return the config of a model that consists of some of the blocks."""
    chosen = copy.deepcopy(config)
    chosen.num_hidden_layers = len(indices)
    for name in ("block_shapes", *architecture.description(config).per_block):
        if per_block := getattr(chosen, name, None):
            setattr(chosen, name, [per_block[index] for index in indices])
    return chosen


def _last_block_at(config: PretrainedConfig, model: str, bits: tuple[int, ...], setting: Setting) -> tuple[int, int]:
    """Return (bytes of the model alone, peak of training) with the last block at ``bits`` and the others at 4.

    Where all blocks between the first and the last are alike, each adds the same: two of them tell about all.
    """
    count = config.num_hidden_layers
    kinds = zip(architecture.shapes(config), _kinds(config), strict=True)
    alike = len(set(list(kinds)[1:-1])) == 1
    fours = (4,) * len(architecture.linear_names(config))
    if count < 5 or not alike:
        return _traced(config, model, (*[fours] * (count - 1), bits), setting, "training")
    traces = []
    for middle in ([1], [1, 1]):
        fewer = _of_blocks(config, [0, *middle, count - 1])
        traces.append(_traced(fewer, (model, len(middle)), (*[fours] * (len(middle) + 1), bits), setting, "training"))
    (weights, peak), (more_weights, more_peak) = traces
    return weights + (count - 3) * (more_weights - weights), peak + (count - 3) * (more_peak - peak)


_traces: dict[Hashable, tuple[int, int]] = {}


def _traced(
    config: PretrainedConfig, model: Hashable, bits: tuple[tuple[int, ...], ...], setting: Setting, step: str
) -> tuple[int, int]:
    """Return (bytes of the model alone, peak) of a traced step; each is traced once a process."""
    key = (model, bits, setting, step)
    if key not in _traces:
        from pipeline.trial import traced  # transformers, peft and lm-eval take seconds to import

        names = dict(zip(architecture.linears(config), chain.from_iterable(bits), strict=True))
        run = traced.training if step == "training" else traced.inference
        _traces[key] = run(traced.model_of(config, names, setting), setting)
    return _traces[key]


def room(device: torch.device) -> int | None:
    """Return the bytes that a prediction may fill on a GPU, by what is free there now; None elsewhere."""
    if device.type != "cuda":
        return None
    gc.collect()  # an earlier trial's model refers to itself
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_USED * (free + idle))


def largest(sizes: Sequence[int], peak: Callable[[int], int], room: int) -> int:
    """Return the first of descending sizes whose peak is within the room, or else the last."""
    return next((size for size in sizes[:-1] if peak(size) <= room), sizes[-1])


def measured(work: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Run something; return its result and the peak of allocated bytes on CUDA, None elsewhere."""
    gc.collect()  # an earlier trial's model refers to itself: it would stay, and count
    if device.type != "cuda":
        return work(), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device)
