"""Stage ``quantize``: the layer bank, every linear at 4 and at 8 bits with its adapter (paper sections 2.1 and 3.3).

Reads ``artifacts/pruned`` and ``data/alpaca.jsonl``. Writes a bank for each of its models into ``artifacts/bank``.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import checkpoint, cores, device, storage
from pipeline.compress import bank_writer, layer_bank, linear_grams, quantize
from pipeline.data import calibration
from pipeline.data.alpaca import Batch
from pipeline.params import Params
from pipeline.paths import ALPACA, BANK, PRUNED, at_ratio
from pipeline.settings import settings_of
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    if settings_of(quantize.Settings, params.quantize).reads_inputs:
        run.dataset(ALPACA, "alpaca", "calibration")
    uncalibrated = 0
    for ratio in params.prune.ratios:
        pruned = at_ratio(PRUNED, ratio)
        storage.verify(pruned, "prune")
        uncalibrated += write(params, pruned, at_ratio(BANK, ratio))
    size = sum(path.stat().st_size for path in BANK.glob("*/*"))
    run.metrics({"bank_bytes": size, "uncalibrated_linears": uncalibrated})


def write(params: Params, pruned: Path, target: Path) -> int:
    """Quantize every linear of a pruned checkpoint into a layer bank; return how many had too little text for it."""
    compute = device.choose(params.device, params.dtype)
    settings = settings_of(quantize.Settings, params.quantize)
    state = checkpoint.load_state(pruned)
    groups = layer_bank.groups_of(checkpoint.load_config(pruned))
    with storage.writing(target) as folder:
        if not settings.reads_inputs:
            return bank_writer.write(state, groups, settings, params.seed, folder, compute.device)
        model, text = checkpoint.load_model(pruned, dtype=compute.dtype), calibration_set(params, pruned)
        grams, tokens = linear_grams.collect(model, text, device=compute.device), linear_grams.count_tokens(text)
        if compute.device.type == "cpu":  # a GPU holds one block's matrices
            grams = cores.ahead(grams)
        return bank_writer.write(state, groups, settings, params.seed, folder, compute.device, grams, tokens)


def calibration_set(params: Params, pruned: Path) -> list[Batch]:
    """Return the batches that codes are calibrated on: the longest responses, some of their tokens at random."""
    settings, tokenizer = params.quantize, checkpoint.load_tokenizer(pruned)
    text = calibration.batches(
        tokenizer,
        ALPACA,
        params.data.validation_rows,
        params.seed,
        text="responses",
        samples=settings.samples,
        max_length=settings.max_length,
    )
    return list(calibration.noised(text, settings.noise, len(tokenizer), params.seed)) if settings.noise else text
