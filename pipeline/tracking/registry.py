"""The model registry: a checkpoint as a model defined by code, its figures, and whether it takes over the alias."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import mlflow
from mlflow.entities import Metric
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

from pipeline.tracking.runs import Run
from pipeline.tracking.store import Missing, asking, client, in_words, talking

Promote = Literal["better", "always", "never"]
_OBJECTIVE, _SCORE, _ITEMS = "objective", "score", "items_digest"  # tags of a version: its standing


@dataclass(frozen=True)
class Standing:
    """How good a model is, and what that was measured on.

    Attributes:
        objective: What the score is; higher is better.
        score: The score.
        items: Digest of the items that it was measured on. Scores on other items do not compare.
    """

    objective: str
    score: float
    items: str

    def tags(self) -> dict[str, str]:
        """Return the tags that keep it on a version."""
        return {_OBJECTIVE: self.objective, _SCORE: repr(self.score), _ITEMS: self.items}

    @staticmethod
    def from_tags(tags: Mapping[str, str]) -> Standing | None:
        """Return the standing that a version's tags keep; None for a version of before they did."""
        if not {_OBJECTIVE, _SCORE, _ITEMS} <= set(tags):
            return None
        return Standing(tags[_OBJECTIVE], float(tags[_SCORE]), tags[_ITEMS])


@dataclass(frozen=True)
class Registration:
    """What is registered, and as what.

    Attributes:
        name: Of the registered model.
        alias: That names the version to serve.
        promote: When a new version takes over the alias.
        standing: How good the model is.
        description: What the model is, in Markdown.
        metrics: Its figures.
        tags: Its lineage and what tells versions apart.
    """

    name: str
    alias: str
    promote: Promote
    standing: Standing
    description: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Packed:
    """A model as MLflow logs it.

    Attributes:
        model_code: The file that defines the model.
        checkpoint: The built checkpoint.
        others: Name -> folder that lies beside the checkpoint, which serving does not read.
        code: Folders that the model's code imports.
        requirements: Pinned packages to serve it.
        params: Of a prediction, with their defaults.
        example: Input as users give it.
    """

    model_code: Path
    checkpoint: Path
    code: Sequence[Path]
    requirements: Sequence[str]
    params: Mapping[str, object]
    example: Sequence[str]
    others: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Registered:
    """What became of a registration.

    Attributes:
        uri: ``models:/<name>/<version>``.
        promoted: Whether the alias names this version now.
        reason: Why, or why not.
    """

    uri: str
    promoted: bool
    reason: str


def register_model(run: Run, asked: Registration, packed: Packed) -> Registered:
    """Log a checkpoint as a pyfunc model, register it, and move the alias to it if it deserves that."""
    with in_words():  # an interrupt may end this one: copying a large model takes minutes
        client()
        with _patient_uploads():
            info = _log_model(run, asked.name, packed)
    return _described(asked, run, info)


@contextmanager
def _patient_uploads() -> Iterator[None]:
    """Let a server take its time with a file: it answers when its object store has all of it, minutes for gigabytes."""
    request, upload = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"
    before = os.environ.get(request)
    os.environ[request] = os.environ[upload]
    try:
        yield
    finally:
        del os.environ[request]
        if before is not None:
            os.environ[request] = before


@asking
def _described(asked: Registration, run: Run, info: ModelInfo) -> Registered:
    """Give a version its figures, description and tags, and the alias if it deserves it."""
    version = str(info.registered_model_version)
    now = int(time.time() * 1000)
    figures = [Metric(key, value, now, 0, model_id=info.model_id) for key, value in asked.metrics.items()]
    client().log_batch(run.run_id, metrics=figures)
    client().update_model_version(asked.name, version, asked.description)
    for key, value in (dict(asked.tags) | asked.standing.tags()).items():
        client().set_model_version_tag(asked.name, version, key, value)
    promoted, reason = deserves_alias(asked.promote, asked.standing, _standing(asked.name, asked.alias))
    if promoted:
        client().set_registered_model_alias(asked.name, asked.alias, version)
    return Registered(f"models:/{asked.name}/{version}", promoted, reason)


def deserves_alias(promote: Promote, new: Standing, current: Standing | None | Literal["nobody"]) -> tuple[bool, str]:
    """Return whether a new version takes over the alias, and why.

    Args:
        promote: ``register.promote``.
        new: How good the new version is.
        current: How good the version is that has the alias: None where it does not say, ``nobody`` without one.
    """
    if promote == "never":
        return False, "register.promote is never"
    if current == "nobody":
        return True, "no version had it"
    if promote == "always":
        return True, "register.promote is always"
    if current is None or (current.objective, current.items) != (new.objective, new.items):
        return False, "the version that has it was judged on other items, so that they do not compare"
    compared = f"{new.objective} {new.score:.4f} against {current.score:.4f} on the same items"
    return new.score > current.score, compared


def _standing(name: str, alias: str) -> Standing | None | Literal["nobody"]:
    try:
        with talking():
            return Standing.from_tags(client().get_model_version_by_alias(name, alias).tags)
    except Missing:
        return "nobody"


def _log_model(run: Run, name: str, packed: Packed) -> ModelInfo:
    folders = {"checkpoint": packed.checkpoint, **packed.others}
    # The one use of the fluent API: log_model has no client counterpart. The run exists already.
    with (
        scratch_beside(packed.checkpoint) as scratch,
        mlflow.start_run(run_id=run.run_id),
        warnings.catch_warnings(),
    ):
        # The signature is given; for an example MLflow would load the model and run it.
        warnings.filterwarnings("ignore", "(?s).*input example", UserWarning)
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(packed.model_code),
            artifacts={name: str(real_files(folder, scratch)) for name, folder in folders.items()},
            code_paths=[str(folder) for folder in packed.code],
            pip_requirements=list(packed.requirements),
            registered_model_name=name,
            signature=_signature(packed.params),
            metadata={"example": list(packed.example)},
        )


def _signature(params: Mapping[str, object]) -> ModelSignature:
    """Return the params of a prediction and its output. The inputs have several forms, which the model checks."""
    kinds = {int: "long", float: "double", list: "string"}
    specs = [
        ParamSpec(key, kinds[type(value)], value, shape=(-1,) if isinstance(value, list) else None)
        for key, value in params.items()
    ]
    return ModelSignature(outputs=Schema([ColSpec("string")]), params=ParamSchema(specs))


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """Let temporary files lie beside a folder: MLflow copies the whole model through them, and /tmp may be small.

    What a killed process left of them is removed.
    """
    prefix = f".{folder.name}-register-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        tempfile.tempdir = scratch
        try:
            yield Path(scratch)
        finally:
            tempfile.tempdir = before


def real_files(folder: Path, scratch: Path) -> Path:
    """Return a folder, or hard links to its files where it holds symbolic ones: MLflow refuses what leads outside.

    Args:
        folder: As DVC checked it out, perhaps as links into its cache.
        scratch: Where the links are made.
    """
    if not any(path.is_symlink() for path in (folder, *folder.rglob("*"))):
        return folder
    return Path(shutil.copytree(folder, scratch / folder.name, copy_function=_link_or_copy))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


@asking
def _version(uri: str) -> object:
    name, version = uri.removeprefix("models:/").split("/")
    return client().get_model_version(name, version)


def registered(uri: str) -> bool:
    """Return whether the registry has a version, such as ``models:/qpruner/3``."""
    try:
        return bool(_version(uri))
    except Missing:
        return False
