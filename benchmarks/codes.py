"""What codes cost the unpruned model, without recovery: perplexity of a text and the loss of held-out responses.

    python -m benchmarks.codes artifacts/base alpaca=FILE text=FILE [rows=48] [samples=96] [key=value ...] [CODES ...]

CODES name what all linears hold: ``16``, ``int8``, ``nf4`` or ``fp4`` (calibrated), each with ``:nearest`` for the
nearest codes or with settings of ``codes.Fit``, such as ``nf4:damping=0.1``; also ``double_quant=true`` and
``sequential=true`` (Gram matrices from the inputs that the earlier blocks' codes leave). A line for each.

Calibration: ``samples`` windows of ``length=256`` tokens of the longest Alpaca responses, ``noise=0.1`` of the tokens
at random. Text: 20 windows of 256 tokens of its first 200,000 characters. Responses: ``rows`` held-out rows.
``seed=42`` draws rows and noise. All in fp32; without CODES, those of the table in docs/results.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import perplexity
from pipeline import checkpoint
from pipeline.compress import codes, layer_bank, linear_grams, quantize
from pipeline.data import alpaca, calibration
from pipeline.data.alpaca import Batch
from pipeline.trial import recover

USUAL = ("16", "int8:nearest", "nf4:nearest", "nf4:descending=false,factors=[1.0]", "nf4:factors=[1.0]", "nf4")
KINDS = {"16": 16, "int8": 8, "nf4": 4, "fp4": 4}


@dataclass(frozen=True)
class Setting:
    """Where text and rows lie and how much of them is read."""

    alpaca: str
    text: str
    rows: int = 48
    samples: int = 96
    length: int = 256
    noise: float = 0.1
    seed: int = 42


@dataclass(frozen=True)
class Codes:
    """What all linears hold.

    Attributes:
        name: As asked for.
        kind: ``16``, ``int8``, ``nf4`` or ``fp4``.
        fit: None: the nearest codes.
        double_quant: Quantize the 4-bit scales too.
        sequential: Calibrate each block on what the earlier blocks' codes leave.
    """

    name: str
    kind: str
    fit: codes.Fit | None
    double_quant: bool = False
    sequential: bool = False


def parse(name: str) -> Codes:
    """Return the codes that a name such as ``nf4:damping=0.1`` stands for."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        raise SystemExit(f"{name}: codes begin with {', '.join(KINDS)}")
    if rest == "nearest" or kind == "16":
        return Codes(name, kind, None)
    text = rest.replace("=", ": ")
    chosen = yaml.safe_load(f"{{{text}}}") if text else {}
    own = {key: bool(chosen.pop(key)) for key in ("double_quant", "sequential") if key in chosen}
    known = {field.name for field in fields(codes.Fit)}
    if set(chosen) - known:
        raise SystemExit(f"{name}: unknown settings {sorted(set(chosen) - known)}; there are {sorted(known)}")
    if "factors" in chosen:
        chosen["factors"] = tuple(chosen["factors"])
    return Codes(name, kind, replace(codes.Fit(), **chosen), **own)


def calibration_set(tokenizer: Any, setting: Setting) -> list[Batch]:
    """Return the calibration windows with some of their tokens at random."""
    windows = alpaca.responses(setting.alpaca, tokenizer, setting.rows, setting.samples, setting.length, setting.seed)
    parts = list(alpaca.batches(windows, 8, tokenizer.pad_token_id, whole=True))
    return list(calibration.noised(parts, setting.noise, len(tokenizer), setting.seed)) if setting.noise else parts


def stored(weights: Sequence[torch.Tensor], gram: torch.Tensor, chosen: Codes) -> list[quantize.Stored]:
    """Return the codes of linears with the same inputs."""
    bits, four_bit = KINDS[chosen.kind], chosen.kind if KINDS[chosen.kind] == 4 else "nf4"
    if chosen.fit is None:
        settings = quantize.Settings("nearest", four_bit, chosen.double_quant, "loftq", 1, 8, 16)
        return [quantize.quantize(weight, bits, settings) for weight in weights]
    return codes.calibrated(weights, gram, bits, four_bit, chosen.double_quant, chosen.fit)


def put(model: Any, matrices: Iterable[dict[str, torch.Tensor | None]], chosen: Codes) -> float:
    """Replace every linear by what its codes stand for; return the mean share of its outputs' energy that is lost."""
    lost, groups = [], iter(layer_bank.groups_of(model.config))
    for block in matrices:
        while block:
            group = next(groups)
            gram = [block.pop(name) for name in group][0]
            assert gram is not None  # only experts may read too little text
            weights = [model.get_submodule(name).weight for name in group]
            dense = [weight.detach().clone() for weight in weights]
            for weight, before, tensors in zip(weights, dense, stored(dense, gram, chosen), strict=True):
                weight.data = quantize.dequantize(tensors, torch.float32)
                lost.append(_energy(before - weight.detach(), gram) / _energy(before, gram))
    return sum(lost) / len(lost)


def _energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    return float(((weight @ gram) * weight).sum())


def response_loss(model: Any, tokenizer: Any, setting: Setting) -> float:
    """Return the mean loss of a held-out response token, in nats."""
    _, held_out = alpaca.split(alpaca.read(setting.alpaca), setting.rows, setting.seed)
    examples = alpaca.encode(held_out, tokenizer, setting.length)
    return recover.mean_loss(recover.row_losses(model, examples, 8, tokenizer.pad_token_id))[0]


def main(folder: Path, setting: Setting, asked: Sequence[Codes]) -> None:
    """Print a line for each of the codes."""
    tokenizer = checkpoint.load_tokenizer(folder)
    text, parts = Path(setting.text).read_text(encoding="utf-8"), calibration_set(tokenizer, setting)
    print(f"{setting}: {linear_grams.count_tokens(parts)} calibration tokens", flush=True)
    shared: list[dict[str, torch.Tensor | None]] = []  # Gram matrices of the dense model
    for chosen in asked:
        model, start = checkpoint.load_model(folder, dtype=torch.float32), time.perf_counter()
        lost = 0.0
        if chosen.sequential:
            lost = put(model, linear_grams.collect(model, parts, sequential=True), chosen)
        elif chosen.kind != "16":
            shared = shared or list(linear_grams.collect(model, parts))
            lost = put(model, map(dict, shared), chosen)
        seconds = time.perf_counter() - start
        found = perplexity.perplexity(model, tokenizer, text), response_loss(model, tokenizer, setting)
        print(
            f"{chosen.name}: perplexity {found[0]:.2f}, response loss {found[1]:.4f}, "
            f"lost of the outputs' energy {lost:.5f}, {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    base, *rest = sys.argv[1:]
    names_ = {field.name for field in fields(Setting)}
    given = {key: value for key, sign, value in (item.partition("=") for item in rest) if sign and key in names_}
    if len({"alpaca", "text"} & given.keys()) < 2:
        raise SystemExit(__doc__)
    read: dict[str, Any] = {key: yaml.safe_load(value) for key, value in given.items()}
    setting_ = Setting(**read | {key: given[key] for key in ("alpaca", "text")})
    wanted = [item for item in rest if item.partition("=")[0] not in names_]
    main(Path(base), setting_, [parse(name) for name in wanted or USUAL])
