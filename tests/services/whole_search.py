"""A whole search on a team's services: ``python -m pytest -q tests/services/whole_search.py``, some minutes.

Too long for every run of the tests, so its name is none that pytest collects by itself.
"""

import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.end_to_end.project import SEARCH, command, start, tiny_project
from tests.faults import state
from tests.faults.kills import run
from tests.services import services

UPSTREAM = ("fetch", "prune", "importance", "quantize")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    yield from services.brought_up(tmp_path_factory.mktemp("team"))


@pytest.fixture(scope="module")
def project(team, tmp_path_factory):
    """A member's clone, with the team's remote in its git history."""
    folder = tiny_project(tmp_path_factory.mktemp("first"))
    for words in (
        ("remote", "add", "--default", "team", "s3://dvc/qpruner"),
        ("remote", "modify", "team", "endpointurl", team.store.endpoint),
    ):
        assert command(folder, "dvc", *words).returncode == 0
    commit(folder, "The team's remote")
    return folder


def commit(folder, title):
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", title], check=True)


def finished(team):
    """(study, vector) -> run id, of the finished trials on the server; each must be there once."""
    logged = [each for each in team.server.trials() if each.info.status == "FINISHED"]
    counts = Counter(map(state.identified, logged))
    assert not counts or max(counts.values()) == 1
    return {state.identified(each): each.info.run_id for each in logged}


def wait_for_a_trial(folder, process, more_than):
    limit = time.monotonic() + 1500
    while len(state.journal_trials(folder)) <= more_than:
        assert process.poll() is None and time.monotonic() < limit, "no trial was finished"
        time.sleep(0.1)


def test_search_survives_an_outage_and_goes_on_on_another_machine(team, project, tmp_path):
    output = tmp_path / "first.txt"
    with output.open("w") as file:
        process = start(project, *SEARCH, more=team.environment, output=file)
        wait_for_a_trial(project, process, 0)
        team.database.down()
        time.sleep(10)
        team.database.up()
        assert process.wait(timeout=1500) == 0, output.read_text()[-4000:]
    told = output.read_text()
    assert "tracking is behind" in told and "tracking has caught up" in told and "Traceback" not in told
    first = finished(team)
    assert set(first) == set(state.journal_trials(project)) and len(first) == 4
    assert "RUNNING" not in {each.info.status for each in team.server.runs()}

    commit(project, "A search of four trials")
    pushed = command(project, "dvc", "push", "-q", more=team.environment)
    assert pushed.returncode == 0, pushed.stderr
    second = tmp_path / "second"
    subprocess.run(["git", "clone", "-q", str(project), str(second)], check=True)
    pulled = command(second, "dvc", "pull", "-q", more=team.environment)
    assert pulled.returncode == 0, pulled.stderr
    more = ("-P", "set=search.n_trials=6")  # "pareto" ends where the study does
    done = command(second, *run("pareto"), *more, more=team.environment, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    both = finished(team)
    assert len(both) == 6 and {key: both[key] for key in first} == first
    assert set(both) == set(state.journal_trials(second))
    ran = Counter(each.data.tags.get("stage") for each in team.server.runs())
    assert [ran[stage] for stage in UPSTREAM] == [1, 1, 1, 1] and ran["search"] == 2
    said = told + done.stdout + done.stderr + pushed.stderr + pulled.stderr
    assert not any(secret in said for secret in (services.PASSWORD, services.SECRET))

    third = (sys.executable, "-m", "pipeline", "run", "search", "--n-trials", "8")
    output = tmp_path / "third.txt"
    impatient = team.environment | {"QPRUNER_STORE_PATIENCE": "4"}
    with output.open("w") as file:
        process = start(second, *third, more=impatient, output=file)
        wait_for_a_trial(second, process, 6)
        team.server.down()
        assert process.wait(timeout=1500) != 0
    told = output.read_text()
    assert "tracking is behind" in told and "writes are lost" in told and "Traceback" not in told
    assert len(state.journal_trials(second)) == 8
    team.server.up()
    again = command(second, *third, more=impatient, timeout=1500)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-4000:]
    assert set(finished(team)) == set(state.journal_trials(second)) and len(finished(team)) == 8
    assert "RUNNING" not in {each.info.status for each in team.server.runs()}
