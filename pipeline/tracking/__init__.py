"""The only module that imports mlflow: the store, runs of stages and trials, reaping, lineage, the registry.

Everything goes through ``MlflowClient`` with explicit run ids. MLflow's fluent ``start_run`` would, inside
``mlflow run``, silently become the project's own run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import sqlalchemy

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow  # noqa: E402
from mlflow.artifacts import load_text  # noqa: E402
from mlflow.data.dataset_source_registry import resolve_dataset_source  # noqa: E402
from mlflow.data.meta_dataset import MetaDataset  # noqa: E402
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.db.db_types import DATABASE_ENGINES  # noqa: E402
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlParam, SqlRun, SqlTag  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from pipeline.errors import UserError  # noqa: E402

EXPERIMENT = "qpruner"
PARENT = "QPRUNER_PARENT_RUN"  # the run of `mlflow run`, handed from the entry point to the stages it starts
_PARENT_TAG = "mlflow.parentRunId"
ITEMS = "items.json"  # in a trial's run: what it measured item by item
_PAGE = 1000
_ending = False  # whether an interrupt was heard and the runs are being ended
_AGAIN = 5.0  # seconds after which an interrupt that was not heeded is raised again


StoreError = MlflowException  # what a store raises that cannot be reached, or refuses


class ItemsLost(UserError):
    """A trial's run lacks what it measured item by item; what to do."""


@dataclass(frozen=True)
class Tracked:
    """A run as the store has it, without MLflow's own types.

    Attributes:
        run_id: Its id.
        experiment_id: Its experiment's.
        name: Its name.
        status: ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``.
        artifact_uri: Where its artifacts are.
        params: Its params.
        metrics: The latest value of each metric.
        tags: Its tags.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    artifact_uri: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def _tracked(run: Any) -> Tracked:
    info, data = run.info, run.data
    return Tracked(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        name=info.run_name,
        status=info.status,
        artifact_uri=info.artifact_uri,
        params=dict(data.params),
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop."""


def root() -> Path:
    """Return the project's root: DVC's when it runs the stage, else the nearest folder with an ``MLproject``."""
    if "DVC_ROOT" in os.environ:
        return Path(os.environ["DVC_ROOT"])
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "MLproject").exists():
            return folder
    return Path.cwd()


def store() -> str:
    """Return the tracking URI: ``MLFLOW_TRACKING_URI`` or ``mlflow.db`` at the root, wherever the command was given."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def client() -> MlflowClient:
    """Return a client of the store."""
    mlflow.set_tracking_uri(store())
    return MlflowClient(store())


def parent_run() -> str | None:
    """Return the id of the ``mlflow run`` that this process belongs to, if any."""
    return os.environ.get(PARENT)


def adopt_project_run() -> str | None:
    """Take ``MLFLOW_RUN_ID`` out of the environment and keep it as the parent of the stages to come."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id:
        os.environ[PARENT] = run_id
        Run(run_id, "").tags(_process_tags() | {"stage": "project"})
    return run_id


def kill_project_run() -> None:
    """Mark the project's run KILLED, now and once more when ``mlflow run`` has ended.

    An interrupted ``mlflow run`` overwrites any status with FAILED as its last act, so a process that outlives it has
    the last word. It also ends the runs of stages that had to be killed.
    """
    if run_id := parent_run():
        client().set_terminated(run_id, "KILLED")
        subprocess.Popen(
            [sys.executable, "-c", _LAST_WORD, run_id, str(os.getppid())],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


_LAST_WORD = """
import sys
import psutil
from pipeline.errors import UserError
from pipeline import tracking
if psutil.pid_exists(int(sys.argv[2])):
    psutil.wait_procs([psutil.Process(int(sys.argv[2]))], timeout=60)
tracking.client().set_terminated(sys.argv[1], "KILLED")
tracking.reap()
"""


def experiment_id() -> str:
    """Return the experiment of the project's run, or our own, made with an artifact folder that clients can write."""
    if parent := parent_run():
        own = client().get_run(parent).info.experiment_id
        if not _needs_server(client().get_experiment(own).artifact_location):
            return own
    if found := client().get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    local = store().startswith("sqlite")
    try:
        return client().create_experiment(EXPERIMENT, str(root() / "mlartifacts") if local else None)
    except MlflowException:  # another process made it in between
        return client().get_experiment_by_name(EXPERIMENT).experiment_id


def _needs_server(location: str) -> bool:
    """Whether artifacts go through a server, while we talk to the database directly."""
    return location.startswith("mlflow-artifacts:") and not store().startswith("http")


def experiments() -> list[str]:
    """Return the ids of all experiments: runs are found by their tags, wherever `mlflow run` put them."""
    return [found.experiment_id for found in client().search_experiments()]


@dataclass
class Run:
    """One MLflow run: thin, explicit, in batches (a call apiece costs seven times as much)."""

    run_id: str
    experiment_id: str
    children: list[Run] = field(default_factory=list)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log params; lists as JSON."""
        shown = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in values.items()}
        client().log_batch(self.run_id, params=[Param(key, value[:6000]) for key, value in shown.items()])

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log the metrics that have a value."""
        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in values.items() if value is not None]
        client().log_batch(self.run_id, metrics=batch)

    def series(self, key: str, values: Iterable[tuple[int, float]]) -> None:
        """Log a metric's (step, value) pairs, in one call for each thousand of them."""
        now = int(time.time() * 1000)
        points = [Metric(key, float(value), now, step) for step, value in values]
        for start in range(0, len(points), _PAGE):
            client().log_batch(self.run_id, metrics=points[start : start + _PAGE])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        client().log_batch(self.run_id, tags=[RunTag(key, str(value)[:5000]) for key, value in values.items()])

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file."""
        client().log_artifact(self.run_id, str(path), folder)

    def json(self, values: Any, name: str) -> None:
        """Log plain values as a JSON file."""
        client().log_text(self.run_id, json.dumps(values), name)

    def dataset(self, path: str | Path, name: str, context: str) -> str:
        """Log a file as the run's input, with its MD5 as digest; return the digest."""
        digest = md5(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mlflow names two equal readings of a local path
            source = resolve_dataset_source(str(path))
        entity = MetaDataset(source, name=name, digest=digest[:36])._to_mlflow_entity()
        inputs = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
        client().log_inputs(self.run_id, [inputs])
        return digest

    def child(self, name: str, tags: Mapping[str, str]) -> Run:
        """Start a run below this one."""
        run = _create(name, self.experiment_id, self.run_id, tags)
        self.children.append(run)
        return run

    def finish(self, status: str = "FINISHED", error: BaseException | None = None) -> None:
        """End the run; ``error`` becomes its tag ``error`` and its traceback an artifact."""
        if error is not None:
            self.tags({"error": f"{type(error).__name__}: {error}"})
            trace = "".join(traceback.format_exception(error))
            with suppress(OSError, MlflowException):  # the cause is in the tag; a full disk must not hide it
                client().log_text(self.run_id, trace, "traceback.txt")
        client().set_terminated(self.run_id, status)


def _create(name: str, experiment: str, parent: str | None, tags: Mapping[str, str]) -> Run:
    every = {"mlflow.runName": name, "mlflow.user": "", "mlflow.source.name": "pipeline", **_process_tags(), **tags}
    if parent:
        every[_PARENT_TAG] = parent
    if commit := git_commit():
        every["mlflow.source.git.commit"] = commit
    made = client().create_run(experiment, tags=every, run_name=name)
    return Run(made.info.run_id, experiment)


@contextmanager
def stage(name: str, params: Mapping[str, Any]) -> Iterator[Run]:
    """Track one stage: its own run, always ended, with system metrics and the cause of a failure."""
    reap()
    run = _create(name, experiment_id(), parent_run(), {"stage": name})
    run.params(params)
    monitor = _system_metrics(run.run_id)
    try:
        yield run
    except KeyboardInterrupt:
        ending()
        _finish_all(run, "KILLED")
        raise
    except BaseException as error:
        _finish_all(run, "FAILED", error)
        raise
    else:
        run.finish()
    finally:
        monitor.finish()


def _finish_all(run: Run, status: str, error: BaseException | None = None) -> None:
    for child in run.children:
        if client().get_run(child.run_id).info.status == "RUNNING":
            _finish_all(child, "KILLED")
    run.finish(status, error)


def _system_metrics(run_id: str) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(run_id, sampling_interval=5)
    monitor.start()
    return monitor


def _process_tags() -> dict[str, str]:
    process = psutil.Process()
    return {
        "qpruner.host": platform.node(),
        "qpruner.pid": str(process.pid),
        "qpruner.started": f"{process.create_time():.0f}",
    }


def reap() -> list[str]:
    """End as KILLED every run whose process on this host is dead; return their ids."""
    found = client().search_runs(
        experiments(), f"attributes.status = 'RUNNING' and tags.`qpruner.host` = '{platform.node()}'", max_results=_PAGE
    )
    dead = [run for run in found if not _alive(run.data.tags)]
    for run in dead:
        client().set_terminated(run.info.run_id, "KILLED")
    return [run.info.run_id for run in dead]


def _alive(tags: Mapping[str, str]) -> bool:
    try:
        process = psutil.Process(int(tags["qpruner.pid"]))
        return abs(process.create_time() - float(tags["qpruner.started"])) <= 1 and process.status() != "zombie"
    except (psutil.NoSuchProcess, KeyError):  # KeyError: killed while it wrote these tags
        return False


def ending() -> None:
    """Hear no further signal: Ctrl-C reaches every process, and those that wait for this one pass it on once more."""
    global _ending
    _ending = True


def on_termination_interrupt() -> None:
    """Turn SIGINT and SIGTERM into an interrupt, and ask for one when the parent dies, so that runs end as KILLED.

    An exception that arrives in a destructor is lost: it is raised again, every few seconds and with every further
    signal, until ``ending`` is called.
    """

    def stop(*_: Any) -> None:
        if not _ending:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            raise Interrupted

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


# --- trials ------------------------------------------------------------------------------------------------------


def trials(study: str) -> list[Tracked]:
    """Return all runs of a study's trials and references, newest last."""
    return tagged("study", study)


def tagged(key: str, value: str) -> list[Tracked]:
    """Return all runs with a tag, newest last."""
    if store().partition(":")[0].partition("+")[0] in DATABASE_ENGINES:
        return _read_tagged(key, value)
    return _search_tagged(key, value)


def _search_tagged(key: str, value: str) -> list[Tracked]:
    found: list[Tracked] = []
    token = None
    while True:
        page = client().search_runs(
            experiments(),
            f"tags.{key} = '{value}'",
            order_by=["attributes.start_time ASC"],
            max_results=_PAGE,
            page_token=token,
        )
        found += map(_tracked, page)
        token = page.token
        if not token:
            return found


def _read_tagged(key: str, value: str) -> list[Tracked]:
    """Read the same out of the database, a query a table.

    MLflow's search maps every tag, param and metric of every run to an object of its own: seconds for 1,000 runs.
    """
    within = [int(one) for one in experiments()]  # first: a store that is new gets its tables here
    chosen = sqlalchemy.select(SqlTag.run_uuid).where(SqlTag.key == key, SqlTag.value == value)
    runs = sqlalchemy.select(SqlRun.__table__).where(
        SqlRun.run_uuid.in_(chosen), SqlRun.experiment_id.in_(within), SqlRun.lifecycle_stage == "active"
    )
    engine = sqlalchemy.create_engine(store())
    try:
        with engine.connect() as connection:

            def values(table: Any, column: Any) -> dict[str, dict[str, Any]]:
                found: dict[str, dict[str, Any]] = {}
                wanted = sqlalchemy.select(table.run_uuid, table.key, column).where(table.run_uuid.in_(chosen))
                for run_id, key, value in connection.execute(wanted):
                    found.setdefault(run_id, {})[key] = value
                return found

            tags, params = values(SqlTag, SqlTag.value), values(SqlParam, SqlParam.value)
            latest = SqlLatestMetric
            metrics = values(latest, sqlalchemy.case((latest.is_nan, None), else_=latest.value))
            return [
                Tracked(
                    run_id=row.run_uuid,
                    experiment_id=str(row.experiment_id),
                    name=row.name,
                    status=row.status,
                    artifact_uri=row.artifact_uri,
                    params=params.get(row.run_uuid, {}),
                    metrics={
                        name: math.nan if value is None else value
                        for name, value in metrics.get(row.run_uuid, {}).items()
                    },
                    tags=tags.get(row.run_uuid, {}),
                )
                for row in connection.execute(runs.order_by(SqlRun.start_time, SqlRun.run_uuid))
            ]
    finally:
        engine.dispose()


def items(trial: Tracked) -> dict[str, Any]:
    """Return what a trial measured item by item.

    Args:
        trial: Its run, as ``trials`` returns it.

    Raises:
        ItemsLost: Its run has no such file.
    """
    try:
        return json.loads(load_text(f"{trial.artifact_uri}/{ITEMS}"))
    except (OSError, MlflowException):
        raise ItemsLost(
            f"run {trial.run_id} ({trial.name}) has lost its artifact {ITEMS}; delete the run, then run: "
            "mlflow run . -e search (it writes the run again from what it keeps of each trial)"
        ) from None


def run(run_id: str) -> Tracked:
    """Return one run as the store has it.

    Raises:
        MlflowException: There is no such run.
    """
    return _tracked(client().get_run(run_id))


def reopen(run_id: str) -> Run | None:
    """Return a handle on an existing run, or None if the store does not have it."""
    try:
        return Run(run_id, client().get_run(run_id).info.experiment_id)
    except MlflowException:
        return None


def move(run_id: str, parent: Run) -> None:
    """Put a run below another one."""
    client().set_tag(run_id, _PARENT_TAG, parent.run_id)


def set_tag(run_id: str, key: str, value: str) -> None:
    """Set a tag of any run."""
    client().set_tag(run_id, key, value)


# --- lineage -----------------------------------------------------------------------------------------------------


def md5(path: str | Path) -> str:
    """Return the MD5 of a file, or of a folder's files in order of their names (DVC versions data by MD5)."""
    path = Path(path)
    value = hashlib.md5(usedforsecurity=False)
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        value.update(file.read_bytes())
    return value.hexdigest()


def git_commit() -> str:
    """Return the commit of the project's root, or an empty string outside git or without it."""
    with suppress(FileNotFoundError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root(), capture_output=True, text=True, check=False)
        return done.stdout.strip()
    return ""


# --- registry ----------------------------------------------------------------------------------------------------


def register_model(
    run: Run,
    name: str,
    alias: str,
    model_code: Path,
    checkpoint: Path,
    code: list[str],
    requirements: list[str],
    tags: Mapping[str, str],
    example: list[str],
    max_new_tokens: int,
) -> str:
    """Log a checkpoint as a pyfunc model defined by code, register it and move the alias to it.

    Strings in, strings out, with ``max_new_tokens`` as a parameter of a prediction.

    Returns:
        The model's URI, ``models:/<name>/<version>``.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    client()
    text = Schema([ColSpec("string")])
    limit = ParamSchema([ParamSpec("max_new_tokens", "long", max_new_tokens)])
    # The one use of the fluent API: log_model has no client counterpart. The run exists already.
    with mlflow.start_run(run_id=run.run_id), warnings.catch_warnings():
        # The signature is given; for an example MLflow would load the model and run it.
        warnings.filterwarnings("ignore", "(?s).*input example", UserWarning)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(model_code),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=code,
            pip_requirements=requirements,
            registered_model_name=name,
            signature=ModelSignature(text, text, limit),
            metadata={"example": example},
        )
    version = info.registered_model_version
    for key, value in tags.items():
        client().set_model_version_tag(name, version, key, value)
    client().set_registered_model_alias(name, alias, version)
    return f"models:/{name}/{version}"


def registered(name: str, alias: str) -> bool:
    """Return whether the registry has a model of this name under this alias."""
    try:
        return bool(client().get_model_version_by_alias(name, alias))
    except MlflowException:
        return False


def ui_command(experiment: str, study: str | None = None, order: str = "accuracy") -> str:
    """Return what opens the trials, flat and best first, in the MLflow UI: a command, unless a server runs it already.

    A store's address may hold a password, so only that of our own file is shown.
    """
    search = "tags.stage%20%3D%20%22trial%22"
    if study:
        search += f"%20and%20tags.study%20%3D%20%22{study}%22"
    page = f"#/experiments/{experiment}/runs?searchFilter={search}&orderByKey=metrics.%60{order}%60&orderByAsc=false"
    if store().startswith("http"):
        address = urlsplit(store())
        return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path.rstrip('/')}/{page}"
    where = f"'{store()}'" if store().startswith("sqlite") else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --host 127.0.0.1 --backend-store-uri {where}\nhttp://127.0.0.1:5000/{page}"
