"""An interrupt at the entry point: what it started is asked to end, and killed where it does not."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from pipeline import project, signals

# A process that starts another one and waits, as DVC does with a stage. Both print their id once they are ready.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""
OBEDIENT = "import time; time.sleep(100)"
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(100)
"""


@pytest.fixture
def family():
    """Starts a parent with a child of the given code; returns both."""
    started = []

    def start(code):
        parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True)
        started.append(parent)
        child = psutil.Process(int(parent.stdout.readline()))
        if code == STUBBORN:
            parent.stdout.readline()
        return parent, child

    yield start
    for parent in started:
        for process in psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []:
            process.kill()
        parent.kill()
        parent.wait()


@pytest.fixture
def waits(monkeypatch):
    """How long each wait for processes was allowed to be; the waits themselves are cut to two seconds."""
    asked, wait = [], signals.wait

    def shortened(processes, within):
        asked.append(within)
        return wait(processes, within=2)

    monkeypatch.setattr(project.signals, "wait", shortened)
    return asked


def test_stage_that_ends_when_asked_is_not_killed(family, waits):
    parent, child = family(OBEDIENT)
    project._stop_all(parent, itself=True)
    assert waits == [30] and signals.wait([child], within=20) == []
    assert parent.returncode in (0, -signal.SIGTERM)  # it ends by itself when its child has


def test_stage_that_does_not_end_is_killed_after_30_seconds(family, waits):
    parent, child = family(STUBBORN)
    project._stop_all(parent, itself=True)
    child.wait(timeout=20)  # raises if it lives
    assert waits == [30] and parent.returncode is not None


def test_stage_that_has_ended_already_is_no_fault(waits):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    ended.wait()
    project._stop_all(ended, itself=True)
    assert waits == []
