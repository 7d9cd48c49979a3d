"""The tracking store: its address, its client, its experiments, and its failures in words.

Everything goes through ``MlflowClient`` with explicit run ids. MLflow's fluent ``start_run`` would, inside
``mlflow run``, silently become the project's own run.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from pipeline import console, signals
from pipeline.errors import UserError
from pipeline.tracking.credentials import hidden

P = ParamSpec("P")
T = TypeVar("T")

EXPERIMENT = "qpruner"
PATIENCE = "QPRUNER_STORE_PATIENCE"  # seconds that a command waits for a store whose answer it needs
PARENT = "QPRUNER_PARENT_RUN"  # the run of `mlflow run`, handed from the entry point to the stages it starts
_ARTIFACTS = (
    "mlartifacts",
    "mlruns",
)  # where an experiment's files are below the project's root: ours, and MLflow's way
_SQLITE = "sqlite:///"
_PATIENCE = "60"
_PAUSE = 2.0  # seconds between two attempts while a command waits
_HEADER = b"SQLite format 3\0"
_OUTAGE = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
_OUTAGE_STATUS = (408, 429)  # of HTTP, as are all from 500 on
_REMOTE = ("requests", "boto3", "botocore", "s3transfer")  # what carries files; some of it is installed by teams alone
# What stands in an outage's text, as a person says it.
_CAUSES = {
    r"too many 5\d\d error|error code 5\d\d|5\d\d Server Error": "the server is there, but its database or its object "
    "store may not be",
    r"[Cc]onnection refused": "connection refused",
    r"Connection (aborted|reset)": "it cut the connection",
    r"[Tt]imed out": "it takes too long",
}
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
    return hidden(address())


def is_server() -> bool:
    """Return whether the store is an MLflow server, not a database that this process opens."""
    return address().startswith("http")


def client() -> MlflowClient:
    """Return a client of the store.

    Raises:
        StoreError: Its file is no database, for which MLflow would try again for minutes; or it is a database of
            many machines, to which artifacts do not belong: each machine would keep its own.
    """
    kind = address().partition(":")[0].partition("+")[0]
    if kind in DATABASE_ENGINES and kind != "sqlite":
        raise StoreError(
            f"MLFLOW_TRACKING_URI names a {kind} database, which cannot hold the artifacts of runs; start an MLflow "
            "server over it and set MLFLOW_TRACKING_URI to the server's address (docs/cluster.md)"
        )
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
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, MlflowException | SQLAlchemyError) or library in _REMOTE:
            raise _in_words(error) from error
        if isinstance(error, OSError) and error.errno in _UNUSABLE:
            place = f"{error.filename or 'the disk'} {_UNUSABLE[error.errno]}"
            raise StoreError(f"tracking: {place}; make room or set MLFLOW_TRACKING_URI to another store") from error
        raise


@contextmanager
def talking() -> Iterator[None]:
    """Talk to the store: no interrupt in between, failures in words."""
    with signals.held(), in_words():
        yield


def patience() -> float:
    """Return for how many seconds a command waits for a store that is away."""
    return float(os.environ.get(PATIENCE, _PATIENCE))


def asking(ask: Callable[P, T]) -> Callable[P, T]:
    """Let a function that needs the store's answer wait, as long as ``patience`` says, for a store that is away.

    Raises:
        Unreachable: When called, if the store stays away.
        StoreError: When called, if the store refuses.
    """

    @wraps(ask)
    def asked(*arguments: P.args, **named: P.kwargs) -> T:
        limit = None
        while True:
            try:
                with talking():
                    answer = ask(*arguments, **named)
            except Unreachable as error:
                if limit is None:
                    limit = time.monotonic() + patience()
                    if patience():
                        console.note(f"{error}; waiting for it, {patience():.0f} s at most (Ctrl-C to give up)")
                if time.monotonic() >= limit:
                    raise
                time.sleep(_PAUSE)
            else:
                if limit is not None:
                    console.note("the tracking store answers again")
                return answer

    return asked


def _in_words(error: Exception) -> StoreError:
    """Return what a failure of the store means to a user."""
    text = hidden(str(error))
    first = text.strip().partition("\n")[0]
    code = _code(error)
    if code == "RESOURCE_DOES_NOT_EXIST" or re.search(r"alias \S+ not found", text):
        return Missing(f"the tracking store {shown_address()}: {first}")
    if deleted := re.search(r"The (experiment|run) (\w+) must be in the 'active' state", text):
        return StoreError(_deleted(*deleted.groups()))
    if "not a database" in text or "malformed" in text:
        return StoreError(_damaged(f"the tracking store {shown_address()} is damaged ({first})"))
    if "disk is full" in text:
        return StoreError(f"the disk of the tracking store {shown_address()} is full; make room and run it again")
    if code in _OUTAGE:
        return Unreachable(f"the tracking store {shown_address()} does not answer ({_cause(error)})")
    return StoreError(f"the tracking store {shown_address()} refuses: {text}")


def _code(error: Exception) -> str:
    """Return MLflow's code of a failure; files fail by the status of HTTP alone."""
    if "404 Client Error" in str(error):  # MLflow's code is that of an outage when a server has no such file
        return "RESOURCE_DOES_NOT_EXIST"
    if isinstance(error, MlflowException):
        return error.error_code
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return "INTERNAL_ERROR" if status >= 500 or status in _OUTAGE_STATUS else "BAD_REQUEST"


def _cause(error: Exception) -> str:
    """Return why a store does not answer, in a few words."""
    text = hidden(str(error)).strip()
    known = (words for pattern, words in _CAUSES.items() if re.search(pattern, text))
    return next(known, text.partition("\n")[0])


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


def parent_run() -> str | None:
    """Return the id of the ``mlflow run`` that this process belongs to, if any."""
    return os.environ.get(PARENT)


@asking
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


@asking
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
