"""What cells need: pruned models, layer banks and importances, each made when first asked for and kept.

They stand under ``artifacts/table``, named by digests of what defines them; damaged ones are made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import console, storage, tracking
from pipeline.compress.importance import MEASURED, Priors
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BASE, BENCHMARKS
from pipeline.results.cells import at_ratio
from pipeline.search.allocate import Space
from pipeline.stages import importance, prune, quantize
from pipeline.trial import trial
from pipeline.trial.trial import Context

KEPT = Path("artifacts/table")


class Supplies:
    """What the cells of one set of params need.

    Args:
        params: The params.
        ratios: Pruning ratios that other cells need: what is missing of them is made with this one's, as one
            calibration serves all.
    """

    def __init__(self, params: Params, ratios: Sequence[float] = ()):
        self.params = params
        base = storage.sha256(BASE / storage.CHECKSUMS)
        rows = [tracking.md5(ALPACA), params.data.validation_rows, params.seed]
        ratio = params.prune.ratio
        names = {at: digest(base, rows, at_ratio(params, at).prune) for at in sorted({ratio, *ratios})}
        self._folders = {at: KEPT / f"pruned-{name}" for at, name in names.items()}
        self._bank = digest(names[ratio], params.quantize)
        four_bit = params.quantize.model_dump(include={"four_bit", "double_quant"})
        self._priors = digest(names[ratio], params.importance, four_bit, params.search.granularity, MEASURED)

    @cached_property
    def pruned(self) -> Path:
        """Return the folder of the pruned model."""
        folder = self._folders[self.params.prune.ratio]
        return sound(folder, lambda folder: prune.write(self.params, self._missing(folder)))

    def _missing(self, wanted: Path) -> dict[float, Path]:
        return {at: folder for at, folder in self._folders.items() if folder == wanted or not folder.exists()}

    @cached_property
    def bank(self) -> Path:
        """Return the folder of its layer bank."""
        pruned = self.pruned
        return sound(KEPT / f"bank-{self._bank}", lambda folder: quantize.write(self.params, pruned, folder))

    @cached_property
    def priors(self) -> Priors:
        """Return the importance of its units."""
        path = KEPT / f"importance-{self._priors}.json"
        kept = read_json(path)
        return Priors.from_json(kept) if kept is not None else importance.write(self.params, self.pruned, path)

    @cached_property
    def context(self) -> Context:
        """Return what its trials share."""
        return trial.load(self.params, self.pruned, self.bank, ALPACA, BENCHMARKS)

    @cached_property
    def space(self) -> Space:
        """Return its feasible bit vectors."""
        return trial.space(self.context)


def sound(folder: Path, make: Callable[[Path], Any]) -> Path:
    """Return a checkpoint folder that matches its checksums: as it is, or made now if it is missing or damaged."""
    if folder.exists():
        try:
            storage.verify(folder, "fetch")
            return folder
        except storage.CheckpointError as error:
            console.note(f"{str(error).partition(';')[0]}; making it again")
    make(folder)
    return folder


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds; None if it is missing or damaged, so that it is made again."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        console.note(f"{path} is damaged; making it again")
        return None
