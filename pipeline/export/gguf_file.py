"""One GGUF file of a model whose blocks have a shape each: architecture, tokenizer, tensors by bits, where it is from.

llama.cpp's ``deci`` (Llama, Mistral, Qwen2) and ``openelm`` (Qwen3 with a tied head) read heads, key/value heads and
MLP widths as arrays, a value a block. 4 bits become IQ4_NL, 8 bits Q8_0. NF4's levels are not IQ4_NL's, so weights are
rounded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedTokenizerBase

from pipeline import architecture, cores
from pipeline.export import iq4nl, limits, vocabulary
from pipeline.export.dense import Adapter, Dense, Load

Value = Callable[[], torch.Tensor]  # computed when its turn comes, so that few tensors exist at once
Part = tuple[str, Value, Kind]
_BLOCK = 32  # weights of a row that share a scale, in IQ4_NL and Q8_0 alike
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OWN_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Types:
    """The GGUF type of each kind of tensor; norms and biases are F32.

    Attributes:
        four: Of linears at 4 bits.
        eight: Of linears at 8 bits.
        dense: Of linears at 16 bits, and of those whose inputs no block of 32 divides.
        embeddings: Of the embeddings, and of the head where it is tied to them.
        head: Of a head of its own.
    """

    four: Kind = Kind.IQ4_NL
    eight: Kind = Kind.Q8_0
    dense: Kind = Kind.BF16
    embeddings: Kind = Kind.Q8_0
    head: Kind = Kind.Q8_0

    def of(self, bits: int) -> Kind:
        """Return the type of a linear by its bits."""
        return {4: self.four, 8: self.eight, 16: self.dense}[bits]


SIXTEEN = Types(*(Kind.BF16,) * 5)  # an untouched model: exact, and generates faster than F16 does


def write(
    path: Path,
    dense: Dense,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    types: Types = Types(),  # noqa: B008  (frozen)
    lineage: Mapping[str, str] | None = None,
    merge: bool = True,
    rounded: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model as a GGUF file.

    Args:
        path: The file.
        dense: The model.
        tokenizer: Its tokenizer.
        name: What llama.cpp shows.
        types: Of the tensors.
        lineage: What it was made from: key -> text.
        merge: Add the adapters to the weights before these are rounded.
        rounded: Weights that are in IQ4_NL already, ``iq4nl``'s bytes by the full names of linears; others go to the
            nearest level.

    Raises:
        ExportError: llama.cpp cannot hold the model or its tokenizer.
    """
    if fault := limits.gguf(dense.config):
        raise limits.ExportError(fault)
    words = vocabulary.read(tokenizer, dense.config.vocab_size)
    writer = gguf.GGUFWriter(path, architecture.description(dense.config).gguf)
    try:
        _describe(writer, dense.config, name, lineage or {})
        vocabulary.write(writer, words, tokenizer)
        _add(writer, _tensors(dense, types, dense.merged if merge else dense.base, rounded or {}))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def write_adapters(path: Path, dense: Dense, name: str) -> None:
    """Write a model's adapters as a GGUF file of their own, to be added to one that was written with ``merge=False``.

    Args:
        path: The file.
        dense: The model.
        name: What llama.cpp shows.
    """
    writer = gguf.GGUFWriter(path, architecture.description(dense.config).gguf)
    try:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # the factor is in b
        for block in range(dense.config.num_hidden_layers):
            for key, a, b in _adapters(dense, block):
                writer.add_tensor(f"{key}.weight.lora_a", encoded(a, Kind.F16), raw_dtype=Kind.F16)
                writer.add_tensor(f"{key}.weight.lora_b", encoded(b, Kind.F16), raw_dtype=Kind.F16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _adapters(dense: Dense, block: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield GGUF name, a and b of each adapter of a block."""
    fused: list[Adapter] = []
    rotated = _is_paired(dense.config)
    for name in architecture.linear_names(dense.config):
        adapter = dense.adapters[architecture.linear_name(block, name)]
        if not rotated and name in _QKV:
            fused.append(adapter)
            continue
        b = paired(adapter.b, dense.config) if rotated and name in _QKV[:2] else adapter.b
        yield f"blk.{block}.{_OWN_NAMES[name]}", adapter.a, b
    if fused:
        yield f"blk.{block}.attn_qkv", torch.cat([each.a for each in fused]), torch.block_diag(*(e.b for e in fused))


def _is_paired(config: Any) -> bool:
    """Return whether llama.cpp's architecture rotates neighbours, and holds q, k and v apart."""
    return architecture.description(config).gguf == "deci"


def _describe(writer: gguf.GGUFWriter, config: Any, name: str, lineage: Mapping[str, str]) -> None:
    shapes, size, turn = architecture.shapes(config), architecture.head_dim(config), limits.rope(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description("pruned, quantized to mixed bits and recovered by qpruner")
    for key, text in lineage.items():
        writer.add_string(f"qpruner.{key}", text)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_IQ4_NL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(shapes))
    writer.add_head_count([shape.heads for shape in shapes])
    writer.add_head_count_kv([shape.kv_heads for shape in shapes])
    writer.add_feed_forward_length([shape.channels for shape in shapes])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(turn["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if turn["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(turn["factor"])


def _tensors(dense: Dense, types: Types, weight: Load, rounded: Mapping[str, torch.Tensor]) -> Iterator[Part]:
    """Yield each tensor's GGUF name, what computes its value, and its type."""
    config = dense.config

    def kept(name: str) -> Value:
        return partial(dense.tensors.__getitem__, name)

    yield "token_embd.weight", kept("model.embed_tokens.weight"), types.embeddings
    yield "output_norm.weight", kept("model.norm.weight"), Kind.F32
    if not config.tie_word_embeddings:
        yield "output.weight", kept("lm_head.weight"), types.head
    if (factors := rope_factors(config)) is not None:
        yield "rope_freqs.weight", lambda: factors, Kind.F32
    for block in range(config.num_hidden_layers):
        yield from _linears(dense, block, types, weight, rounded)
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            if (norm := f"model.layers.{block}.{name}.weight") in dense.tensors:
                yield f"blk.{block}.{_OWN_NAMES[name]}.weight", kept(norm), Kind.F32


def _linears(
    dense: Dense, block: int, types: Types, weight: Load, rounded: Mapping[str, torch.Tensor]
) -> Iterator[Part]:
    """Yield the weights and biases of a block's linears; q, k and v are one where the architecture has them so."""
    own_names = architecture.linear_names(dense.config)
    names = [architecture.linear_name(block, name) for name in own_names]
    kinds = [types.of(dense.bits.get(name, 16)) for name in names]
    rotated = _is_paired(dense.config)

    def load(kind: Kind) -> Load:
        return lambda name: rounded[name] if kind is Kind.IQ4_NL and name in rounded else weight(name)

    if not rotated:  # in the type with the most bits
        kind = max(kinds[:3], key=_bits)
        yield f"blk.{block}.attn_qkv.weight", partial(_stacked, load(kind), names[:3]), kind
    for own, name, kind in list(zip(own_names, names, kinds, strict=True))[0 if rotated else 3 :]:
        place = partial(paired, config=dense.config) if own in _QKV[:2] else torch.Tensor.contiguous
        yield f"blk.{block}.{_OWN_NAMES[own]}.weight", partial(_placed, place, load(kind), name), kind
        if (bias := f"{name}.bias") in dense.tensors:
            value = partial(_placed, place, dense.tensors.__getitem__, bias)
            yield f"blk.{block}.{_OWN_NAMES[own]}.bias", value, Kind.F32


def _placed(place: Callable[[torch.Tensor], torch.Tensor], load: Load, name: str) -> torch.Tensor:
    return place(load(name))


def _stacked(load: Load, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([load(name) for name in names])


def _bits(kind: Kind) -> float:
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    return stored / size


def paired(value: torch.Tensor, config: Any) -> torch.Tensor:
    """Return q's or k's rows in llama.cpp's order: it rotates neighbours, transformers a head's first and second half.

    Args:
        value: [heads * head size, ...].
        config: The model's config.
    """
    size = architecture.head_dim(config)
    halves = value.reshape(-1, 2, size // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def rope_factors(config: Any) -> torch.Tensor | None:
    """Return what Llama 3 divides each frequency by, [head size / 2]; None for any other model.

    Long waves are stretched by ``factor``, short ones stay, those between are blended, as transformers does.
    """
    turn = limits.rope(config)
    if turn["rope_type"] != "llama3":
        return None
    size = architecture.head_dim(config)
    frequency = turn["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    waves = 2 * math.pi / frequency
    low, high, length = turn["low_freq_factor"], turn["high_freq_factor"], turn["original_max_position_embeddings"]
    blend = (length / waves - low) / (high - low)
    between = 1 / ((1 - blend) / turn["factor"] + blend)
    factors = torch.where(waves > length / low, turn["factor"], torch.where(waves < length / high, 1.0, between))
    return factors.float()


def _add(writer: gguf.GGUFWriter, parts: Iterable[Part]) -> None:
    """Compute tensors, a core each, and add them to a file."""
    with cores.each() as pool:
        for key, value, kind in pool.map(_computed, parts):
            writer.add_tensor(key, value, raw_dtype=kind)


def _computed(part: Part) -> tuple[str, np.ndarray, Kind]:
    key, load, kind = part
    value = load()
    if value.dtype is torch.uint8:
        return key, value.numpy(), kind
    value = value.float()
    if kind in (Kind.IQ4_NL, Kind.Q8_0) and value.shape[-1] % _BLOCK:
        kind = Kind.BF16
    return key, encoded(value, kind), kind


def encoded(value: torch.Tensor, kind: Kind) -> np.ndarray:
    """Return a tensor in a GGUF type: the bytes of its rows, or numbers for F32 and F16."""
    if kind is Kind.IQ4_NL:
        return iq4nl.nearest(value).numpy()
    return gguf.quants.quantize(value.contiguous().numpy(), kind)
