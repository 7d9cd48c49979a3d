import json
import math
import os
import platform
import subprocess
import sys

import pytest
import sqlalchemy
from conftest import ROOT

from pipeline import tracking
from pipeline.errors import UserError
from pipeline.tracking import database, processes, queries

pytestmark = pytest.mark.usefixtures("empty_store_here")


def status(run):
    return tracking.run(run.run_id).status


def test_stage_ends_finished_with_its_params_and_dataset_digest(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    with tracking.stage("prune", {"prune.ratio": 0.25}) as run:
        digest = run.dataset(data, "alpaca", "training")
    found = tracking.run(run.run_id)
    assert status(run) == "FINISHED" and found.params["prune.ratio"] == "0.25"
    assert tracking.client().get_run(run.run_id).inputs.dataset_inputs[0].dataset.digest == digest == tracking.md5(data)


def test_failed_stage_keeps_its_cause_and_ends_its_trials():
    with pytest.raises(ValueError), tracking.stage("search", {}) as run:
        child = run.child("trial 0", {"stage": "trial"})
        raise ValueError("ratio too large")
    assert status(run) == "FAILED" and status(child) == "KILLED"
    assert tracking.run(run.run_id).tags["error"] == "ValueError: ratio too large"


def test_interrupted_stage_and_trial_are_killed():
    with pytest.raises(KeyboardInterrupt), tracking.stage("search", {}) as run:
        child = run.child("trial 0", {"stage": "trial"})
        done = run.child("trial 1", {"stage": "trial"})
        done.finish()
        raise KeyboardInterrupt
    assert (status(run), status(child), status(done)) == ("KILLED", "KILLED", "FINISHED")


def test_runs_of_dead_processes_are_reaped_and_others_left():
    code = """
import os
from pipeline import tracking
stage = tracking.stage("search", {})  # kept: a stage that is dropped ends
run = stage.__enter__()
print(run.run_id, flush=True)
os._exit(9)
"""
    root = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, check=False
    )
    dead = done.stdout.split()[-1]
    with tracking.stage("report", {}) as alive:  # a stage that starts reaps
        assert tracking.run(dead).status == "KILLED"
        assert tracking.reap() == [] and status(alive) == "RUNNING"


def test_stages_stand_below_the_project_run(monkeypatch):
    project = tracking.client().create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", project.info.run_id)
    assert tracking.adopt_project_run() == project.info.run_id
    assert "MLFLOW_RUN_ID" not in os.environ
    with tracking.stage("prune", {}) as run:
        child = run.child("trial 0", {"stage": "trial"})
        child.finish()
    assert tracking.run(run.run_id).tags["mlflow.parentRunId"] == project.info.run_id
    assert tracking.run(child.run_id).tags["mlflow.parentRunId"] == run.run_id
    assert run.experiment_id == "0"


def test_trials_are_found_by_study_across_experiments():
    with tracking.stage("search", {}) as run:
        for study in ("a", "a", "b"):
            run.child("trial", {"stage": "trial", "study": study}).finish()
    elsewhere = tracking.client().create_run("0", tags={"study": "a"})
    found = {one.run_id for one in tracking.trials("a")}
    assert len(found) == 3 and elsewhere.info.run_id in found


def test_what_a_trial_measured_item_by_item_is_read_back_and_its_loss_says_what_to_do(tmp_path):
    with tracking.stage("search", {}) as search:
        own = search.child("trial 0", {"stage": "trial", "study": "s"})
        own.json({"by_item": {"piqa": [[1.0, -0.5]]}}, tracking.ITEMS)
        own.finish()
    (found,) = tracking.trials("s")
    assert tracking.items(found) == {"by_item": {"piqa": [[1.0, -0.5]]}}
    (file,) = tmp_path.rglob(tracking.ITEMS)
    file.unlink()
    with pytest.raises(UserError, match=f"run {own.run_id}.*lost its artifact items.json; delete the run"):
        tracking.items(found)


def test_project_that_was_moved_says_so_and_goes_on_where_the_old_path_leads(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(old)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    with tracking.stage("search", {}) as search:
        own = search.child("trial 0", {"stage": "trial", "study": "s"})
        own.json({"by_item": {}}, tracking.ITEMS)
        own.finish()
    old.rename(new)
    monkeypatch.chdir(new)
    (found,) = tracking.trials("s")
    for touched in (lambda: tracking.items(found), lambda: tracking.create("pareto", None, {})):
        with pytest.raises(tracking.StoreError, match=f"was in {old} before.*ln -s {new} {old}"):
            touched()
    old.symlink_to(new)
    assert tracking.items(found) == {"by_item": {}}
    tracking.create("pareto", None, {}).finish()


def test_trial_moves_below_another_search():
    with tracking.stage("search", {}) as first:
        child = first.child("trial", {"study": "a"})
        child.finish()
    with tracking.stage("search", {}) as second:
        tracking.move(child.run_id, second)
    assert tracking.run(child.run_id).tags["mlflow.parentRunId"] == second.run_id


def test_missing_run_cannot_be_reopened():
    assert tracking.reopen("0" * 32) is None


def test_folder_digest_follows_content_not_time(tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "a"
    file.write_text("x")
    before = tracking.md5(tmp_path / "data")
    os.utime(file, (0, 0))
    assert tracking.md5(tmp_path / "data") == before
    file.write_text("y")
    assert tracking.md5(tmp_path / "data") != before


def test_store_is_anchored_at_the_project_root(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "MLproject").write_text("name: x\n")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert tracking.address() == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_trials_read_from_the_database_are_those_that_mlflow_finds():
    parent = tracking.create("search", None, {"stage": "search"})
    for number, study in enumerate(("one", "two", "one", "one")):
        own = parent.child(f"trial {number}", {"stage": "trial", "study": study})
        own.params({"bits": "48" * number, "units": [1, 2]})
        own.metrics({"accuracy": number / 4, "broken": math.nan, "far": math.inf})
        own.series("loss", enumerate([3.0, 2.5, 2.0 + number]))
        own.finish("FAILED" if number == 3 else "FINISHED")
    elsewhere = tracking.client().create_experiment("elsewhere")
    for name in ("kept", "deleted"):
        other = tracking.client().create_run(elsewhere, tags={"stage": "reference", "study": "one"}, run_name=name)
        if name == "deleted":
            tracking.client().delete_run(other.info.run_id)
    ours, theirs = tracking.trials("one"), queries._search_tagged(tracking.experiments(), "study", "one")
    assert [run.name for run in ours] == ["trial 0", "trial 2", "trial 3", "kept"]
    assert sorted(map(_plain, ours)) == sorted(map(_plain, theirs))
    assert ours[1].metrics["loss"] == 4.0 and math.isnan(ours[1].metrics["broken"])
    assert tracking.trials("none") == []


def _plain(run):
    """All that a run says, in a form that compares nan as equal."""
    return repr({name: sorted(v.items()) if isinstance(v, dict) else v for name, v in vars(run).items()})


def test_series_keeps_every_step():
    run = tracking.create("trial", None, {})
    run.series("loss", enumerate([3.0, 2.0, 1.0]))
    history = tracking.client().get_metric_history(run.run_id, "loss")
    assert [(one.step, one.value) for one in sorted(history, key=lambda one: one.step)] == [
        (0, 3.0),
        (1, 2.0),
        (2, 1.0),
    ]


def test_other_tables_than_known_are_read_by_mlflows_search(monkeypatch):
    with tracking.stage("search", {}) as run:
        run.child("trial", {"study": "s"}).finish()
    engine = tracking.client()._tracking_client.store.engine
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("alter table latest_metrics rename column is_nan to is_none"))
    address = tracking.address()
    with pytest.raises(database.OtherTables):
        database.tagged(address, tracking.experiments(), "study", "s")


@pytest.mark.parametrize(
    "changed, dead",
    [
        ({}, True),
        ({"boot": "other", "machine": "other"}, False),
        ({"pid_namespace": "pid:[1]"}, False),
        ({"boot": "other", "pid_namespace": "pid:[1]"}, False),
    ],
)
def test_number_of_a_process_means_something_in_its_own_namespace_alone(changed, dead):
    tags = processes.tags() | {"qpruner.started": "1"}  # a process that died: another one has its number now
    tags |= {f"qpruner.{key}": value for key, value in changed.items()}
    assert processes.dead(tags) == dead
    assert not processes.dead(processes.tags())


def test_machine_that_was_started_again_has_none_of_its_old_processes(monkeypatch):
    here = {"qpruner.boot": "b", "qpruner.pid_namespace": "pid:[4026531836]", "qpruner.machine": "m"}
    monkeypatch.setattr(processes, "_place", lambda: here)
    assert processes.dead(processes.tags() | {"qpruner.boot": "a"})
    assert not processes.dead(processes.tags() | {"qpruner.boot": "a", "qpruner.machine": "n"})


def test_view_of_a_study_is_kept_and_its_runs_are_named(monkeypatch, capsys):
    project = tracking.client().create_run("0", tags={"mlflow.project.entryPoint": "search"})
    monkeypatch.setenv("MLFLOW_RUN_ID", project.info.run_id)
    tracking.adopt_project_run()
    with tracking.stage("search", {}) as run:
        tracking.show_search(run, "abc", "gold_logprob")
    tags = tracking.client().get_experiment(run.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.abc"])
    assert view["orderByKey"] == "metrics.`gold_logprob`" and "params.`bits`" in view["selectedColumns"]
    assert [chart["xaxis"]["key"] for chart in view["compareRunCharts"]] == [
        "peak_memory_gib",
        "inference_memory_bytes",
    ]
    assert {chart["yaxis"]["key"] for chart in view["compareRunCharts"]} == {"gold_logprob"}
    assert tracking.run(run.run_id).name == "search, study abc"
    assert tracking.run(project.info.run_id).name == "mlflow run -e search, study abc"
    assert "viewStateShareKey=abc" in capsys.readouterr().out


def test_run_whose_process_died_before_it_said_who_it_was_is_reaped():
    made = tracking.client().create_run("0", tags={"qpruner.host": platform.node()})
    assert tracking.reap() == [made.info.run_id]


@pytest.mark.parametrize("source", ["{}", "file://{}", "file://{parent}#{name}"])
def test_run_of_an_mlflow_that_died_before_it_started_us_is_reaped(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    here = source.format(tmp_path, parent=tmp_path.parent, name=tmp_path.name)
    waiting = subprocess.Popen([sys.executable, "-c", "input()", "bin/mlflow", "run", "."], stdin=subprocess.PIPE)
    try:
        kind = {"mlflow.source.type": "PROJECT"}
        made = tracking.client().create_run("0", tags=kind | {"mlflow.source.name": here})
        tracking.client().create_run("0", tags=kind | {"mlflow.source.name": "/elsewhere"})
        assert tracking.reap() == []  # that mlflow may be starting it now
    finally:
        waiting.communicate()
    assert tracking.reap() == [made.info.run_id]


@pytest.mark.parametrize(
    "store, expected",
    [
        (
            "sqlite:////somewhere/mlflow.db",
            "mlflow ui --host 127.0.0.1 --backend-store-uri 'sqlite:////somewhere/mlflow",
        ),
        (
            "postgresql://bob:s3cret@db/mlflow",
            'mlflow ui --host 127.0.0.1 --backend-store-uri "$MLFLOW_TRACKING_URI"\n',
        ),
        ("http://bob:s3cret@server:5000/", "http://server:5000/#/experiments/7/runs?"),
    ],
)
def test_what_opens_the_page_holds_no_password(monkeypatch, store, expected):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    told = tracking.ui_command("7", "study", "gold_logprob")
    assert told.startswith(expected) and "s3cret" not in told
    assert "#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=study" in told


def test_page_of_a_server_is_named_and_none_is_started(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:s3cret@server:5000/")
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: pytest.fail("a server was started"))
    assert tracking.serve_ui() == 0
    told = capsys.readouterr().out
    assert "http://server:5000/#/experiments?workflowType=machine_learning" in told and "s3cret" not in told


def test_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert tracking.git_commit() == ""
