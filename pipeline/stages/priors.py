"""The importance of the units at each ratio, as stage ``importance`` wrote it into ``reports/importance.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from pipeline import storage
from pipeline.compress.priors import Priors
from pipeline.params import Params
from pipeline.paths import REPORTS
from pipeline.stages.shell import made

PATH = REPORTS / "importance.json"


def write(priors: Mapping[float, Priors]) -> None:
    """Write the importance of the units at each ratio."""
    entries = [{"ratio": ratio, **asdict(prior)} for ratio, prior in priors.items()]
    storage.write_text(PATH, json.dumps(entries, indent=1))


def read(params: Params) -> dict[float, Priors]:
    """Return the importance of the units at each ratio.

    Raises:
        CheckpointError: The file is missing or damaged, or lacks a ratio.
    """
    kept = {entry["ratio"]: Priors.from_json(entry) for entry in made("importance")}
    if missing := [ratio for ratio in params.prune.ratios if ratio not in kept]:
        raise storage.CheckpointError(f"{PATH} has no figures for ratio {missing[0]:g}; {storage.again('importance')}")
    return {ratio: kept[ratio] for ratio in params.prune.ratios}
