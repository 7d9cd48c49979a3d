"""Stage ``register``: the built checkpoint into the model registry, with an alias and its evidence.

Reads ``artifacts/final`` and ``reports/evaluate.json``. Writes ``reports/register.json``.
"""

from __future__ import annotations

import json

from pipeline import console, storage, tracking
from pipeline.params import Params
from pipeline.paths import FINAL, REPORTS
from pipeline.stages.shell import made
from pipeline.tracking import Run

_NEEDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")  # to serve the model


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    storage.verify(FINAL, "build")
    figures = made("evaluate")
    lineage = storage.read_json(FINAL / "lineage.json", "build")
    run.metrics(figures)
    root = tracking.root()
    pinned = [line for line in (root / "requirements.txt").read_text().splitlines() if line.split("==")[0] in _NEEDED]
    asked = tracking.Registration(
        name=params.register_.name,
        alias=params.register_.alias,
        model_code=root / "pipeline" / "stages" / "served.py",
        checkpoint=FINAL.absolute(),
        code=[str(root / "pipeline")],
        requirements=pinned,
        tags=lineage | {key: f"{value:.4f}" for key, value in figures.items()},
        example=["What is the capital of France?"],
    )
    uri = tracking.register_model(run, asked)
    run.tags({"model": uri})
    storage.write_text(REPORTS / "register.json", json.dumps({"model": uri, "alias": params.register_.alias}, indent=1))
    console.note(f"registered {uri} as models:/{params.register_.name}@{params.register_.alias}")
