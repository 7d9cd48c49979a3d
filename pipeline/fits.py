"""What ``params.yaml`` asks of a model, judged by the model's config alone, before weights load.

Each check takes a config, transformers' own or one ``read`` from a folder, and a section of the params. It returns the
fault, or None.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline import architecture
from pipeline.architecture import ATTENTION, GRANULARITIES, LINEARS
from pipeline.compress.structures import block_range, calibrated, fitted, ratio  # noqa: F401  (checks like those here)
from pipeline.paths import BASE

if TYPE_CHECKING:
    from pipeline.params import Build, Evaluate, Prune, Quantize, Recover, Search

SOURCE = "source.txt"  # in BASE: what was fetched
_EVEN = 0.95  # of the peak of a model pruned evenly: what no other division of the same ratio was seen to come below


def at_hand(source: str) -> Any | None:
    """Return the config of a model that is here: in a folder, or fetched already; None for any other."""
    if source.startswith("path:"):
        return read(Path(source.removeprefix("path:")))
    mark = BASE / SOURCE
    return read(BASE) if mark.exists() and mark.read_text(encoding="utf-8") == source else None


def read(folder: Path) -> Any:
    """Return the config of a model folder; fields that old checkpoints leave out as the families understand that.

    Raises:
        OSError: There is none.
        ValueError: It is no JSON object.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'} is no JSON object")
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    values.setdefault("tie_word_embeddings", False)
    return SimpleNamespace(**values)


def dense(config: Any) -> str | None:
    """Refuse a model whose weights are quantized: pruning and the layer bank start from dense ones."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else type(found).__name__
    return (
        f"model.source: the model is already quantized (method {method}); pruning and the layer bank need dense "
        "weights, so name the model it was made from"
    )


def rank(config: Any, quantize: Quantize) -> str | None:
    """Refuse a LoRA rank that a linear cannot have."""
    shape = architecture.shapes(config)[0]
    smallest = min(min(architecture.linear_shape(config, shape, name)) for name in LINEARS)
    if quantize.r > smallest:
        at = ATTENTION[1].split(".")[1]
        return f"quantize.r: rank {quantize.r} is more than the {smallest} of the smallest linear ({at}); lower it"
    return None


def length(config: Any, section: str, max_length: int) -> str | None:
    """Refuse rows longer than what the model was made for."""
    most = config.max_position_embeddings
    if max_length > most:
        return f"{section}.max_length: {max_length} tokens are more than the model's {most} positions; lower it"
    return None


def budget(
    config: Any, asked: float | None, prune: Prune, quantize: Quantize, recover: Recover, evaluate: Evaluate
) -> str | None:
    """Refuse a budget of memory that not even 4 bits everywhere can meet.

    The shapes of blocks are known after pruning only, and the search then judges exactly. This is the prediction for
    blocks that all lose the same share, less a margin.

    Args:
        config: The model's config.
        asked: The budget in GiB; None: none.
        prune: Section ``prune``.
        quantize: Section ``quantize``.
        recover: Section ``recover``.
        evaluate: Section ``evaluate``.
    """
    if asked is None:
        return None
    from pipeline import GIB
    from pipeline.compress import quantize as quantize_
    from pipeline.results import plan
    from pipeline.trial import memory
    from pipeline.trial import recover as recover_
    from pipeline.trial.context import memory_setting

    even = plan.uniform(plan.config_of(vars(config), "model.source"), prune.ratio, prune.multiple_of)
    setting = memory_setting(
        recover_.Settings(**recover.model_dump()),
        evaluate.batch_tokens,
        quantize_.Settings(**quantize.model_dump()),
    )
    least = memory.training(even, plan.bits_of(even, 0), setting)[1] / GIB
    if asked < _EVEN * least:
        return (
            f"search.memory_budget_gib: {asked} GiB, but recovery with {prune.ratio} pruned and 4 bits everywhere "
            f"takes about {least:.2f}; raise it, prune more, or lower recover.micro_batch_size (`mlflow run . -e plan` "
            "tells what fits)"
        )
    return None


def seed_bits(config: Any, search: Search) -> str | None:
    """Refuse bit strings that do not have one digit for each unit."""
    for bits in search.seed_bits:
        if len(bits) != _units(config, search.granularity):
            return f"search.seed_bits: {_miscounted(config, search.granularity, bits)}"
    return None


def choice(config: Any, build: Build, granularity: str) -> str | None:
    """Refuse a bit string to build that does not have one digit for each unit; a run's id has 32 digits."""
    bits = build.choose
    if set(bits) <= {"4", "8"} and len(bits) not in (32, _units(config, granularity)):
        return f"build.choose: {_miscounted(config, granularity, bits)}"
    return None


def _units(config: Any, granularity: str) -> int:
    return config.num_hidden_layers * len(GRANULARITIES[granularity])


def _miscounted(config: Any, granularity: str, bits: str) -> str:
    wanted = _units(config, granularity)
    return (
        f"bits {bits!r} are {len(bits)} digits, but with granularity {granularity} the model has {wanted} units; "
        "give one digit for each, block 0 first"
    )
