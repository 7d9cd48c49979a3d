"""What cells need: pruned models, layer banks and importances, each made when first asked for and kept.

They stand under ``artifacts/table``, named by digests of what defines them; damaged ones are made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import console, storage, tracking
from pipeline.compress.priors import Priors
from pipeline.identity import code
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BASE
from pipeline.results.cells import at_ratio
from pipeline.search.allocate import Spaces
from pipeline.stages import importance, prune, quantize, trials
from pipeline.stages.trials import Contexts
from pipeline.trial.context import Context

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
        parts = [base, rows, code("pipeline.stages.prune")]
        names = {at: digest(*parts, at_ratio(params, at).prune) for at in sorted({ratio, *ratios})}
        self._folders = {at: KEPT / f"pruned-{name}" for at, name in names.items()}
        self._bank = digest(names[ratio], params.quantize, code("pipeline.stages.quantize"))
        settings = (params.importance, params.search.granularity)
        self._priors = digest(self._bank, *settings, code("pipeline.stages.importance"))

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
        kept = read_json(path, {field.name for field in fields(Priors)})
        if kept is not None:
            return Priors.from_json(kept)
        priors = importance.measure(self.params, self.pruned, self.bank, importance.predictions(self.params))
        storage.write_text(path, json.dumps(asdict(priors), indent=1))
        return priors

    @cached_property
    def contexts(self) -> Contexts:
        """Return what its trials share."""
        return trials.Contexts(self.params, {self.params.prune.ratio: (self.pruned, self.bank)})

    @property
    def context(self) -> Context:
        """Return what the trials of its only ratio share."""
        return self.contexts.any

    @cached_property
    def spaces(self) -> Spaces:
        """Return its feasible vectors."""
        return trials.spaces(self.params, self.contexts)


def sound(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a checkpoint folder that matches its checksums: as it is, or made now if it is missing or damaged."""
    if folder.exists():
        try:
            storage.verify(folder, "fetch")
            return folder
        except storage.CheckpointError as error:
            console.note(f"{str(error).partition(';')[0]}; making it again")
    make(folder)
    return folder


def read_json(path: Path, needs: set[str]) -> dict[str, Any] | None:
    """Return what is kept in a file; None if it is missing, or damaged or without what it needs, which is said."""
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        kept = None
    if isinstance(kept, dict) and needs <= kept.keys():
        return kept
    console.note(f"{path} is damaged; making it again")
    return None
