"""A store that goes away, refuses or is damaged: nothing is lost, and one message says what to do."""

import pytest
import requests
from mlflow.artifacts import load_text
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient

from pipeline import tracking
from pipeline.tracking import outbox, registry, runs, store


@pytest.fixture(autouse=True)
def nothing_waits_afterwards(empty_store_here, monkeypatch):
    monkeypatch.setattr(runs, "_outbox", outbox.Outbox())
    monkeypatch.setenv(store.PATIENCE, "0")


def status(run):
    return tracking.run(run.run_id).status


class Away:
    """A store that can be switched off: every write fails as MLflow fails without its database."""

    def __init__(self, monkeypatch):
        self.off = False
        for name in ("log_batch", "create_run", "set_terminated", "log_artifact"):
            monkeypatch.setattr(MlflowClient, name, self._failing(getattr(MlflowClient, name)))

    def _failing(self, call):
        def perhaps(*arguments, **named):
            if self.off:
                raise MlflowException("could not connect to postgresql://bob:s3cret@db", TEMPORARILY_UNAVAILABLE)
            return call(*arguments, **named)

        return perhaps


def test_outage_is_told_once_and_made_up_for_when_the_store_answers_again(tmp_path, monkeypatch, capsys):
    away = Away(monkeypatch)
    with tracking.stage("search", {}) as search:
        early = search.child("trial 0", {"stage": "trial", "study": "s"})
        away.off = True
        late = search.child("trial 1", {"stage": "trial", "study": "s"})
        for trial in (early, late):
            trial.params({"bits": "48"})
            trial.metrics({"accuracy": 0.5})
            trial.series("loss", [(0, 2.0), (1, 1.5)])
            trial.json({"by_item": {}}, tracking.ITEMS)
            trial.finish()
        known_as = late.run_id
        assert tracking.trials("s")[0].status == "RUNNING" and len(tracking.trials("s")) == 1
        away.off = False
        monkeypatch.setattr(runs._outbox, "_next_attempt", 0)
        search.metrics({"finished": 2})
    told = capsys.readouterr().out
    assert told.count("tracking is behind") == told.count("tracking has caught up") == 1 and "s3cret" not in told
    first, second = tracking.trials("s")
    for trial in (first, second):
        assert trial.status == "FINISHED" and trial.params == {"bits": "48"}
        assert trial.metrics == {"accuracy": 0.5, "loss": 1.5}
        assert tracking.items(trial) == {"by_item": {}}
        assert trial.tags["mlflow.parentRunId"] == search.run_id
    assert first.run_id == early.run_id and tracking.JOURNAL_ID not in first.tags
    assert second.tags[tracking.JOURNAL_ID] == known_as and status(search) == "FINISHED"


def test_stage_ends_and_says_what_is_lost_if_the_store_stays_away(monkeypatch, capsys):
    away = Away(monkeypatch)
    with tracking.stage("search", {}) as search:
        away.off = True
        search.metrics({"finished": 2})
    assert "tracking is still behind: 2 writes are lost" in capsys.readouterr().out


def test_stage_does_not_start_without_its_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:s3cret@127.0.0.1:9")
    with pytest.raises(tracking.Unreachable, match="http://127.0.0.1:9 does not answer") as caught:
        with tracking.stage("search", {}):
            pass
    assert "s3cret" not in str(caught.value)


def test_write_that_is_refused_is_an_error_and_blocks_no_later_one():
    with tracking.stage("search", {}) as run:
        run.params({"bits": "4"})
        with pytest.raises(tracking.StoreError, match="refuses.*bits"):
            run.params({"bits": "8"})
        run.metrics({"accuracy": 0.5})
    assert tracking.run(run.run_id).metrics["accuracy"] == 0.5


def test_damaged_store_says_what_to_do_at_once(tmp_path):
    (tmp_path / "mlflow.db").write_text("garbage " * 100)
    with pytest.raises(tracking.StoreError, match="mlflow.db is no SQLite database; move it away"):
        tracking.reap()


def test_deleted_experiment_says_how_to_restore_it():
    experiment = tracking.experiment_id()
    tracking.client().delete_experiment(experiment)
    with pytest.raises(tracking.StoreError, match=f"experiments restore --experiment-id {experiment}"):
        tracking.experiment_id()


def test_deleted_run_says_how_to_restore_it():
    with tracking.stage("search", {}) as run:
        pass
    tracking.client().delete_run(run.run_id)
    with pytest.raises(tracking.StoreError, match=f"runs restore --run-id {run.run_id}"):
        run.metrics({"accuracy": 0.5})


def failing(times, error):
    """A function that fails so many times before it returns what it is given."""
    left = [error] * times

    def ask(value):
        if left:
            raise left.pop()
        return value

    return store.asking(ask)


def test_command_waits_for_a_store_that_comes_back(monkeypatch, capsys):
    monkeypatch.setenv(store.PATIENCE, "60")
    monkeypatch.setattr(store, "_PAUSE", 0)
    refused = MlflowException("API request failed: Max retries exceeded (too many 503 error responses)")
    assert failing(3, refused)(7) == 7
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and told[1] == "the tracking store answers again"
    assert "does not answer (the server is there, but its database or its object store may not be)" in told[0]
    assert "waiting for it, 60 s at most" in told[0]


def test_command_gives_up_when_its_patience_ends(monkeypatch):
    monkeypatch.setenv(store.PATIENCE, "0.05")
    monkeypatch.setattr(store, "_PAUSE", 0.01)
    with pytest.raises(tracking.Unreachable):
        failing(1000, MlflowException("gone", TEMPORARILY_UNAVAILABLE))(7)


def test_refusal_is_not_waited_for(monkeypatch):
    monkeypatch.setenv(store.PATIENCE, "60")
    with pytest.raises(tracking.StoreError, match="refuses"):
        failing(1000, MlflowException("no such metric", BAD_REQUEST))(7)


def answered(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Client Error of http://bob:s3cret@server/api", response=response)


class EndpointError(Exception):
    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    "error, meant",
    [
        (answered(503), tracking.Unreachable),
        (answered(429), tracking.Unreachable),
        (answered(404), tracking.Missing),
        (answered(403), tracking.StoreError),
        (requests.ConnectionError("refused"), tracking.Unreachable),
        (EndpointError("no endpoint http://bob:s3cret@store"), tracking.Unreachable),
    ],
)
def test_failure_to_keep_a_file_is_told_from_a_store_that_is_away(error, meant):
    with pytest.raises(tracking.StoreError) as caught, store.talking():
        raise error
    assert type(caught.value) is meant and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("address", ["postgresql://bob:s3cret@db/mlflow", "mysql+pymysql://bob:s3cret@db/mlflow"])
def test_database_without_a_server_is_refused_with_what_to_do(monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(tracking.StoreError, match="start an MLflow server over it.*docs/cluster.md") as caught:
        tracking.reap()
    assert "s3cret" not in str(caught.value)


def test_run_that_failed_keeps_no_password(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "pg-s3cret")
    with pytest.raises(RuntimeError), tracking.stage("search", {}) as run:
        raise RuntimeError("cannot reach postgresql://bob:s3cret@db with pg-s3cret")
    kept = tracking.run(run.run_id)
    trace = load_text(f"{kept.artifact_uri}/traceback.txt")
    assert kept.tags["error"] == "RuntimeError: cannot reach postgresql://db with ***"
    assert "RuntimeError: cannot reach postgresql://db with ***" in trace and "s3cret" not in trace


def test_model_may_take_longer_to_arrive_than_a_request(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    with registry._patient_uploads():
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 600
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 7
