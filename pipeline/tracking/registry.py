"""The model registry: a checkpoint as a model defined by code, under a name and an alias."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlflow

from pipeline.tracking.runs import Run
from pipeline.tracking.store import Missing, client, talking


@dataclass(frozen=True)
class Registration:
    """What is registered, and as what.

    Attributes:
        name: Of the registered model.
        alias: That names its best version.
        model_code: The file that defines the model, see ``served.py``.
        checkpoint: The built checkpoint.
        code: Folders that the model's code imports.
        requirements: Pinned packages to serve it.
        tags: Of the version.
        example: Input as users give it.
        max_new_tokens: Default of a prediction.
    """

    name: str
    alias: str
    model_code: Path
    checkpoint: Path
    code: list[str]
    requirements: list[str]
    tags: Mapping[str, str] = field(default_factory=dict)
    example: list[str] = field(default_factory=list)
    max_new_tokens: int = 64


@talking()
def register_model(run: Run, asked: Registration) -> str:
    """Log a checkpoint as a pyfunc model defined by code, register it and move the alias to it.

    Returns:
        The model's URI, ``models:/<name>/<version>``.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    client()
    text = Schema([ColSpec("string")])
    limit = ParamSchema([ParamSpec("max_new_tokens", "long", asked.max_new_tokens)])
    # The one use of the fluent API: log_model has no client counterpart. The run exists already.
    with mlflow.start_run(run_id=run.run_id), warnings.catch_warnings():
        # The signature is given; for an example MLflow would load the model and run it.
        warnings.filterwarnings("ignore", "(?s).*input example", UserWarning)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(asked.model_code),
            artifacts={"checkpoint": str(asked.checkpoint)},
            code_paths=asked.code,
            pip_requirements=asked.requirements,
            registered_model_name=asked.name,
            signature=ModelSignature(text, text, limit),
            metadata={"example": asked.example},
        )
    version = info.registered_model_version
    for key, value in asked.tags.items():
        client().set_model_version_tag(asked.name, version, key, value)
    client().set_registered_model_alias(asked.name, asked.alias, version)
    return f"models:/{asked.name}/{version}"


@talking()
def _version(name: str, alias: str) -> object:
    return client().get_model_version_by_alias(name, alias)


def registered(name: str, alias: str) -> bool:
    """Return whether the registry has a model of this name under this alias."""
    try:
        return bool(_version(name, alias))
    except Missing:
        return False
