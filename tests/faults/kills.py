"""Kills and signals at random moments of a real ``mlflow run``, then the same command again."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.end_to_end.project import command, edit, end_group, start, tiny_project
from tests.faults import state
from tests.faults.tally import Try

_GRACE = 60.0  # seconds in which every process has to end: a stage that does not is killed after 30


def run(entry: str) -> tuple[str, ...]:
    return ("mlflow", "run", ".", "-e", entry, "--env-manager=local", "--experiment-name", "qpruner")


def prepared(folder: Path) -> Path:
    """A clone with a tiny model, everything upstream of the search built."""
    project = folder / "project"
    if not (project / "reports/importance.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # a kill may have left a part of it
        tiny_project(folder)
        done = command(project, "dvc", "repro", "importance", "quantize", timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
    return project


# How a process dies: whom the signal reaches, and which one.


def _whole_group(process: subprocess.Popen, number: int) -> None:
    os.killpg(process.pid, number)


def _first(process: subprocess.Popen, number: int) -> None:
    process.send_signal(number)


def _newest(process: subprocess.Popen, number: int) -> None:
    """The process that computes: the one that was started last."""
    children = psutil.Process(process.pid).children(recursive=True)
    (children[-1] if children else process).send_signal(number)


def _middle(process: subprocess.Popen, number: int) -> None:
    """DVC, or whatever waits for a stage."""
    children = psutil.Process(process.pid).children(recursive=True)
    (children[len(children) // 2] if children else process).send_signal(number)


def _twice(process: subprocess.Popen, number: int) -> None:
    _whole_group(process, number)
    time.sleep(random.uniform(0.05, 2))
    with suppress(ProcessLookupError):
        _whole_group(process, number)


DEATHS = {
    "SIGKILL to all": (_whole_group, signal.SIGKILL),
    "SIGKILL to mlflow": (_first, signal.SIGKILL),
    "SIGKILL in the middle": (_middle, signal.SIGKILL),
    "SIGKILL to the stage": (_newest, signal.SIGKILL),
    "SIGINT to all": (_whole_group, signal.SIGINT),
    "SIGINT twice": (_twice, signal.SIGINT),
    "SIGTERM to all": (_whole_group, signal.SIGTERM),
    "SIGTERM twice": (_twice, signal.SIGTERM),
    "SIGTERM to mlflow": (_first, signal.SIGTERM),
    "SIGTERM to the stage": (_newest, signal.SIGTERM),
}


def kill(project: Path, number: int, seed: int, seconds: dict[str, float]) -> Try:
    """Start a command, end it by force at a random moment, start it again, and count.

    Args:
        project: From ``prepared``; each try changes a setting in it, so that its command has work to do.
        number: Of this try; chooses command and death in turn.
        seed: Of the campaign.
        seconds: How long each command took without a fault, from which the moment is drawn; updated here.
    """
    draw = random.Random(f"{seed} {number}")
    entry = ("search", "build", "search", "table", "search")[number % 5]
    death = list(DEATHS)[number % len(DEATHS)] if number < len(DEATHS) else draw.choice(list(DEATHS))
    done = Try("kills", f"{number}: {entry}, {death}")
    rate = 0.002 + number * 1e-6  # another study, other cells
    edit(project, "recover", learning_rate=rate)
    if entry == "build":
        earlier = command(project, *run("search"), timeout=1800)
        done.read(earlier.stdout + earlier.stderr)
        edit(project, "build", steps=2 + number % 2 * 2)
    moment = draw.uniform(3, seconds.get(entry, 20 if entry == "build" else 60))
    whom, what = DEATHS[death]
    output = project.parent / "killed.txt"
    with output.open("w") as file:
        process = start(project, *run(entry), output=file)
        with suppress(psutil.TimeoutExpired):
            psutil.Process(process.pid).wait(moment)
        ended_before = process.poll() is not None
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            whom(process, what)
        alive = state.wait_for_end(project, _GRACE)
        end_group(process)
    done.remark(f"after {moment:.0f} s" + (", when it had ended" if ended_before else ""))
    if alive:
        done.left += len(alive)
        done.remark(f"alive {_GRACE:.0f} s later: {state.named(alive)}")
        for each in alive:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    if what != signal.SIGKILL:
        done.read(output.read_text())
    trials, cells = state.journal_trials(project), state.cells(project)
    began = time.monotonic()
    again = command(project, *run(entry), timeout=1800)
    seconds[entry] = max(seconds.get(entry, 0), 0.9 * (time.monotonic() - began))
    done.read(again.stdout + again.stderr)
    if again.returncode:
        done.unclear += 1
        done.remark(f"exit status {again.returncode} of the same command: {again.stderr.strip()[-300:]}")
    state.wait_for_end(project, 10)
    state.compare(done, project, trials, cells)
    if not done.clean:  # to be looked into: the next try writes over it
        shutil.copyfile(output, output.with_name(f"killed-{number}.txt"))
    return done
