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
from pipeline.architecture import ATTENTION, GRANULARITIES, LINEARS, BlockShape
from pipeline.paths import BASE

if TYPE_CHECKING:
    from pipeline.params import BlockRange, Build, Evaluate, Prune, Quantize, Recover, Search

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


def block_range(config: Any, key: str, span: BlockRange) -> str | None:
    """Refuse a block range outside the model."""
    layers = config.num_hidden_layers
    if not span.first <= counted(span, layers) < layers:
        return f"prune.{key}: {span.first} to {span.last} is no range within blocks 0 to {layers - 1}"
    return None


def ratio(config: Any, prune: Prune, key: str, asked: float) -> str | None:
    """Refuse a ratio that would empty a block: each keeps a head, and ``multiple_of`` channels.

    Args:
        config: The model's config.
        prune: Section ``prune``; its own ratio is not read.
        key: What the ratio is called in the params.
        asked: The ratio.
    """
    spans = (("attention_blocks", prune.attention_blocks), ("mlp_blocks", prune.mlp_blocks))
    if any(block_range(config, key, span) for key, span in spans):
        return None  # which is a fault of its own
    removable = sum(
        architecture.group_parameters(config, shape, kind)
        * (architecture.group_count(shape, kind) - kept(prune, shape, kind))
        for index, shape in enumerate(architecture.shapes(config))
        for kind in prune.structures
        if prunable(config, prune, index, kind)
    )
    parameters = architecture.parameters(config)
    if asked * parameters > removable:
        return (
            f"{key}: {asked} of {parameters:,} parameters is more than the {removable / parameters:.3f} "
            "that structures and block ranges allow while each block keeps a head and prune.multiple_of channels; "
            "lower it or widen the ranges"
        )
    return None


def kept(prune: Prune, shape: BlockShape, kind: str) -> int:
    """Return how many structures of a kind a block keeps at least."""
    return 1 if kind == "attention" else min(prune.multiple_of, shape.channels)


def calibrated(importance: str, compensate: bool) -> bool:
    """Return whether pruning reads any text."""
    return compensate or importance not in ("magnitude", "random")


def fitted(importance: str, compensate: bool) -> bool:
    """Return whether pruning reads what layers receive, not only gradients of the loss."""
    return compensate or importance in ("activation", "surgeon")


def span_of(prune: Prune, kind: str) -> BlockRange:
    """Return the blocks in which a kind of structure may go."""
    return prune.attention_blocks if kind == "attention" else prune.mlp_blocks


def prunable(config: Any, prune: Prune, block: int, kind: str) -> bool:
    """Return whether structures of a kind may go from a block."""
    return kind in prune.structures and inside(block, span_of(prune, kind), config.num_hidden_layers)


def inside(block: int, span: BlockRange, layers: int) -> bool:
    """Return whether a block lies in a range."""
    return span.first <= block <= counted(span, layers)


def counted(span: BlockRange, layers: int) -> int:
    """Return the last block of a range: -1 is the last block of the model, -2 the one before it."""
    return span.last if span.last >= 0 else layers + span.last


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
    from pipeline.results import plan
    from pipeline.trial import memory, trial

    even = plan.uniform(plan.config_of(vars(config), "model.source"), prune.ratio, prune.multiple_of)
    setting = trial.memory_setting(recover, evaluate, quantize)
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
