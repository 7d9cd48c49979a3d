"""Runs: written by stages and trials, found again by their tags, ended when their process died."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

from pipeline import console, signals
from pipeline.tracking import processes
from pipeline.tracking.credentials import hidden
from pipeline.tracking.lineage import git_commit, md5
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import (
    PARENT,
    StoreError,
    asking,
    client,
    experiment_id,
    experiments,
    is_server,
    parent_run,
    quiet,
)

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

ITEMS = "items.json"  # in a trial's run: what it measured item by item
JOURNAL_ID = "journal_run_id"  # tag: the id by which the study's journal knows a run that the store numbered later
PARENT_TAG = "mlflow.parentRunId"
_NAME_TAG = "mlflow.runName"
_PAGE = 1000
_outbox = Outbox()


@dataclass
class Run:
    """One MLflow run: thin, explicit, in batches (a call apiece costs seven times as much).

    Its writes go through the process's outbox: one that the store cannot take now is made later.

    Attributes:
        run_id: Its id in the store; an id of our own if it was started while the store was away.
        experiment_id: Its experiment's.
        name: Its name.
        children: The runs started below it.
        ended: Whether ``finish`` was called.
    """

    run_id: str
    experiment_id: str
    name: str = ""
    children: list[Run] = field(default_factory=list, repr=False)
    ended: bool = False
    _stored_as: str = ""

    def __post_init__(self) -> None:
        self._stored_as = self._stored_as or self.run_id

    def params(self, values: Mapping[str, object]) -> None:
        """Log params; lists as JSON."""
        shown = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in values.items()}
        self._log(params=[Param(key, value[:6000]) for key, value in shown.items()])

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log the metrics that have a value."""
        now = _now()
        self._log(metrics=[Metric(key, float(value), now, step) for key, value in values.items() if value is not None])

    def series(self, key: str, values: Iterable[tuple[int, float]]) -> None:
        """Log a metric's (step, value) pairs, in one call for each thousand of them."""
        now = _now()
        points = [Metric(key, float(value), now, step) for step, value in values]
        for start in range(0, len(points), _PAGE):
            self._log(metrics=points[start : start + _PAGE])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._log(tags=[RunTag(key, str(value)[:5000]) for key, value in values.items()])

    def rename(self, name: str) -> None:
        """Give the run another name."""
        self.name = name
        self.tags({_NAME_TAG: name})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file."""
        self._write(lambda: client().log_artifact(self._stored_as, str(path), folder))

    def json(self, values: object, name: str) -> None:
        """Log plain values as a JSON file."""
        self._log_text(json.dumps(values), name)

    def dataset(self, path: str | Path, name: str, context: str) -> str:
        """Log a file as the run's input, with its MD5 as digest; return the digest."""
        digest = md5(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mlflow names two equal readings of a local path
            source = resolve_dataset_source(str(path))
        entity = MetaDataset(  # type: ignore[abstract]  # it has no profile, and needs none
            source, name=name, digest=digest[:36]
        )._to_mlflow_entity()
        inputs = DatasetInput(entity, [InputTag("mlflow.data.context", context)])
        self._write(lambda: client().log_inputs(self._stored_as, [inputs]))
        return digest

    def child(self, name: str, tags: Mapping[str, str]) -> Run:
        """Start a run below this one."""
        run = Run(uuid.uuid4().hex, self.experiment_id, name)
        begun = _now()

        def create() -> None:
            run._stored_as = _create(name, self.experiment_id, self._stored_as, tags, begun)

        if _outbox.send(create):
            run.run_id = run._stored_as
        else:
            run.tags({JOURNAL_ID: run.run_id})
        self.children.append(run)
        return run

    def finish(self, status: str = "FINISHED", error: BaseException | None = None) -> None:
        """End the run; ``error`` becomes its tag ``error`` and its traceback an artifact."""
        if error is not None:
            self.tags({"error": hidden(f"{type(error).__name__}: {error}")})
            trace = hidden("".join(traceback.format_exception(error)))
            try:
                self._log_text(trace, "traceback.txt")
            except (OSError, StoreError):  # the cause is in the tag; a full disk must not hide it
                console.note("the traceback could not be kept in the run")
        now = _now()
        self._write(lambda: client().set_terminated(self._stored_as, status, now))
        self.ended = True

    def _log(self, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()) -> None:
        self._write(lambda: client().log_batch(self._stored_as, metrics=metrics, params=params, tags=tags))

    def _log_text(self, text: str, name: str) -> None:
        self._write(lambda: client().log_text(self._stored_as, text, name))

    def _write(self, write: Callable[[], object]) -> None:
        _outbox.send(write)


def _create(name: str, experiment: str, parent: str | None, tags: Mapping[str, str], begun: int) -> str:
    """Make a run in the store; return its id."""
    values = {_NAME_TAG: name, "mlflow.user": "", "mlflow.source.name": "pipeline", **processes.tags(), **tags}
    if parent:
        values[PARENT_TAG] = parent
    if commit := git_commit():
        values["mlflow.source.git.commit"] = commit
    return client().create_run(experiment, begun, values, name).info.run_id


def create(name: str, parent: str | None, tags: Mapping[str, str]) -> Run:
    """Start a run in the experiment of this project.

    Raises:
        StoreError: The store does not answer or refuses.
    """
    experiment = experiment_id()
    return Run(asking(_create)(name, experiment, parent, tags, _now()), experiment, name)


def _now() -> int:
    """Return the time as MLflow counts it: milliseconds."""
    return int(time.time() * 1000)


def patient() -> AbstractContextManager[None]:
    """Let nothing that the store does stop the work: what it refuses is written later, at the latest at the end.

    Raises:
        StoreError: At the end the store still refuses.
    """
    return _outbox.patient()


# --- stages ------------------------------------------------------------------------------------------------------


@contextmanager
def stage(name: str, params: Mapping[str, object]) -> Iterator[Run]:
    """Track one stage: its own run, always ended, with system metrics and the cause of a failure."""
    quiet()
    reap()
    run = create(name, parent_run(), {"stage": name})
    run.params(params)
    monitor = _system_metrics(run.run_id)
    try:
        yield run
    except KeyboardInterrupt:
        signals.ending()
        _finish_all(run, "KILLED")
        raise
    except BaseException as error:
        _finish_all(run, "FAILED", error)
        raise
    else:
        run.finish()
        if not _outbox.settle():
            console.note(
                f"tracking is still behind: {len(_outbox.waiting)} writes are lost. When the store answers, the same "
                "command writes the runs of finished trials again"
            )
    finally:
        monitor.finish()


def _finish_all(run: Run, status: str, error: BaseException | None = None) -> None:
    for child in run.children:
        if not child.ended:
            _finish_all(child, "KILLED")
    run.finish(status, error)


def _system_metrics(run_id: str) -> SystemMetricsMonitor:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(run_id, sampling_interval=5)
    monitor.start()
    return monitor


def reap() -> list[str]:
    """End as KILLED every run whose process on this machine is dead; return their ids."""
    return _reap(experiments())


@asking
def _reap(within: list[str]) -> list[str]:
    ours = f"attributes.status = 'RUNNING' and tags.`{processes.HOST}` = '{platform.node()}'"
    running = client().search_runs(within, ours, max_results=_PAGE)
    dead = [run.info.run_id for run in running if processes.dead(run.data.tags)]
    if not is_server():  # else another machine may be starting it
        made = "attributes.status = 'RUNNING' and tags.`mlflow.source.type` = 'PROJECT'"
        running = client().search_runs(within, made, max_results=_PAGE)
        dead += [run.info.run_id for run in running if processes.never_started(run.data.tags, run.info.start_time)]
    for run_id in dead:
        client().set_terminated(run_id, "KILLED")
    return dead


# --- the run of `mlflow run` -------------------------------------------------------------------------------------


def adopt_project_run() -> str | None:
    """Take ``MLFLOW_RUN_ID`` out of the environment and keep it as the parent of the stages to come.

    The run is named after its entry point; MLflow gives it random words.
    """
    quiet()
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id:
        os.environ[PARENT] = run_id
        run = Run(run_id, "")
        run.tags(processes.tags() | {"stage": "project"})
        entry = asking(lambda: client().get_run(run_id))().data.tags.get("mlflow.project.entryPoint")
        run.rename(f"mlflow run -e {entry}" if entry else "mlflow run")
    return run_id


def kill_project_run() -> None:
    """Mark the project's run KILLED, now and once more when ``mlflow run`` has ended.

    An interrupted ``mlflow run`` overwrites any status with FAILED as its last act, so a process that outlives it has
    the last word. It also ends the runs of stages that had to be killed. `mlflow run` lives as long as this process,
    which may take 90 seconds to end its stages.
    """
    if run_id := parent_run():
        starter = signals.started_by()
        Run(run_id, "").finish("KILLED")
        if starter is not None and starter.pid > 1:  # else it died before us, and says nothing more
            subprocess.Popen(
                [sys.executable, "-c", _LAST_WORD, run_id, str(starter.pid)],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


_LAST_WORD = """
import sys
import psutil
from pipeline import signals, tracking
if psutil.pid_exists(int(sys.argv[2])):
    signals.wait([psutil.Process(int(sys.argv[2]))], within=120)
tracking.Run(sys.argv[1], "").finish("KILLED")
tracking.reap()
"""
