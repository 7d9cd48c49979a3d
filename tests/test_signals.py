"""Interrupts: raised where nothing is half-done, heard from ancestors, and never waited for in vain."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from pipeline import signals, tracking


@pytest.fixture(autouse=True)
def own_store(empty_store_here, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_interrupt_waits_for_the_end_of_held_work_and_comes_once():
    code = """
import os, signal, time
from pipeline import signals
signals.on_termination_interrupt()
try:
    with signals.held():
        with signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            print("inner done", flush=True)
        print("outer done", flush=True)
    print("never", flush=True)
except KeyboardInterrupt:
    signals.ending()
    os.kill(os.getpid(), signal.SIGINT)
    print("ended", flush=True)
"""
    done = python(code)
    assert done.stdout.split("\n") == ["inner done", "outer done", "ended", ""] and done.returncode == 0


def test_process_that_does_not_end_is_ended():
    code = """
import os, signal, time
from pipeline import signals
signals.on_termination_interrupt(grace=0.5)
with signals.held():
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(0.1)
"""
    done = python(code, timeout=60)
    assert done.returncode == 130 and "not ended in time: ended now" in done.stderr


STAGE = """
import os, sys, time
from pipeline import signals
signals.on_termination_interrupt()
print(os.getpid(), flush=True)
try:
    time.sleep(100)
finally:
    open("ended", "w").close()
"""


def test_stage_below_a_shell_ends_with_the_process_that_it_works_for(tmp_path):
    """As under DVC, whose shell outlives a killed DVC."""
    (tmp_path / "stage.py").write_text(STAGE)
    top = f"""
import os, subprocess, sys
os.environ["DVC_ROOT"] = "."
subprocess.run(["sh", "-c", "{sys.executable} stage.py; true"])
"""
    process = subprocess.Popen([sys.executable, "-c", top], stdout=subprocess.PIPE, text=True)
    stage = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    psutil.wait_procs([stage], timeout=30)
    assert not stage.is_running() and (tmp_path / "ended").exists()


def test_stage_ends_with_the_project_above_whatever_started_it(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    middle = f"import subprocess; subprocess.run(['{sys.executable}', 'stage.py'])"
    top = f"""
import subprocess, sys
from pipeline import signals
signals.on_termination_interrupt()
subprocess.run([sys.executable, "-c", {middle!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", top], stdout=subprocess.PIPE, text=True)
    stage = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs([stage], timeout=30)
    assert not stage.is_running() and (tmp_path / "ended").exists()


def test_process_that_nobody_reaps_is_not_waited_for():
    zombie, living = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    try:
        started = time.monotonic()
        assert signals.wait([psutil.Process(zombie.pid)], within=30) == []
        assert time.monotonic() - started < 20
        assert psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE
        both = [psutil.Process(zombie.pid), psutil.Process(living.pid)]
        assert signals.wait(both, within=0.2) == both[1:]
    finally:
        living.kill()
        zombie.wait()
        living.wait()


def test_second_signal_does_not_cut_short_what_ends_the_runs():
    code = """
import os
import signal
from pipeline import signals, tracking
tracking.on_termination_interrupt()
finish = tracking.Run.finish
def told_again(run, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    finish(run, *arguments)
tracking.Run.finish = told_again
with tracking.stage("search", {}) as run:
    print(run.run_id, run.child("trial 0", {"stage": "trial"}).run_id, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
"""
    root = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, check=False
    )
    assert "Interrupted" in done.stderr
    assert [tracking.run(run).status for run in done.stdout.split()] == ["KILLED", "KILLED"]


def test_an_interrupt_that_is_lost_in_a_destructor_comes_again():
    code = """
import os
import signal
import time
from pipeline import signals, tracking
signals._AGAIN = 0.2
tracking.on_termination_interrupt()
class Dies:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
with tracking.stage("search", {}) as run:
    print(run.run_id, flush=True)
    Dies()
    print("goes on", flush=True)
    time.sleep(60)
"""
    root = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, check=False
    )
    run, *said = done.stdout.split("\n")
    assert said[0] == "goes on" and "Exception ignored" in done.stderr
    assert tracking.run(run).status == "KILLED"
