"""The tracking store: its address, its client, its experiments, and its failures in words.

Everything goes through ``MlflowClient`` with explicit run ids. MLflow's fluent ``start_run`` would, inside
``mlflow run``, silently become the project's own run.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from pipeline import signals
from pipeline.errors import UserError

EXPERIMENT = "qpruner"
PARENT = "QPRUNER_PARENT_RUN"  # the run of `mlflow run`, handed from the entry point to the stages it starts
_ARTIFACTS = (
    "mlartifacts",
    "mlruns",
)  # where an experiment's files are below the project's root: ours, and MLflow's way
_SQLITE = "sqlite:///"
_HEADER = b"SQLite format 3\0"
_OUTAGE = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
_UNUSABLE = {errno.ENOSPC: "is full", errno.EROFS: "cannot be written", errno.EACCES: "cannot be written"}


class StoreError(UserError):
    """The tracking store refuses, is damaged or does not answer; what to do."""


class Unreachable(StoreError):
    """The tracking store does not answer now. What it did not get can be written later."""


class Missing(StoreError):
    """The tracking store has no such run, model or version."""


def root() -> Path:
    """Return the project's root: DVC's when it runs the stage, else the nearest folder with an ``MLproject``."""
    if "DVC_ROOT" in os.environ:
        return Path(os.environ["DVC_ROOT"])
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "MLproject").exists():
            return folder
    return Path.cwd()


def address() -> str:
    """Return the tracking URI: ``MLFLOW_TRACKING_URI`` or ``mlflow.db`` at the root, wherever the command was given."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{root() / 'mlflow.db'}"


def shown_address() -> str:
    """Return the tracking URI without user and password."""
    return _without_password(address())


def is_server() -> bool:
    """Return whether the store is an MLflow server, not a database that this process opens."""
    return address().startswith("http")


def client() -> MlflowClient:
    """Return a client of the store.

    Raises:
        StoreError: Its file is no database. MLflow would try again for minutes.
    """
    if address().startswith(_SQLITE):
        file = Path(address().removeprefix(_SQLITE).partition("?")[0])
        if file.is_file() and file.stat().st_size and _start(file) != _HEADER:
            raise StoreError(_damaged(f"{file} is no SQLite database"))
    mlflow.set_tracking_uri(address())
    return MlflowClient(address())


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(_HEADER))


@contextmanager
def in_words() -> Iterator[None]:
    """Turn a failure of the store into a ``StoreError`` that says what to do."""
    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise _in_words(error) from error
    except OSError as error:
        if error.errno in _UNUSABLE:
            place = f"{error.filename or 'the disk'} {_UNUSABLE[error.errno]}"
            raise StoreError(f"tracking: {place}; make room or set MLFLOW_TRACKING_URI to another store") from error
        raise


@contextmanager
def talking() -> Iterator[None]:
    """Talk to the store: no interrupt in between, failures in words."""
    with signals.held(), in_words():
        yield


def _in_words(error: Exception) -> StoreError:
    """Return what a failure of the store means to a user."""
    text = _without_password(str(error))
    first = text.strip().partition("\n")[0]
    code = error.error_code if isinstance(error, MlflowException) else "INTERNAL_ERROR"
    if code == "RESOURCE_DOES_NOT_EXIST" or re.search(r"alias \S+ not found", text):
        return Missing(f"the tracking store {shown_address()}: {first}")
    if deleted := re.search(r"The (experiment|run) (\w+) must be in the 'active' state", text):
        return StoreError(_deleted(*deleted.groups()))
    if "not a database" in text or "malformed" in text:
        return StoreError(_damaged(f"the tracking store {shown_address()} is damaged ({first})"))
    if "disk is full" in text:
        return StoreError(f"the disk of the tracking store {shown_address()} is full; make room and run it again")
    if code in _OUTAGE:
        return Unreachable(f"the tracking store {shown_address()} does not answer ({first})")
    return StoreError(f"the tracking store {shown_address()} refuses: {text}")


def _deleted(kind: str, identity: str) -> str:
    return (
        f"{kind} {identity} was deleted in the tracking store; restore it with: MLFLOW_TRACKING_URI='{shown_address()}'"
        f" mlflow {kind}s restore --{kind}-id {identity}"
    )


def _damaged(what: str) -> str:
    return (
        f"{what}; move it away and run the same command: a new store is made, and a search writes the runs of its "
        "finished trials again"
    )


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)


def parent_run() -> str | None:
    """Return the id of the ``mlflow run`` that this process belongs to, if any."""
    return os.environ.get(PARENT)


@talking()
def experiment_id() -> str:
    """Return the experiment of the project's run, or our own, made with an artifact folder that clients can write.

    Raises:
        StoreError: The experiment was deleted, or the project's folder was moved.
    """
    if parent := parent_run():
        theirs = client().get_run(parent).info.experiment_id
        location = client().get_experiment(theirs).artifact_location
        refuse_moved(location)
        if not _needs_server(location):
            return theirs
    if known := client().get_experiment_by_name(EXPERIMENT):
        if known.lifecycle_stage == "deleted":
            raise StoreError(_deleted("experiment", known.experiment_id))
        refuse_moved(known.artifact_location)
        return known.experiment_id
    local = address().startswith("sqlite")
    try:
        return client().create_experiment(EXPERIMENT, str(root() / "mlartifacts") if local else None)
    except MlflowException:  # another process made it in between
        if known := client().get_experiment_by_name(EXPERIMENT):
            return known.experiment_id
        raise


def _needs_server(location: str) -> bool:
    """Return whether artifacts go through a server, while we talk to the database directly."""
    return location.startswith("mlflow-artifacts:") and not is_server()


def refuse_moved(place: str) -> None:
    """Refuse artifacts that the store has under the path that this project had before it was moved.

    Args:
        place: Where the store has an experiment's or a run's artifacts.

    Raises:
        StoreError: They lie below the project's root, and the store does not know.
    """
    where = urlsplit(place)
    path = Path(where.path)
    if where.scheme not in ("", "file") or path.exists() or path.is_relative_to(root()):
        return
    for folder in path.parents:
        inside = path.relative_to(folder)
        if inside.parts[0] in _ARTIFACTS and (root() / inside).exists():
            raise StoreError(
                f"this project was in {folder} before, and its MLflow store has the artifacts under that path. Move it "
                f"back, or let the old path lead here: ln -s {root()} {folder}"
            )


@talking()
def experiments() -> list[str]:
    """Return the ids of all experiments: runs are found by their tags, wherever `mlflow run` put them."""
    return [experiment.experiment_id for experiment in client().search_experiments()]


def server_address() -> str:
    """Return a server's address without user and password, and without a slash at its end."""
    parts = urlsplit(address())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def quiet() -> None:
    """Let failures be told once, by us: MLflow logs the traceback of each."""
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
