"""Stage ``importance``: mutual information and quantization sensitivity of each unit (paper section 3.2).

Reads ``artifacts/base``, ``artifacts/pruned``, ``artifacts/bank`` and ``data/alpaca.jsonl``. Writes
``reports/importance.json`` and ``reports/importance.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import architecture, checkpoint, device, storage
from pipeline.compress import importance
from pipeline.compress.importance import Predictions
from pipeline.compress.layer_bank import Bank
from pipeline.compress.priors import Priors
from pipeline.data import alpaca
from pipeline.data.alpaca import Batch
from pipeline.params import Params
from pipeline.paths import ALPACA, BANK, BASE, PRUNED, REPORTS, at_ratio
from pipeline.results import figures
from pipeline.settings import settings_of
from pipeline.stages import priors as kept
from pipeline.tracking import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_AT_ONCE = 4  # a pass back through a large model keeps every block's states


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    run.dataset(ALPACA, "alpaca", "calibration")
    dense = predictions(params)
    priors = {}
    for ratio in params.prune.ratios:
        pruned, bank = at_ratio(PRUNED, ratio), at_ratio(BANK, ratio)
        storage.verify(pruned, "prune")
        storage.verify(bank, "quantize")
        priors[ratio] = measure(params, pruned, bank, dense)
        _log(run, ratio, priors[ratio])
    kept.write(priors)
    _draw(priors)
    for name in ("importance.json", "importance.png"):
        run.artifact(REPORTS / name)


def measure(params: Params, pruned: Path, bank: Path, dense: Predictions) -> Priors:
    """Measure the importance of a pruned checkpoint's units, as its layer bank holds them.

    Args:
        params: The params.
        pruned: The checkpoint.
        bank: Its bank.
        dense: What the model before pruning predicts for the same rows.
    """
    compute = device.choose(params.device, params.dtype)
    model = checkpoint.load_model(pruned, compute.device, compute.dtype)
    units = architecture.units(model.config, params.search.granularity)
    settings = settings_of(importance.Settings, params.importance)
    parts = _calibration(params, checkpoint.load_tokenizer(pruned))
    return importance.run(model, parts, units, settings, Bank(bank), params.seed, dense)


def predictions(params: Params) -> Predictions:
    """Return what the model before pruning predicts for the calibration rows."""
    storage.verify(BASE, "fetch")
    compute = device.choose(params.device, params.dtype)
    model = checkpoint.load_base(BASE, compute.device, compute.dtype)
    parts = [part.to(model.device) for part in _calibration(params, checkpoint.load_tokenizer(BASE))]
    return importance.predictions(model, parts)


def _calibration(params: Params, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    text = params.importance
    rows = alpaca.rows(ALPACA, tokenizer, params.data.validation_rows, text.samples, text.max_length, params.seed)
    return list(alpaca.batches(rows, _ROWS_AT_ONCE, tokenizer.pad_token_id, whole=False))


def _log(run: Run, ratio: float, priors: Priors) -> None:
    mark = f"_{ratio:g}"
    run.metrics({f"divergence_4bit{mark}": priors.divergence, f"distance{mark}": priors.distance})
    for index, (information, gain) in enumerate(zip(priors.mutual_information, priors.sensitivity, strict=True)):
        run.metrics({f"mutual_information{mark}": information, f"sensitivity{mark}": gain}, step=index)


def _draw(priors: Mapping[float, Priors]) -> None:
    names = {"mutual information, nats": "mutual_information", "sensitivity, nats": "sensitivity"}
    series = {
        f"{label}, {100 * ratio:g} %": getattr(prior, name)
        for label, name in names.items()
        for ratio, prior in priors.items()
    }
    figures.bar_chart(next(iter(priors.values())).units, series, REPORTS / "importance.png")
