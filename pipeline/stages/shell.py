"""What all stages share: a tracked run around each, figures that DVC and MLflow both keep, and how one is started."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline import storage, tracking
from pipeline.params import Params, flatten
from pipeline.paths import REPORTS
from pipeline.stages import PAPER
from pipeline.tracking import Run

_WITHOUT_MODEL = ("fetch", "pareto", "register", "report")  # they need no torch, which takes seconds to import


def start(name: str, params: Params) -> None:
    """Run a stage, or one of the paper's commands, as a tracked MLflow run under its name.

    The run shows the seed and the section of the params that has the stage's name.
    """
    run = getattr(importlib.import_module("pipeline.stages.paper"), name) if name in PAPER else stage(name).run
    section = getattr(params, "register_" if name == "register" else name, None)
    shown = flatten(section, f"{name}.") if section is not None else {}
    if name not in _WITHOUT_MODEL:
        from pipeline import device

        shown["compute"] = str(device.choose(params.device, params.dtype))
    with tracking.stage(name, {"seed": params.seed, **shown}) as own:
        run(params, own)


def stage(name: str) -> Any:
    """Return the module of a stage."""
    return importlib.import_module(f"pipeline.stages.{name}")


def made(name: str) -> Any:
    """Return what the stage of that name wrote into its file of reports.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    return storage.read_json(REPORTS / f"{name}.json", name)


def keep_figures(run: Run, name: str, figures: Mapping[str, float]) -> None:
    """Keep a stage's figures as its DVC metrics and its MLflow metrics."""
    run.metrics(figures)
    storage.write_text(REPORTS / f"{name}.json", json.dumps(dict(figures), indent=1))
