"""A store that goes away, refuses or is damaged: nothing is lost, and one message says what to do."""

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient

from pipeline import tracking
from pipeline.tracking import outbox, runs


@pytest.fixture(autouse=True)
def nothing_waits_afterwards(empty_store_here, monkeypatch):
    monkeypatch.setattr(runs, "_outbox", outbox.Outbox())


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
