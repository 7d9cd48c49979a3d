"""The model card of the exported forms, and Ollama's ``Modelfile``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.data.prompts import prompt

_MB = 1e6


@dataclass(frozen=True)
class Form:
    """One exported form of the model.

    Attributes:
        title: What it is called.
        what: What it is.
        run: The lines that run it, in ``language``.
        language: Of those lines.
        size_bytes: On disk.
        figures: What was measured: label -> text.
    """

    title: str
    what: str
    run: str
    language: str
    size_bytes: int
    figures: Mapping[str, str] = field(default_factory=dict)


def card(name: str, forms: list[Form], costs: Mapping[str, Mapping[str, str]], lineage: Mapping[str, str]) -> str:
    """Return the card in Markdown.

    Args:
        name: Of the model.
        forms: Its forms.
        costs: Label of a row -> label of a model -> text: what it costs to run.
        lineage: What it was made from.
    """
    prompted = ["It was recovered on Alpaca's prompts:", f"```\n{prompt('What is the capital of France?', '')}\n```"]
    if lineage.get("prompt") == "chat":
        prompted = ["It was recovered on conversations in its own chat template, which its tokenizer holds."]
    parts = [
        f"---\ntags: [pruned, mixed-precision, gguf]\n---\n# {name}",
        "A causal language model that was pruned, quantized to 4 and 8 bits by a search, and recovered with LoRA "
        f"(QPruner, arXiv 2412.11629). {prompted[0]}",
        *prompted[1:],
    ]
    for form in forms:
        listed = {"size": f"{form.size_bytes / _MB:.1f} MB", **form.figures}
        parts += [
            f"## {form.title}",
            form.what,
            "\n".join(f"- {label}: {text}" for label, text in listed.items()),
            f"```{form.language}\n{form.run}\n```",
        ]
    if costs:
        parts += ["## What it costs to run", _table(costs)]
    parts += ["## Origin", "\n".join(f"- {key}: `{value}`" for key, value in lineage.items())]
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, Mapping[str, str]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[label, *(cells[column] for column in columns)] for label, cells in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def modelfile(file: str, chat_template: bool, stop: str | None, adapters: str | None = None) -> str:
    """Return Ollama's description of a GGUF file; without a chat template of its own, the prompt is Alpaca's.

    Args:
        file: Name of the GGUF file beside it.
        chat_template: Whether the file holds a chat template.
        stop: The text that ends an answer.
        adapters: Name of a GGUF file of adapters beside it.
    """
    lines = [f"FROM ./{file}"]
    if adapters:
        lines.append(f"ADAPTER ./{adapters}")
    if not chat_template:
        lines.append(f'TEMPLATE """{prompt("{{ .Prompt }}", "")}"""')
    if stop:
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join([*lines, "PARAMETER temperature 0"]) + "\n"
