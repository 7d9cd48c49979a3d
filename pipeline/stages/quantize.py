"""Stage ``quantize``: the layer bank, every linear at 4 and at 8 bits with its adapter (paper sections 2.1 and 3.3).

Reads ``artifacts/pruned``. Writes ``artifacts/bank``.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import checkpoint, device, storage
from pipeline.compress import quantize
from pipeline.params import Params
from pipeline.paths import BANK, PRUNED
from pipeline.settings import settings_of
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    storage.verify(PRUNED, "prune")
    write(params, PRUNED, BANK)
    run.metrics({"bank_bytes": sum(path.stat().st_size for path in BANK.iterdir())})


def write(params: Params, pruned: Path, target: Path) -> None:
    """Quantize every linear of a pruned checkpoint into a layer bank."""
    names = quantize.names_of(checkpoint.load_config(pruned))
    where = device.choose(params.device, params.dtype).device
    settings = settings_of(quantize.Settings, params.quantize)
    with storage.writing(target) as folder:
        quantize.run(checkpoint.load_state(pruned), names, settings, params.seed, folder, where)
