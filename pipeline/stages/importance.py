"""Stage ``importance``: mutual information and quantization sensitivity of each unit (paper section 3.2).

Reads ``artifacts/pruned``, ``artifacts/bank`` and ``data/alpaca.jsonl``. Writes ``reports/importance.json`` and
``reports/importance.png``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pipeline import architecture, checkpoint, device, storage
from pipeline.compress import importance
from pipeline.compress.importance import Priors
from pipeline.compress.layer_bank import Bank
from pipeline.data import alpaca
from pipeline.params import Params
from pipeline.paths import ALPACA, BANK, PRUNED, REPORTS
from pipeline.results import figures
from pipeline.settings import settings_of
from pipeline.tracking import Run

_ROWS_AT_ONCE = 4  # a pass back through a large model keeps every block's states


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    storage.verify(PRUNED, "prune")
    storage.verify(BANK, "quantize")
    run.dataset(ALPACA, "alpaca", "calibration")
    priors = write(params, PRUNED, BANK, REPORTS / "importance.json")
    _draw(priors)
    run.metrics({"divergence_4bit": priors.divergence, "tokens": priors.tokens})
    for index, (information, gain) in enumerate(zip(priors.mutual_information, priors.sensitivity, strict=True)):
        run.metrics({"mutual_information": information, "sensitivity": gain}, step=index)
    for name in ("importance.json", "importance.png"):
        run.artifact(REPORTS / name)


def write(params: Params, pruned: Path, bank: Path, target: Path) -> Priors:
    """Measure the importance of a pruned checkpoint's units, as its layer bank holds them, into a JSON file."""
    compute = device.choose(params.device, params.dtype)
    model = checkpoint.load_model(pruned, compute.device, compute.dtype)
    tokenizer = checkpoint.load_tokenizer(pruned)
    text = params.importance
    rows = alpaca.rows(ALPACA, tokenizer, params.data.validation_rows, text.samples, text.max_length, params.seed)
    parts = list(alpaca.batches(rows, _ROWS_AT_ONCE, tokenizer.pad_token_id, whole=False))
    units = architecture.units(model.config, params.search.granularity)
    settings = settings_of(importance.Settings, params.importance)
    priors = importance.run(model, parts, units, settings, Bank(bank), params.seed)
    storage.write_text(target, json.dumps(asdict(priors), indent=1))
    return priors


def _draw(priors: Priors) -> None:
    series = {"mutual information, nats": priors.mutual_information, "sensitivity, nats": priors.sensitivity}
    figures.bar_chart(priors.units, series, REPORTS / "importance.png")
