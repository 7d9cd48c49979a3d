"""What the built model costs to run beside the untouched one: quality against tokens a second, size and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.results import labels
from pipeline.results.pages import Section
from pipeline.results.tables import Cell, Table
from pipeline.search.pareto import Point

_MB = 1e6


def section(exported: Mapping[str, float], built: Mapping[str, float], points: Sequence[Point]) -> Section:
    """Return the report's part about running the model.

    Args:
        exported: Figures of the stage ``export``.
        built: Figures of the stage ``build``.
        points: The study's points; the untouched model among them gives its quality.
    """
    whole = [point.metrics for point in points if point.method == labels.UNTOUCHED]
    columns = ["model", "response, nats", "generated tokens/s", "prompt tokens/s", "GGUF, MB", "resident, MB"]
    columns += ["parameters, million", "multiply-adds a token, million", "keys and values a token, kB"]
    rows = [
        _row("untouched (16 bits)", whole[0].get("response_logprob") if whole else None, exported, "untouched_"),
        _row("built", built.get("response_logprob"), exported, ""),
    ]
    return Section("Quality against speed", _lines(exported), Table("In llama.cpp on this processor", columns, rows))


def _row(name: str, quality: float | None, exported: Mapping[str, float], prefix: str) -> list[Cell]:
    def shown(key: str, unit: float = 1, digits: int = 1) -> str:
        value = exported.get(f"{prefix}{key}")
        return "-" if value is None else f"{value / unit:.{digits}f}"

    return [
        name,
        "-" if quality is None else f"{quality:.3f}",
        shown("generated_tokens_per_second"),
        shown("prompt_tokens_per_second", digits=0),
        shown("gguf_bytes", _MB),
        shown("resident_bytes", _MB, 0),
        shown("parameters", 1e6),
        shown("multiply_adds", 1e6),
        shown("cache_bytes", 1e3),
    ]


def _lines(exported: Mapping[str, float]) -> list[str]:
    lines = []
    if "generated_speedup" in exported:
        lines.append(
            f"Built against untouched, interleaved on {exported['threads']:.0f} threads, batches of "
            f"{exported['batch']:.0f}: {exported['generated_speedup']:.2f} times the generated tokens a second, "
            f"{exported['prompt_speedup']:.2f} times the prompt's"
        )
    if exported.get("gguf_checked"):
        difference = exported["gguf_difference"]
        lines.append(
            f"The GGUF file's answers: {abs(difference):.4f} ± {exported['gguf_difference_stderr']:.4f} nats a "
            f"response token {'worse' if difference < 0 else 'better'} than the built model's, on "
            f"{exported['gguf_tokens']:.0f} held-out tokens"
        )
    elif "gguf_bytes" in exported:
        lines.append("The GGUF file was not checked: llama.cpp was not there")
    return lines
