"""Stage ``prune``: remove the structures that the loss misses least (paper section 3.1).

Reads ``artifacts/base`` and ``data/alpaca.jsonl``. Writes a model for each of ``prune.ratios`` into
``artifacts/pruned``, ``reports/prune.json`` and ``reports/prune.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import checkpoint, device, storage
from pipeline.compress import prune, structures
from pipeline.compress.prune import Pruned
from pipeline.data import calibration
from pipeline.data.alpaca import Batch
from pipeline.params import Params
from pipeline.paths import ALPACA, BASE, PRUNED, REPORTS, at_ratio
from pipeline.results import figures
from pipeline.settings import pruning
from pipeline.stages.shell import keep_figures
from pipeline.tracking import Run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    run.dataset(ALPACA, "alpaca", "calibration")
    models = write(params, {ratio: at_ratio(PRUNED, ratio) for ratio in params.prune.ratios})
    figures: dict[str, float] = {"parameters_before": next(iter(models.values())).parameters[0]}
    for ratio, pruned in models.items():
        figures |= {f"ratio_{ratio:g}": pruned.ratio, f"parameters_{ratio:g}": pruned.parameters[1]}
    keep_figures(run, "prune", figures)
    _draw(models)
    run.artifact(REPORTS / "prune.png")


def write(params: Params, targets: Mapping[float, Path]) -> dict[float, Pruned]:
    """Prune the base model to each ratio into its checkpoint folder; return the models without their tensors."""
    storage.verify(BASE, "fetch")
    compute = device.choose(params.device, params.dtype)
    model, tokenizer = checkpoint.load_base(BASE, compute.device, compute.dtype), checkpoint.load_tokenizer(BASE)
    parts = calibration_set(params, tokenizer, model.device)
    at_ratios = prune.at_ratios(model, parts, pruning(params.prune), list(targets), params.seed)
    models = {}
    for (ratio, target), pruned in zip(targets.items(), at_ratios, strict=True):
        with storage.writing(target) as folder:
            checkpoint.from_state(pruned.config, checkpoint.stored(pruned.state)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        models[ratio] = replace(pruned, state={})
    return models


def calibration_set(
    params: Params, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu", rows: Path = ALPACA
) -> list[Batch]:
    """Return the batches that pruning is calibrated on; none where it reads no text."""
    settings = params.prune
    if not structures.calibrated(settings.importance, settings.compensate):
        return []
    return calibration.batches(
        tokenizer,
        rows,
        params.data.validation_rows,
        params.seed,
        text=settings.text,
        samples=settings.samples,
        max_length=settings.max_length,
        device=device,
    )


def _draw(models: Mapping[float, Pruned]) -> None:
    """Draw what each block keeps at the ratios that remove something, else at the only one."""
    kinds = {"attention": "key/value heads kept", "mlp": "MLP channels kept"}
    shown = {ratio: model for ratio, model in models.items() if ratio} or models
    series = {
        f"{label}, {100 * ratio:g} %": [len(block[kind]) for block in model.kept]
        for kind, label in kinds.items()
        for ratio, model in shown.items()
    }
    blocks = len(next(iter(shown.values())).kept)
    figures.bar_chart([str(index) for index in range(blocks)], series, REPORTS / "prune.png")
