"""A model's ``config.json``, judged before a model is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline import architecture
from pipeline.checkpoint.headers import WeightsError, read_json

# What a config's counts may be. A model of 10^9 layers would be built for hours before anything else looks at it.
_REQUIRED = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 30,
}
_OPTIONAL = {"num_key_value_heads": 1 << 12, "head_dim": 1 << 12}
_MOST_OF_EXPERTS = 1 << 20
_TYPES = ("float64", "float32", "float16", "bfloat16")


def read_config(folder: Path) -> PretrainedConfig:
    """Return a folder's config, if a model of a supported family can be built from it.

    Raises:
        WeightsError: Its values are missing, senseless or beyond what a model can have.
    """
    values = read_json(folder / "config.json")
    family = values.get("model_type")
    if not isinstance(family, str):
        raise WeightsError(f"config.json: model_type is {family!r}; name the model's family")
    if not architecture.supported(family):
        raise WeightsError(f"config.json: {architecture.unsupported(family)}")
    faults = [*_count_faults(values), *_part_faults(values)]
    if faults:
        raise WeightsError("; ".join(f"config.json: {fault}" for fault in faults) + "; take the model's own config")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # checks of many kinds, all of them on values out of the file
        raise WeightsError(
            f"config.json is not understood: {first_line(error)}; take the model's own config"
        ) from error
    if fault := architecture.unlike(config):
        raise WeightsError(f"config.json: {fault}; take another model of the family")
    return config


def _count_faults(values: Mapping[str, object]) -> list[str]:
    counts: dict[str, int] = {}
    faults = []
    optional = _OPTIONAL | dict.fromkeys(architecture.expert_fields(values.get("model_type")), _MOST_OF_EXPERTS)
    for key, most in (_REQUIRED | optional).items():
        value = values.get(key)
        if key in optional and value is None:
            continue
        if key not in values:
            faults.append(f"{key} is missing")
        elif type(value) is not int or not 1 <= value <= most:
            faults.append(f"{key} is {str(value)[:40]}, not a whole number from 1 to {most:,}")
        else:
            counts[key] = value
    if faults:
        return faults
    hidden, heads = counts["hidden_size"], counts["num_attention_heads"]
    kv_heads, width = counts.get("num_key_value_heads", heads), counts.get("head_dim")
    if heads % kv_heads:
        faults.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if width is None and hidden % heads:
        faults.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing")
    elif (width or hidden // heads) % 2:
        faults.append(f"a head's size {width or hidden // heads} is odd, which rotary positions cannot use")
    return faults


def _part_faults(values: Mapping[str, object]) -> list[str]:
    faults = []
    named = architecture.FAMILIES[str(values["model_type"]).removeprefix("pruned_")].activation
    activation = values.get(named, "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        faults.append(f"{named} {activation!r} is no activation that transformers knows")
    for key, rope in _ropes(values):
        if not isinstance(rope, dict):
            faults.append(f"{key} is no object")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS):
            faults.append(f"{key}: rope_type {kind!r} is none that transformers knows")
        if not _positive(rope.get("rope_theta", 1.0)):
            faults.append(f"{key}: rope_theta is {rope['rope_theta']!r}, not a positive number")
    for key in ("rms_norm_eps", "rope_theta"):
        if key in values and not _positive(values[key]):
            faults.append(f"{key} is {values[key]!r}, not a positive number")
    for key in ("torch_dtype", "dtype"):
        if values.get(key) is not None and values[key] not in _TYPES:
            faults.append(f"{key} is {values[key]!r}, not one of {', '.join(_TYPES)}")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(values.get(key, False), bool):
            faults.append(f"{key} is {values[key]!r}, not true or false")
    return faults


def _ropes(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield what a config says of rotary positions: once, or once for each type of blocks."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if isinstance(rope, dict) and rope and all(isinstance(value, dict) for value in rope.values()):
            yield from ((f"{key}.{kind}", value) for kind, value in rope.items())
        elif rope is not None:
            yield key, rope


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def first_line(error: Exception) -> str:
    """Return the first line of what an error says; else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
