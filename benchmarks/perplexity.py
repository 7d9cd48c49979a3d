"""Perplexity after pruning, without recovery: how good is a pruning setting?

    python -m benchmarks.perplexity artifacts/base alpaca.jsonl wikitext2_valid.txt 0.214 [draws=5] [key=value ...]

The first 20 windows of 256 tokens of the text's first 200,000 characters. The other settings are those of section
``prune`` in params.yaml. Each draw shuffles the calibration rows anew.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import yaml

from pipeline import alpaca, checkpoint, params, prune

WINDOWS, LENGTH = 20, 256


@torch.inference_mode()
def losses(model, tokenizer, text: str, windows: int = WINDOWS) -> torch.Tensor:
    """Return the mean next-token loss within each of a text's first windows, in fp32: [windows], nats."""
    tokens = torch.tensor(tokenizer.encode(text[:200_000])[: windows * LENGTH]).view(windows, LENGTH)
    found = []
    for part in tokens.split(4):
        logits = model(input_ids=part).logits[:, :-1].float()
        every = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(every.view(len(part), -1).mean(1))
    return torch.cat(found)


def perplexity(model, tokenizer, text: str) -> float:
    """Return exp of the mean loss of the windows."""
    return float(losses(model, tokenizer, text).double().mean().exp())


def draw(folder: Path, rows: Path, text: Path, settings: params.Prune, seed: int) -> float:
    """Prune with one draw of the calibration rows; print a line, return the perplexity."""
    tokenizer, start = checkpoint.load_tokenizer(folder), time.time()
    examples = alpaca.SOURCES[settings.text](rows, tokenizer, 16, settings.samples, settings.max_length, seed)
    parts = list(alpaca.batches(examples, 8, tokenizer.pad_token_id, whole=True))
    pruned = prune.run(checkpoint.load_model(folder), parts, settings, seed)
    seconds = time.time() - start
    model = checkpoint.from_state(pruned.config, pruned.state).float().eval()
    value = perplexity(model, tokenizer, text.read_text(encoding="utf-8"))
    print(f"draw {seed}: kept {1 - pruned.ratio:.4f}, perplexity {value:.1f}, {seconds:.0f} s to prune", flush=True)
    return value


def main(folder: Path, rows: Path, text: Path, ratio: float, changes: dict) -> None:
    """Print a line for each draw and one for all."""
    draws = changes.pop("draws", 1)
    raw = yaml.safe_load(Path("params.yaml").read_text())["prune"]
    settings = params.Prune.model_validate(raw | changes | {"ratio": ratio})
    found = [draw(folder, rows, text, settings, seed) for seed in range(draws)]
    deviation = statistics.stdev(found) if draws > 1 else 0.0
    print(
        f"{changes}: mean {statistics.mean(found):.1f}, median {statistics.median(found):.1f}, standard deviation "
        f"{deviation:.1f} over {draws} draws"
    )


if __name__ == "__main__":
    base, data, words, asked, *rest = sys.argv[1:]
    changes_ = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in rest)}
    main(Path(base), Path(data), Path(words), float(asked), changes_)
