"""The only room that imports mlflow: the store, the runs of stages and trials, the registry, the UI's pages.

``credentials`` keeps passwords out of texts, ``store`` knows the address and says failures in words, ``outbox`` keeps
writes for a store that is away, ``runs`` writes, ``queries`` reads, ``processes`` tells the dead from the living,
``registry`` and ``ui`` are what their names say. Others use the names below.
"""

# ruff: noqa: E402
import os

from pipeline.tracking import credentials

# MLflow reads these when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# A server that is away is noticed in seconds; by default MLflow tries for minutes, call after call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "600")
# A line for each run of a search, with the server's address: our own notes say where its pages are.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
credentials.separate(os.environ)

from pipeline.signals import Interrupted, ending, on_termination_interrupt
from pipeline.tracking.lineage import git_commit, md5
from pipeline.tracking.queries import ItemsLost, items, move, reopen, run, set_metric, set_tag, tagged, trials
from pipeline.tracking.registry import Packed, Registered, Registration, Standing, register_model, registered
from pipeline.tracking.runs import (
    ITEMS,
    JOURNAL_ID,
    Run,
    adopt_project_run,
    create,
    kill_project_run,
    patient,
    reap,
    stage,
)
from pipeline.tracking.store import (
    EXPERIMENT,
    PARENT,
    Missing,
    StoreError,
    Unreachable,
    address,
    client,
    experiment_id,
    experiments,
    parent_run,
    root,
)
from pipeline.tracking.tracked import Tracked
from pipeline.tracking.ui import serve_command, serve_ui, show_search, ui_command

__all__ = [
    "EXPERIMENT",
    "ITEMS",
    "JOURNAL_ID",
    "PARENT",
    "Interrupted",
    "ItemsLost",
    "Missing",
    "Packed",
    "Registered",
    "Registration",
    "Run",
    "Standing",
    "StoreError",
    "Tracked",
    "Unreachable",
    "address",
    "adopt_project_run",
    "client",
    "create",
    "ending",
    "experiment_id",
    "experiments",
    "git_commit",
    "items",
    "kill_project_run",
    "md5",
    "move",
    "on_termination_interrupt",
    "parent_run",
    "patient",
    "reap",
    "register_model",
    "registered",
    "reopen",
    "root",
    "run",
    "set_metric",
    "serve_command",
    "serve_ui",
    "set_tag",
    "show_search",
    "stage",
    "tagged",
    "trials",
    "ui_command",
]
