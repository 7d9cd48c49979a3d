"""Workers in processes of a local Ray: real ones, with work that is made up."""

import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from pipeline import workers
from pipeline.search import SearchError
from pipeline.search.crew import Answers, Crew, Task
from tests.fixtures import working
from tests.fixtures.searches import at, result

pytestmark = pytest.mark.skipif(not workers.installed(), reason=f"Ray is not installed ({workers.INSTALL})")

BITS = [tuple(8 if unit == raised else 4 for unit in range(8)) for raised in range(1, 5)]
SLEEP = 0.5


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, from which workers find the project."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Answers(tmp_path, "study")


def task(name, bits=BITS[0]):
    return Task(name, at(*bits), "run")


def test_workers_answer_side_by_side_survive_a_death_and_end(here):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = []
    with workers.started(2, partial(working.sleeping, here, SLEEP)) as pool:
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in psutil.Process().children(recursive=True)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening <= {"127.0.0.1", "::1"} and listening
        crew = Crew(pool, retries=1, answers=here, told=said.append)
        crew.submit(task("trial 1"))
        assert crew.wait()[1].outcome == result(BITS[0])  # both have started by now, or nearly
        began = time.monotonic()
        tasks = [task(f"trial {number + 2}", bits) for number, bits in enumerate(BITS)]
        for each in tasks:
            crew.submit(each)
        ended = [crew.wait() for _ in tasks]
        print(f"4 tasks of {SLEEP} s took {time.monotonic() - began:.2f} s")
        assert {each.name: answer.outcome for each, answer in ended} == {
            each.name: result(each.vector.bits) for each in tasks
        }
        assert {answer.worker for _, answer in ended} == {"worker 1", "worker 2"}
        assert {answer.host for _, answer in ended} == {platform.node()}
        assert here.read().keys() == {"trial 1", *(each.name for each in tasks)}

        fatal = task("trial 6", (8, *BITS[0][1:]))
        crew.submit(fatal)
        assert crew.wait()[1].outcome == result(fatal.vector.bits)
        (death,) = said
        assert death.startswith("trial 6 ended with its worker: ") and death.endswith("another worker takes it up")

        for name in ("fails", "fails unreadably"):
            crew.submit(task(name))
        errors = {each.name: answer.outcome for each, answer in (crew.wait(), crew.wait())}
        assert isinstance(errors["fails"], MemoryError) and "working.py" in errors["fails"].__notes__[0]
        assert str(errors["fails"]) == "tried to allocate 20 GiB"
        assert str(errors["fails unreadably"]) == "OnlyHere: one and two"
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert psutil.Process().children(recursive=True) == []


def test_workers_that_cannot_start_end_the_search_with_the_cause(here):
    with workers.started(1, working.refused) as pool, pytest.raises(SearchError, match="the bank was changed"):
        pool.wait()


def test_ray_that_lost_a_process_of_its_own_ends_the_search(here):
    with workers.started(1, partial(working.sleeping, here, SLEEP)) as pool:
        pool.submit(task("sleeps"))
        (raylet,) = [child for child in psutil.Process().children() if child.name() == "raylet"]
        raylet.kill()
        with pytest.raises(SearchError, match="a process of Ray's own ended; run the same command"):
            while True:
                pool.wait()
    assert [child for child in psutil.Process().children(recursive=True) if "ray" in child.name()] == []


def test_address_where_no_ray_answers_is_named(here):
    with pytest.raises(SearchError, match="search.cluster: no Ray answers at auto"), workers.started(1, print, "auto"):
        pass


def test_killed_driver_leaves_neither_process_nor_folder(here):
    code = "from tests.fixtures import working; working.drive()"
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "ready\n"
    family = psutil.Process(driver.pid).children(recursive=True)
    (left,) = {
        Path(file.path[: file.path.index("/session_")])
        for process in family
        for file in process.open_files()
        if "/session_" in file.path
    }
    assert any("ray::Process" in " ".join(process.cmdline()) for process in family)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == [] and not left.exists()
