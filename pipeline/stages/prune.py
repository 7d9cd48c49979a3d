"""Stage ``prune``: remove the structures that the loss misses least (paper section 3.1).

Reads ``artifacts/base`` and ``data/alpaca.jsonl``. Writes ``artifacts/pruned``, ``reports/prune.json`` and
``reports/prune.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import checkpoint, device, storage
from pipeline.compress import prune, structures
from pipeline.compress.prune import Pruned
from pipeline.data import calibration
from pipeline.data.alpaca import Batch
from pipeline.params import Params
from pipeline.paths import ALPACA, BASE, PRUNED, REPORTS
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
    pruned = write(params, {params.prune.ratio: PRUNED})
    before, after = pruned.parameters
    keep_figures(run, "prune", {"ratio": pruned.ratio, "parameters_before": before, "parameters_after": after})
    _draw(pruned)
    run.artifact(REPORTS / "prune.png")


def write(params: Params, targets: Mapping[float, Path]) -> Pruned:
    """Prune the base model to each ratio into its checkpoint folder; return the last one."""
    storage.verify(BASE, "fetch")
    compute = device.choose(params.device, params.dtype)
    model, tokenizer = checkpoint.load_base(BASE, compute.device, compute.dtype), checkpoint.load_tokenizer(BASE)
    parts = calibration_set(params, tokenizer, model.device)
    at_ratios = prune.at_ratios(model, parts, pruning(params.prune), list(targets), params.seed)
    for target, pruned in zip(targets.values(), at_ratios, strict=True):
        with storage.writing(target) as folder:
            checkpoint.from_state(pruned.config, checkpoint.stored(pruned.state)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return pruned


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


def _draw(pruned: Pruned) -> None:
    kinds = {"attention": "key/value heads kept", "mlp": "MLP channels kept"}
    series = {label: [len(block[kind]) for block in pruned.kept] for kind, label in kinds.items()}
    figures.bar_chart([str(index) for index in range(len(pruned.kept))], series, REPORTS / "prune.png")
