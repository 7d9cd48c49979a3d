"""A team's services, for real: PostgreSQL, an object store and an MLflow server over both.

Where their packages are missing, these tests are skipped and say what installs them. A whole search on the services is
in whole_search.py.
"""

import json

import pytest

from pipeline import tracking
from pipeline.tracking import outbox, runs
from tests.services import services


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    yield from services.brought_up(tmp_path_factory.mktemp("team"))


@pytest.fixture
def here(team, tmp_path, monkeypatch):
    """This process as a member of the team, in an empty folder."""
    for name, value in team.environment.items():
        monkeypatch.setenv(name, value)
    for name in (tracking.PARENT, "MLFLOW_RUN_ID", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "_outbox", outbox.Outbox())
    return team


def trial(search, number):
    """A trial's run as the search writes it."""
    run = search.child(f"trial {number}", {"stage": "trial", "study": "s"})
    run.params({"bits": "48"})
    run.metrics({"accuracy": number / 4})
    run.json({"by_item": {"piqa": [number]}}, tracking.ITEMS)
    run.finish()


def test_runs_are_in_the_database_and_their_files_in_the_object_store(here):
    with tracking.stage("search", {}) as search:
        trial(search, 1)
    (kept,) = tracking.trials("s")
    assert kept.status == "FINISHED" and kept.metrics == {"accuracy": 0.25} and kept.params == {"bits": "48"}
    assert tracking.items(kept) == {"by_item": {"piqa": [1]}}
    key = "runs/" + kept.artifact_uri.removeprefix("mlflow-artifacts:/") + "/items.json"
    assert json.loads(here.store.client().get_object(Bucket="mlflow", Key=key)["Body"].read())["by_item"]
    here.store.client().delete_object(Bucket="mlflow", Key=key)
    with pytest.raises(tracking.ItemsLost, match="has lost its artifact items.json"):
        tracking.items(kept)


@pytest.mark.parametrize("service", ["database", "store"])
def test_service_that_is_away_is_waited_for_in_one_note_each(here, monkeypatch, capsys, service):
    monkeypatch.setattr(outbox, "_PAUSE", 0.5)
    gone = getattr(here, service)
    with tracking.stage("search", {}) as search:
        before = {run.run_id for run in tracking.trials("s")}
        gone.down()
        for number in range(3):
            trial(search, number)
        gone.up()
    told = capsys.readouterr().out
    assert told.count("tracking is behind") == told.count("tracking has caught up") == 1
    assert "does not answer (" in told and "Max retries" not in told
    assert not any(secret in told for secret in (services.PASSWORD, services.SECRET))
    after = {run.metrics["accuracy"]: run for run in tracking.trials("s") if run.run_id not in before}
    assert {score: run.status for score, run in after.items()} == dict.fromkeys((0, 0.25, 0.5), "FINISHED")
    assert [tracking.items(after[score])["by_item"]["piqa"] for score in (0, 0.25, 0.5)] == [[0], [1], [2]]
