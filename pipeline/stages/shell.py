"""What all stages share: a tracked run around each, figures that DVC and MLflow both keep, and how one is started."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pipeline import console, storage, tracking
from pipeline.params import Params, flatten
from pipeline.paths import ALPACA, FINAL, REPORTS
from pipeline.stages import STAGES
from pipeline.tracking import Run

# Where files and folders are written; what a killed stage left half-written there goes when the next one starts.
_WRITTEN = (
    *(FINAL.parent / inside for inside in ("", "pruned", "bank", "table", "table/cells", "unfinished")),
    ALPACA.parent,
    REPORTS,
)
# What others read of a stage's file of reports: key -> type, of the mapping or of each mapping of the list.
_NEEDS: dict[str, dict[str, type]] = {
    "prune": {"parameters_before": float},
    "importance": {
        "ratio": float,
        "units": list,
        "mutual_information": list,
        "sensitivity": list,
        "dense_gains": list,
        "divergence": float,
        "distance": float,
        "tokens": int,
    },
    "search": {"study": str, "journal": str, "search_run": str, "finished": int},
    "pareto": {"front": bool, "name": str, "ratio": float, "bits": str, "run_id": str, "score": float},
    "build": {"accuracy": float, "accuracy_stderr": float, "gold_logprob": float},
    "evaluate": {"accuracy": float, "accuracy_stderr": float, "gold_logprob": float, "items": int},
    "export": {"parameters": float, "multiply_adds": float, "cache_bytes": float},
    "register": {"model": str},  # its alias is null where another version keeps it
}
_WITHOUT_MODEL = ("fetch", "pareto", "register", "report")  # they need no torch, which takes seconds to import


def start(name: str, params: Params) -> None:
    """Run a stage, or one of the paper's commands, as a tracked MLflow run under its name.

    The run shows the seed and the section of the params that has the stage's name.
    """
    storage.clear(*_WRITTEN)
    section = getattr(params, "register_" if name == "register" else name, None)
    shown = flatten(section, f"{name}.") if section is not None else {}
    if name in STAGES:
        console.note(f"stage {STAGES.index(name) + 1} of {len(STAGES)}: {name}")
    if name not in _WITHOUT_MODEL:
        from pipeline import device

        shown["compute"] = str(device.choose(params.device, params.dtype))
    with tracking.stage(name, {"seed": params.seed, **shown}) as run:
        stage(name).run(params, run)


def stage(name: str) -> ModuleType:
    """Return the module of a stage."""
    return importlib.import_module(f"pipeline.stages.{name}")


def made(name: str) -> Any:
    """Return what the stage of that name wrote into its file of reports.

    Raises:
        CheckpointError: The file is missing or damaged, or lacks what is read of it.
    """
    return storage.read_json(REPORTS / f"{name}.json", name, _NEEDS[name])


def keep_figures(run: Run, name: str, figures: Mapping[str, float]) -> None:
    """Keep a stage's figures as its DVC metrics and its MLflow metrics."""
    run.metrics(figures)
    storage.write_text(REPORTS / f"{name}.json", json.dumps(dict(figures), indent=1))
