"""Perplexity after pruning, without recovery: how good is a pruning setting?

    python -m benchmarks.perplexity artifacts/base alpaca.jsonl wikitext.txt 0.214,0.313 [draws=5] [key=value ...]

The first 20 windows of 256 tokens of the text's first 200,000 characters. For each ratio. The other settings are
those of section ``prune`` in params.yaml. Each draw shuffles the calibration rows anew.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint, documents, params
from pipeline.compress import prune, structures
from pipeline.compress.modules import token_losses
from pipeline.data import calibration
from pipeline.settings import pruning

WINDOWS, LENGTH = 20, 256


@torch.inference_mode()
def losses(model: Any, tokenizer: Any, text: str, windows: int = WINDOWS) -> torch.Tensor:
    """Return the mean next-token loss within each of a text's first windows, in fp32: [windows], nats."""
    tokens = torch.tensor(tokenizer.encode(text[:200_000])[: windows * LENGTH]).view(windows, LENGTH)
    found = []
    for part in tokens.split(4):
        found.append(token_losses(model(input_ids=part).logits, part).mean(1))
    return torch.cat(found)


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """Return exp of the mean loss of the windows."""
    return float(losses(model, tokenizer, text).double().mean().exp())


def draw(folder: Path, rows: Path, text: Path, settings: params.Prune, ratios: list[float], seed: int) -> list[float]:
    """Prune with one draw of the calibration rows; print a line and return the perplexity for each ratio."""
    tokenizer, model, start = checkpoint.load_tokenizer(folder), checkpoint.load_model(folder), time.time()
    parts = []
    if structures.calibrated(settings.importance, settings.compensate):
        text_of, samples, length = settings.text, settings.samples, settings.max_length
        parts = calibration.batches(tokenizer, rows, 16, seed, text=text_of, samples=samples, max_length=length)
    found = []
    for pruned in prune.at_ratios(model, parts, pruning(settings), ratios, seed):
        smaller = checkpoint.from_state(pruned.config, pruned.state).float().eval()
        found.append(perplexity(smaller, tokenizer, text.read_text(encoding="utf-8")))
        shown = f"kept {1 - pruned.ratio:.4f}, perplexity {found[-1]:.1f}"
        print(f"draw {seed}: {shown}, {time.time() - start:.0f} s", flush=True)
    return found


def main(folder: Path, rows: Path, text: Path, ratios: list[float], changes: dict) -> None:
    """Print a line for each draw and ratio, and one for all draws of a ratio."""
    draws = changes.pop("draws", 1)
    raw = documents.read("params.yaml")["prune"]
    settings = params.Prune.model_validate(raw | changes)
    found = [draw(folder, rows, text, settings, ratios, seed) for seed in range(draws)]
    for ratio, values in zip(ratios, zip(*found, strict=True), strict=True):
        deviation = statistics.stdev(values) if draws > 1 else 0.0
        print(
            f"{changes}, ratio {ratio}: mean {statistics.mean(values):.1f}, median {statistics.median(values):.1f}, "
            f"standard deviation {deviation:.1f} over {draws} draws"
        )


if __name__ == "__main__":
    base, data, words, asked, *rest = sys.argv[1:]
    changes_ = {key: documents.parse(value) for key, _, value in (item.partition("=") for item in rest)}
    main(Path(base), Path(data), Path(words), [float(ratio) for ratio in asked.split(",")], changes_)
