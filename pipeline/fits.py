"""What ``params.yaml`` asks of a model, judged by the model's config alone, before weights load.

Each check takes a config, transformers' own or one ``read`` from a folder, and values of the params. It returns the
fault, or None.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from pipeline import architecture, bits
from pipeline.architecture import Config
from pipeline.errors import UserError, shown
from pipeline.paths import BASE

SOURCE = "source.txt"  # in BASE: what was fetched
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "vocab_size", "max_position_embeddings")  # fmt: skip
_LARGEST = 2**31  # of a size
_MOST_BLOCKS = 10_000


def at_hand(source: str) -> SimpleNamespace | None:
    """Return the config of a model that is here: in a folder, or fetched already; None for any other.

    Raises:
        OSError: The folder has none.
        UserError: It is no config.
    """
    if source.startswith("path:"):
        return read(Path(source.removeprefix("path:")))
    mark = BASE / SOURCE
    return read(BASE) if mark.exists() and mark.read_text(encoding="utf-8") == source else None


def read(folder: Path) -> SimpleNamespace:
    """Return the config of a model folder; fields that old checkpoints leave out as the families understand that.

    Raises:
        OSError: There is none.
        UserError: It is no JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read (it is no JSON object)")
    usual = {"num_key_value_heads": values.get("num_attention_heads"), "tie_word_embeddings": False}
    return SimpleNamespace(**{**usual, **architecture.defaults(values.get("model_type")), **values})


def complete(config: Config) -> bool:
    """Return whether a config has all the sizes that the checks read; transformers has defaults for those it lacks."""
    return all(getattr(config, size, None) is not None for size in _SIZES)


def units_a_block(granularity: str) -> int:
    """Return the units of a block of the model that was fetched; 1 if none was."""
    return len(architecture.parts(read(BASE), granularity)) if (BASE / "config.json").exists() else 1


def unusable(config: Config) -> str | None:
    """Refuse a config whose sizes are no sizes: transformers would fail on it with a traceback, or never end."""
    for size in (*_SIZES, "head_dim", *architecture.expert_fields(getattr(config, "model_type", None))):
        value = getattr(config, size, None)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST:
            return f"model.source: its config.json has {size} {shown(value)}, which is no whole number above 0"
    layers = getattr(config, "num_hidden_layers", None) or 1
    if layers > _MOST_BLOCKS:
        return f"model.source: its config.json has num_hidden_layers {layers:,}; models have at most {_MOST_BLOCKS:,}"
    shared = config.num_key_value_heads or 1
    heads = getattr(config, "num_attention_heads", None) or shared
    if heads % shared:
        return f"model.source: its config.json has {heads} attention heads, no multiple of its {shared} key/value heads"
    hidden = getattr(config, "hidden_size", None) or heads
    if getattr(config, "head_dim", None) is None and hidden % heads:
        return f"model.source: its config.json has hidden_size {hidden}, no multiple of its {heads} attention heads"
    if fault := architecture.unlike(config):
        return f"model.source: its config.json describes a model that is not supported: {fault}"
    return None


def dense(config: Config) -> str | None:
    """Refuse a model whose weights are quantized: pruning and the layer bank start from dense ones."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    plain = isinstance(quantization, dict)
    method = quantization.get("quant_method", "unknown") if plain else type(quantization).__name__
    return (
        f"model.source: the model is already quantized (method {method}); pruning and the layer bank need dense "
        "weights, so name the model it was made from"
    )


def rank(config: Config, asked: int) -> str | None:
    """Refuse a LoRA rank that a linear cannot have."""
    shape = architecture.shapes(config)[0]
    sizes = {name: min(architecture.linear_shape(config, shape, name)) for name in architecture.linear_names(config)}
    name, smallest = min(sizes.items(), key=lambda item: item[1])
    if asked > smallest:
        at = name.rpartition(".")[2]
        return f"quantize.r: rank {asked} is more than the {smallest} of the smallest linear ({at}); lower it"
    return None


def length(config: Config, section: str, max_length: int) -> str | None:
    """Refuse rows longer than what the model was made for."""
    most = config.max_position_embeddings
    if max_length > most:
        return f"{section}.max_length: {max_length} tokens are more than the model's {most} positions; lower it"
    return None


def seed_bits(config: Config, seeds: Sequence[str], granularity: str) -> str | None:
    """Refuse bit strings that do not have one digit for each unit."""
    for seed in seeds:
        _, letters = bits.split(seed) or (None, seed)
        if len(letters) != _units(config, granularity):
            return f"search.seed_bits: {_miscounted(config, granularity, letters)}"
    return None


def choice(config: Config, choose: str, granularity: str) -> str | None:
    """Refuse a bit string to build that does not have one digit for each unit; a run's id has 32 digits."""
    ratio, letters = bits.split(choose) or (None, "")
    allowed = [_units(config, granularity), *([32] if ratio is None else [])]
    if letters and len(letters) not in allowed:
        return f"build.choose: {_miscounted(config, granularity, letters)}"
    return None


def _units(config: Config, granularity: str) -> int:
    return config.num_hidden_layers * len(architecture.parts(config, granularity))


def _miscounted(config: Config, granularity: str, text: str) -> str:
    wanted = _units(config, granularity)
    return (
        f"bits {shown(text)} are {len(text)} digits, but with granularity {granularity} the model has {wanted} units; "
        "give one digit for each, block 0 first"
    )
