"""The supported model families, one description each: all that the pipeline knows of a family stands here.

A description says which linears and norms a block has and what their rows and columns stand for: the hidden size, the
query heads, the key/value heads or the MLP's channels. What is coupled, what is cut when heads or channels go, sizes,
numbers of parameters, units of bits, adapters, memory and exports follow from that (``architecture``).
``docs/families.md`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

# What rows, columns and norms stand for.
HIDDEN, QUERIES, KEYS, CHANNELS, HEAD = "hidden", "queries", "keys", "channels", "head"


@dataclass(frozen=True)
class Linear:
    """A linear of a block.

    Attributes:
        name: Its module within the block.
        outputs: What its rows stand for; several, one after the other, where projections are fused into one matrix.
        inputs: What its columns stand for.
        bias: Whether it has a bias, or the field of the config that says so.
    """

    name: str
    outputs: tuple[str, ...]
    inputs: str
    bias: bool | str = False


@dataclass(frozen=True)
class Experts:
    """Experts in place of one MLP: a router sends each token to some of them.

    Attributes:
        module: The module of a block that holds them, each a gated MLP by its number.
        router: What chooses among them, by a weight of [experts, hidden]; it is never quantized.
        count: Fields of the config with their number, the one that counts first.
        chosen: Field of the config with how many of them read a token.
        width: Field of the config with the channels of one.
    """

    module: str
    router: str
    count: tuple[str, ...]
    chosen: str
    width: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields of the config that are read."""
        return (*self.count, self.chosen, self.width)


@dataclass(frozen=True)
class Family:
    """What the pipeline has to know of a model family.

    Attributes:
        config_class: Transformers' class of its config.
        model_class: Transformers' class of its causal language model, whose blocks are ``model.layers``.
        linears: Of a block, in the order of the computation; those of each expert are named with ``*`` for its number.
        groups: Linears that read the same inputs, of experts each its own, and that serving runtimes fuse: name ->
            their names.
        norms: Of a block: module -> what its values stand for.
        defaults: Fields that a ``config.json`` may leave out, where transformers' class has another default than most.
        activation: Field of the config that names the MLP's function.
        per_block: Fields of the config with a value for each block.
        window: How blocks attend within ``sliding_window``: none (""), ``all`` of them, or those that ``layer_types``
            names (``typed``).
        norm_after: Whether a norm stands between what a sublayer writes and the residual stream.
        output_kept: Whether attention keeps what ``o_proj`` reads for the way back: fused kernels do, unless they lay
            it out by heads, as they find queries that were put together of parts.
        gguf: llama.cpp's architecture that computes the same and reads heads and widths by block; "": there is none.
        unlike_gguf: Where there is none, what those that read sizes by block do not have.
        twin: Family that computes the same, whose class takes head counts that this one's refuses.
        experts: Where the MLP is experts; None: it is one gated MLP.
    """

    config_class: str
    model_class: str
    linears: tuple[Linear, ...]
    groups: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    defaults: Mapping[str, object] = field(default_factory=dict)
    activation: str = "hidden_act"
    per_block: tuple[str, ...] = ("layer_types",)
    window: str = ""
    norm_after: bool = False
    output_kept: bool = True
    gguf: str = ""
    unlike_gguf: str = ""
    twin: str = ""
    experts: Experts | None = None

    @cached_property
    def by_name(self) -> Mapping[str, Linear]:
        """Return the linears by their names."""
        return {linear.name: linear for linear in self.linears}


def _attention(bias: bool | str, out_bias: bool | str) -> tuple[Linear, ...]:
    return (
        Linear("self_attn.q_proj", (QUERIES,), HIDDEN, bias),
        Linear("self_attn.k_proj", (KEYS,), HIDDEN, bias),
        Linear("self_attn.v_proj", (KEYS,), HIDDEN, bias),
        Linear("self_attn.o_proj", (HIDDEN,), QUERIES, out_bias),
    )


def _mlp(bias: bool | str = False, at: str = "mlp") -> tuple[Linear, ...]:
    return (
        Linear(f"{at}.gate_proj", (CHANNELS,), HIDDEN, bias),
        Linear(f"{at}.up_proj", (CHANNELS,), HIDDEN, bias),
        Linear(f"{at}.down_proj", (HIDDEN,), CHANNELS, bias),
    )


def _groups(at: str = "mlp") -> dict[str, tuple[str, ...]]:
    return {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": (f"{at}.gate_proj", f"{at}.up_proj"),
        "down": (f"{at}.down_proj",),
    }


_GROUPS = _groups()
_BEFORE = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
_OF_A_HEAD = {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
_AROUND = {
    "input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN,
    "pre_feedforward_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN,
}  # fmt: skip
_LLAMA = _attention("attention_bias", "attention_bias") + _mlp("mlp_bias")
_BIASED = _attention("attention_bias", "attention_bias") + _mlp()
_UNUSED_WINDOW: dict[str, object] = {"use_sliding_window": False}  # which configs name all the same
_GEMMA = {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 256}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", _LLAMA, _GROUPS, _BEFORE, gguf="deci", twin="mistral"),
    "mistral": Family(
        "MistralConfig", "MistralForCausalLM", _attention(False, False) + _mlp(), _GROUPS, _BEFORE,
        {"sliding_window": 4096, "num_key_value_heads": 8}, window="all", gguf="deci",
    ),
    "qwen2": Family(
        "Qwen2Config", "Qwen2ForCausalLM", _attention(True, False) + _mlp(), _GROUPS, _BEFORE, _UNUSED_WINDOW,
        window="typed", gguf="deci",
    ),
    "qwen3": Family(
        "Qwen3Config", "Qwen3ForCausalLM", _BIASED, _GROUPS, _BEFORE | _OF_A_HEAD, _UNUSED_WINDOW | {"head_dim": 128},
        window="typed", gguf="openelm",
    ),
    "qwen3_moe": Family(  # Qwen3 with experts in every block
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        _attention("attention_bias", "attention_bias") + _mlp(at="mlp.experts.*"), _groups("mlp.experts.*"),
        _BEFORE | _OF_A_HEAD,
        _UNUSED_WINDOW | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
                          "moe_intermediate_size": 768},
        window="all", per_block=(), unlike_gguf="experts",
        experts=Experts(
            "mlp.experts", "mlp.gate", ("num_local_experts", "num_experts"), "num_experts_per_tok",
            "moe_intermediate_size",
        ),
    ),
    "smollm3": Family(  # every fourth block has no rotary positions
        "SmolLM3Config", "SmolLM3ForCausalLM", _LLAMA, _GROUPS, _BEFORE,
        _UNUSED_WINDOW | {"tie_word_embeddings": True, "num_key_value_heads": 4}, window="typed",
        per_block=("layer_types", "no_rope_layers"), unlike_gguf="blocks without rotary positions",
    ),
    "olmo2": Family(  # a norm of q and of k over all heads
        "Olmo2Config", "Olmo2ForCausalLM", _BIASED, _GROUPS,
        {"self_attn.q_norm": QUERIES, "self_attn.k_norm": KEYS,
         "post_attention_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN},
        norm_after=True, unlike_gguf="norms after attention and MLP",
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig", "Gemma3ForCausalLM", _BIASED, _GROUPS, _AROUND | _OF_A_HEAD, _GEMMA, "hidden_activation",
        window="typed", norm_after=True, unlike_gguf="norms before and after attention and MLP",
    ),
    "gemma2": Family(
        "Gemma2Config", "Gemma2ForCausalLM", _BIASED, _GROUPS, _AROUND, _GEMMA, "hidden_activation", window="typed",
        norm_after=True, output_kept=False, unlike_gguf="norms before and after attention and MLP",
    ),
    "phi3": Family(
        "Phi3Config", "Phi3ForCausalLM",
        (
            Linear("self_attn.qkv_proj", (QUERIES, KEYS, KEYS), HIDDEN),
            Linear("self_attn.o_proj", (HIDDEN,), QUERIES),
            Linear("mlp.gate_up_proj", (CHANNELS, CHANNELS), HIDDEN),
            Linear("mlp.down_proj", (HIDDEN,), CHANNELS),
        ),
        {"qkv": ("self_attn.qkv_proj",), "o": ("self_attn.o_proj",),
         "gate_up": ("mlp.gate_up_proj",), "down": ("mlp.down_proj",)},
        _BEFORE, window="all", output_kept=False,
        unlike_gguf="q, k and v in one matrix with rotary positions on a part of each head",
    ),
}  # fmt: skip

# Why a model of another family is refused and what helps, where there is more to say than what is supported.
REASONS: Mapping[str, str] = {
    "gemma3": "it reads images too; save its language model alone, which is of the family gemma3_text",
    "gpt_oss": "its experts are stored in 4 bits of their own (MXFP4), and pruning and the layer bank need dense ones",
    "phi": "Phi-1 and Phi-2 have an MLP without a gate",
    "phimoe": "of the families with experts only qwen3_moe is described",
    "mixtral": "of the families with experts only qwen3_moe is described",
}
