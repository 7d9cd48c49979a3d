"""The params as frozen, typed sections. What a key alone may hold is judged here; ``checks`` judges the rest.

Each section is named after the stage (module, DVC stage, MLproject entry point) that reads it. Sections that several
stages share (``model``, ``data``, ``recover``, ``tasks``) are named after the module.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, Field

from pipeline.params.fields import MOST, TASKS, Granularity, Objective, ParamsError, Section
from pipeline.params.recipe import BlockRange, Data, Evaluate, Importance, Model, Prune, Quantize, Recover
from pipeline.params.study import Ablation, Build, Export, Pareto, Register, Search, Table, read_history

__all__ = [
    "Ablation",
    "BlockRange",
    "Build",
    "Data",
    "digest",
    "Evaluate",
    "Export",
    "flatten",
    "Granularity",
    "Importance",
    "Model",
    "MOST",
    "Objective",
    "Params",
    "ParamsError",
    "Pareto",
    "Prune",
    "Quantize",
    "read_history",
    "Recover",
    "Register",
    "Search",
    "Section",
    "Table",
    "TASKS",
]


class Params(Section):
    """The whole of ``params.yaml``."""

    seed: int = Field(ge=0, lt=2**32, description="All random draws follow from it.")
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: a GPU if there is one.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="What models compute in; auto: bfloat16 where the device multiplies it in hardware."
    )
    model: Model
    data: Data
    prune: Prune
    importance: Importance
    quantize: Quantize
    recover: Recover
    evaluate: Evaluate
    search: Search
    pareto: Pareto
    build: Build
    export: Export
    register_: Register = Field(alias="register")
    table: Table
    ablation: Ablation


def flatten(section: BaseModel, prefix: str = "") -> dict[str, object]:
    """Return a section as dotted keys, for a tracker that knows no nesting."""
    flat: dict[str, object] = {}
    for name, value in section:
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def digest(*parts: object) -> str:
    """Return twelve hex digits that name ``parts`` (sections, strings, numbers, lists, mappings)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
