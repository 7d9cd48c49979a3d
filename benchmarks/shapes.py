"""One shape for all blocks against a shape for each: what it costs, before and after a recovery in 16 bits.

    python -m benchmarks.shapes artifacts/base alpaca=FILE text=FILE [ratios=0.1,0.2,0.35] [steps=16] [key=value ...]

A line for each ratio and way to cut: ``free`` with the block ranges of params.yaml, ``free, all blocks`` without them,
and ``uniform``. Perplexity of 20 windows of 256 tokens of the text's first 200,000 characters; mean loss of a token of
48 held-out responses. The rest of section ``prune`` is that of params.yaml, changed by key=value. ``steps=0`` leaves
out the recovery; else LoRA trains that many optimizer steps on the other rows, as section ``recover`` says. All in
fp32; both sides of a ratio share calibration, rows and order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from benchmarks import perplexity
from pipeline import architecture, checkpoint, documents, params
from pipeline.compress import prune, quantize
from pipeline.compress.prune import Pruned
from pipeline.data import alpaca, calibration
from pipeline.data.alpaca import Example
from pipeline.settings import pruning, settings_of
from pipeline.trial import adapters, recover
from pipeline.trial.recover import Rows
from pipeline.trial.training import Settings as Training

HELD_OUT, SEED = 48, 42
WHOLE = params.BlockRange(first=0, last=-1)
WAYS: dict[str, dict[str, Any]] = {
    "free": {"shapes": "free"},
    "free, all blocks": {"shapes": "free", "attention_blocks": WHOLE, "mlp_blocks": WHOLE},
    "uniform": {"shapes": "uniform", "attention_blocks": WHOLE, "mlp_blocks": WHOLE},
}


@dataclass(frozen=True)
class Judge:
    """What a model is judged by and recovered on."""

    tokenizer: Any
    text: str
    rows: Rows
    training: Training
    lora: quantize.Settings

    def figures(self, model: Any) -> str:
        """Return perplexity and response loss."""
        losses = recover.row_losses(model, self.rows.validation, 8, self.rows.padding)
        words = perplexity.perplexity(model, self.tokenizer, self.text)
        return f"perplexity {words:.2f}, response loss {recover.mean_loss(losses)[0]:.4f}"

    def recovered(self, model: Any) -> Any:
        """Return the model trained with adapters."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            wrapped = get_peft_model(model, adapters.lora_config(model.config, self.lora, self.training.dropout))
        adapters.use_byte_dropout(wrapped, self.training.dropout)
        recover.run(wrapped, self.rows, self.training, SEED)
        return wrapped.eval()


def judge(tokenizer: Any, sections: dict[str, Any], rows: Path, text: Path, steps: int) -> Judge:
    """Return the judge of all ways to cut."""
    section = params.Recover.model_validate(sections["recover"])
    training = replace(settings_of(Training, section), steps=steps)

    def encoded(part: Sequence[dict[str, str]]) -> list[Example]:
        return alpaca.encode(part, tokenizer, section.max_length)

    train, held_out = alpaca.split(alpaca.read(rows), HELD_OUT, SEED)
    needed = steps * training.batch_size * 2
    data = Rows(encoded(train[:needed]), encoded(held_out), tokenizer.pad_token_id)
    lora = settings_of(quantize.Settings, params.Quantize.model_validate(sections["quantize"]))
    return Judge(tokenizer, text.read_text(encoding="utf-8"), data, training, lora)


def cut(
    folder: Path, rows: Path, section: params.Prune, ratios: Sequence[float]
) -> Iterator[tuple[str, float, Pruned]]:
    """Yield each way's name, ratio and pruned model; the dense model is scored once for all."""
    tokenizer = checkpoint.load_tokenizer(folder)
    asked: dict[str, Any] = {"text": section.text, "samples": section.samples, "max_length": section.max_length}
    parts = calibration.batches(tokenizer, rows, HELD_OUT, SEED, **asked)
    dense = checkpoint.load_base(folder, dtype=torch.float32)
    every = architecture.parameters(dense.config)
    settings = {name: pruning(section.model_copy(update=way)) for name, way in WAYS.items()}
    scores, grams = prune.scored(dense, parts, settings["uniform"], SEED)  # whose ranges hold all blocks
    for ratio in ratios:
        for name, one in settings.items():
            prune.check(dense.config, replace(one, ratio=ratio))
            keep = prune.select(scores, dense.config, round(every * ratio), one)
            config, state = prune.remove(dense, keep, grams)
            yield name, ratio, Pruned(config, state, (every, architecture.parameters(config)), keep)


def main(folder: Path, rows: Path, text: Path, ratios: Sequence[float], steps: int, changes: dict[str, Any]) -> None:
    """Print a line for the untouched model and one for each way to cut and ratio."""
    sections = documents.read("params.yaml")
    section = params.Prune.model_validate(sections["prune"] | changes)
    if section.steps > 1:
        raise SystemExit("prune.steps: the dense model is scored once here; set it to 1")
    chief = judge(checkpoint.load_tokenizer(folder), sections, rows, text, steps)
    print(f"untouched: {chief.figures(checkpoint.load_model(folder, dtype=torch.float32))}", flush=True)
    for name, ratio, pruned in cut(folder, rows, section, ratios):
        start = time.perf_counter()
        model = checkpoint.from_state(pruned.config, pruned.state).float().eval()
        before = chief.figures(model)
        after = f"; after {steps} steps {chief.figures(chief.recovered(model))}" if steps else ""
        shapes = {(one.heads, one.kv_heads, one.channels) for one in architecture.shapes(pruned.config)}
        shown = f"all blocks {shapes.pop()}" if len(shapes) == 1 else f"{len(shapes)} shapes"
        print(
            f"{name}, ratio {ratio}: removed {pruned.ratio:.4f}, {shown}: {before}{after}"
            f" ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    base, *rest = sys.argv[1:]
    given = dict(item.split("=", 1) for item in rest)
    if len({"alpaca", "text"} & given.keys()) < 2:
        raise SystemExit(__doc__)
    alpaca_, text_ = Path(given.pop("alpaca")), Path(given.pop("text"))
    ratios_ = [float(ratio) for ratio in given.pop("ratios", "0.1,0.2,0.35").split(",")]
    steps_ = int(given.pop("steps", "16"))
    main(Path(base), alpaca_, text_, ratios_, steps_, {key: documents.parse(value) for key, value in given.items()})
