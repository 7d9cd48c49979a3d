"""What each format can hold, judged by a model's config alone, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline import architecture
from pipeline.architecture import BlockShape, Config
from pipeline.errors import UserError

# Of llama.cpp's architectures that read heads and widths by block; `llama` and most others size all by the first one.
ROPES = {"deci": ("default", "linear", "llama3"), "openelm": ("default", "linear")}


class ExportError(UserError):
    """A format cannot hold the model, or what was written does not answer like it; what to do."""


def rope(config: Config) -> dict[str, Any]:
    """Return how positions are rotated, as transformers 5 writes it: ``rope_type``, ``rope_theta`` and the factors."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    found = dict(given) if isinstance(given, dict) else {}
    found.setdefault("rope_type", found.pop("type", None) or "default")
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return found


def gguf(config: Config) -> str | None:
    """Return why llama.cpp cannot run a model of this config, pruned or not; None if it can."""
    about = architecture.description(config)
    name, window, kind = about.gguf, architecture.window(config), rope(config)["rope_type"]
    if not name:
        fault = f"of llama.cpp's architectures that read heads and widths by block none has {about.unlike_gguf}"
    elif (function := getattr(config, about.activation, "silu")) != "silu":
        fault = f"its MLP's function is {function}, llama.cpp's is silu"
    elif window:
        fault = f"it attends within a sliding window of {window} tokens, which llama.cpp's `{name}` does not have"
    elif kind not in ROPES[name]:
        fault = f"its rope_type is {kind}, llama.cpp's `{name}` has {', '.join(ROPES[name])}"
    elif name == "openelm" and not config.tie_word_embeddings:
        fault = "its head is not tied to its embeddings, which llama.cpp's only shape-by-block form of Qwen3 asks for"
    elif name == "openelm" and getattr(config, "attention_bias", False):
        fault = "its attention has biases, which llama.cpp's only shape-by-block form of Qwen3 does not have"
    else:
        return None
    return f"export.formats: gguf cannot hold this model: {fault}; take [hf]"


def one_shape(shapes: Sequence[BlockShape]) -> bool:
    """Return whether all blocks have one shape, which engines without a shape by block ask for."""
    return len(set(shapes)) == 1
