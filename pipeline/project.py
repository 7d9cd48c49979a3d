"""The MLproject entry points: check the params, run ``dvc repro`` under the project's run, show the front.

``mlflow run . -e search`` comes here. Whatever is upstream and out of date is built first; nothing runs twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipeline import bits, checks, console, device, doctor, overrides, params, signals, storage, tracking
from pipeline.locks import Lock
from pipeline.params import Params, ParamsError
from pipeline.paths import STUDY
from pipeline.stages import PAPER
from pipeline.stages.agreement import tracked
from pipeline.stages.shell import made

# The main job goes all the way to a registered model; every other entry point is the stage of its name.
TARGETS = {"search": ("report", "register")}
_RUN_ID = 32  # digits of a run's id
_LOCK = Path(".dvc/tmp/qpruner.lock")
_DVC = "pipeline.repro"
_SOURCES = Path(".dvc/tmp/qpruner.sources.json")  # what `path:` sources were when they were last fetched


def run(entry: str) -> int:
    """Run one entry point with the params that ``overrides`` holds; return the exit status.

    Args:
        entry: A stage's name, ``table`` or ``ablation``.

    Raises:
        ParamsError: The params have faults; nothing was started.
    """
    checked = checks.load()
    _refuse_unknown_run(checked)
    tracking.on_termination_interrupt()
    compute = device.choose(checked.device, checked.dtype)
    if entry == "search":
        console.note(doctor.summary(compute, checked.model.source == doctor.MEASURED_MODEL))
    if Path.cwd().is_relative_to(tempfile.gettempdir()):  # `mlflow run <git address>` clones there
        console.note(
            f"Working in a temporary copy, {Path.cwd()}: artifacts stay there. To keep them and to go on after an "
            "interruption, clone the repository and run in the clone."
        )
    with lock():
        for link in STUDY.glob("*.lock*"):  # of versions that let Optuna lock its journal; DVC fails at a dangling one
            link.unlink()
        tracking.reap()
        if run_id := tracking.adopt_project_run():
            tracking.Run(run_id, "").params({"compute": str(compute), **overrides.active()})
        if not any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents)):
            dvc("config", "--quiet", "--local", "core.no_scm", "true")  # a copy without its history
        status = _again("fetch") if _changed(checked) else 0
        if entry in PAPER:
            return status or dvc("repro", "fetch") or launch("pipeline", entry)
        status = status or dvc("repro", entry)
        if status == 0 and entry == "search":
            # DVC sees neither a trial that failed nor a store that lacks what was tracked.
            if _finished() < checked.search.n_trials or _tracked() < _finished():
                status = _again("search")
            status = status or dvc("repro", *TARGETS["search"])
            if status == 0 and not tracking.registered(made("register")["model"]):
                status = _again("register")
        if status == 0 and entry in ("search", "pareto", "report"):
            from pipeline.stages import report

            report.show(checked)
        if status == 0 and entry == "register":
            registered = made("register")
            alias = f"alias {registered['alias']}" if registered["alias"] else f"no alias: {registered['reason']}"
            console.note(f"In the registry: {registered['model']}, {alias}")
    return status


def plan(config: str, memory_gib: str) -> int:
    """Run entry point ``plan``, which needs no stage and no lock; return the exit status.

    Args:
        config: As for ``plan.asked``.
        memory_gib: The memory to fit.

    Raises:
        ParamsError: An argument or ``params.yaml`` has faults.
    """
    from pipeline.results import plan as plan_
    from pipeline.stages import plan as shown

    asked = plan_.asked(config, memory_gib)
    tracking.on_termination_interrupt()
    tracking.adopt_project_run()
    shown.show(asked)
    return 0


def _refuse_unknown_run(checked: Params) -> None:
    """Refuse to build a trial that the store does not have, before anything else runs.

    Raises:
        ParamsError: ``build.choose`` is the id of no run.
    """
    choose = checked.build.choose
    if choose == "best" or ":" in choose or (bits.is_text(choose) and len(choose) != _RUN_ID):
        return
    if tracking.reopen(choose) is None:
        raise ParamsError(
            f"build.choose: no run has the id {choose}; take a trial's run id from the MLflow UI or the column run_id "
            "of reports/trials.csv, or use best"
        )


def _changed(checked: Params) -> bool:
    """Return whether a file or folder that a source names is not what it was the last time; remember what it is now.

    DVC follows the params, which name those and do not hold them.
    """
    sources = (checked.model.source, checked.data.alpaca, checked.data.benchmarks)
    now = {source: _signature(Path(source.removeprefix("path:"))) for source in sources if source.startswith("path:")}
    try:
        before = json.loads(_SOURCES.read_text())
    except FileNotFoundError:
        before = {}
    except ValueError:  # damaged: whatever it said, fetch again
        before = dict.fromkeys(now)
    storage.write_text(_SOURCES, json.dumps(before | now))
    return any(before.get(source, signature) != signature for source, signature in now.items())


def _signature(path: Path) -> str:
    """Return what changes with a file or any file of a folder: names, sizes and times; contents may be gigabytes."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return params.digest([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def _again(stage: str) -> int:
    return dvc("repro", "--force", "--single-item", stage)


def _finished() -> int:
    return int(made("search")["finished"])


def _tracked() -> int:
    """Return how many finished trials of the search the store has."""
    searched = made("search")
    return sum(run.tags["stage"] == "trial" for run in tracked(searched["study"], searched["journal"]))


def dvc(*arguments: str) -> int:
    """Run DVC on the params that are really used; see ``launch``."""
    return launch(_DVC, *arguments)


def launch(module: str, *arguments: str) -> int:
    """Run a module with this Python first on the PATH; an interrupt is passed on to all it started."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path, "QPRUNER_PYTHON": sys.executable}
    child = subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, pass_fds=_held)
    try:
        return child.wait()
    except KeyboardInterrupt:
        tracking.ending(within=90)  # what it started has 30 seconds to end, and is killed then
        tracking.kill_project_run()  # first: `mlflow run` marks it FAILED as soon as this process is gone
        _stop_all(child, itself=module != _DVC)  # DVC ends of its own accord when its stage has
        raise


def _stop_all(child: subprocess.Popen, itself: bool) -> None:
    """End the stage first (it ends its runs), then what waits for it; kill what has not ended in 30 seconds."""
    try:
        top = psutil.Process(child.pid)
        family = [top] * itself + top.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in reversed(family):
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue
    for process in signals.wait(family, within=30):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait(timeout=30)


_held: Sequence[int] = ()


@contextmanager
def lock() -> Iterator[None]:
    """Wait for any other run in this folder: DVC itself would fail at once. Stages that outlive this process count."""
    global _held
    _LOCK.parent.mkdir(parents=True, exist_ok=True)
    folder_lock = Lock(_LOCK)
    try:
        if not folder_lock.take():
            console.note("another run is at work in this folder; waiting for it to end (Ctrl-C to give up)")
            folder_lock.take(wait=True)
        _held = (folder_lock.descriptor,)
        yield
    finally:
        _held = ()
        folder_lock.release()
