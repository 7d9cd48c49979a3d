import math
import subprocess
import sys
import types
import weakref

import pytest
import torch
from conftest import ROOT
from test_search import PRIORS, SPACE, UNITS, result

from pipeline import tracking
from pipeline.search import pareto, search
from pipeline.search.search import Study
from pipeline.stages import recorder
from pipeline.stages.recorder import Recorder
from pipeline.trial import trial
from pipeline.trial.result import Result


@pytest.fixture
def settings(default, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv(tracking.PARENT, raising=False)
    monkeypatch.chdir(tmp_path)
    sizes = {"n_trials": 4, "n_random": 1, "references": ("uniform8",)}
    return default.model_copy(update={"search": default.search.model_copy(update=sizes)})


def searched(folder, settings, monkeypatch, broken=None, run=None):
    """Run a search whose trials are looked up instead of trained."""

    def fake(context, bits, **_):
        if tuple(bits) == broken:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return result(bits), None

    monkeypatch.setattr(trial, "run", run or fake)
    context = types.SimpleNamespace(units=[None] * UNITS)
    study = Study(folder, "study")
    with tracking.stage("search", {}) as top:
        own = Recorder(top, "study", settings, context)
        own.agree(study)
        own.references(study)
        search.run(study, settings.search, SPACE, PRIORS, 0, own.attempt(study, SPACE))
    return study, top


class Model:
    """Stands for what a trial leaves behind."""


def test_no_model_of_an_earlier_trial_is_left_when_the_next_one_is_measured(tmp_path, settings, monkeypatch):
    left = []

    def fake(context, bits, **_):
        assert all(one() is None for one in left)
        model = Model()
        left.append(weakref.ref(model))
        return result(bits), model

    monkeypatch.setattr(trial, "run", fake)
    chosen = settings.search.model_copy(update={"references": ("llm_pruner", "uniform8")})
    context = types.SimpleNamespace(units=[None] * UNITS)
    study = Study(tmp_path, "study")
    with tracking.stage("search", {}) as run:
        own = Recorder(run, "study", settings.model_copy(update={"search": chosen}), context)
        own.references(study)
        search.run(study, chosen, SPACE, PRIORS, 0, own.attempt(study, SPACE))
    assert len(left) == 6


def found(status="FINISHED", stage="trial"):
    return [run for run in tracking.trials("study") if run.status == status and run.tags["stage"] == stage]


def test_trial_out_of_memory_is_failed_with_its_cause_and_search_goes_on(tmp_path, settings, monkeypatch):
    study, _ = searched(tmp_path, settings, monkeypatch, broken=(4, 8, 4, 8, 4, 4, 4, 4))
    (failed,) = found("FAILED")
    assert failed.tags["error"] == "OutOfMemoryError: tried to allocate 20 GiB"
    assert "accuracy" not in failed.metrics
    assert len(found()) == 4 == len(study.finished())


def test_trial_without_a_number_for_a_score_is_failed_and_search_goes_on(tmp_path, settings, monkeypatch):
    def fake(context, bits, **_):
        found = result(bits)
        return result(bits, gold_logprob=math.nan) if bits[1] == 8 else found, None

    study, _ = searched(tmp_path, settings, monkeypatch, run=fake)
    (failed, *_) = found("FAILED")
    assert failed.tags["error"].startswith("SearchError: gold_logprob is nan")
    assert len(found()) == 4 == len(study.finished())


def test_store_that_fails_while_a_trial_is_logged_loses_no_trial(tmp_path, settings, monkeypatch):
    own, calls = recorder.log_result, []

    def breaks(run, result):
        calls.append(run)
        if len(calls) == 3:
            raise ConnectionError("the store is away")
        own(run, result)

    monkeypatch.setattr(recorder, "log_result", breaks)
    with pytest.raises(ConnectionError):
        searched(tmp_path, settings, monkeypatch)
    assert len(Study(tmp_path, "study").finished()) == 2 and len(found()) == 1
    study, _ = searched(tmp_path, settings, monkeypatch)
    assert len(study.finished()) == 4 == len(found())


def test_a_trials_run_shows_its_losses_step_by_step(tmp_path, settings, monkeypatch):
    searched(tmp_path, settings, monkeypatch)
    run = found()[0]

    def history(key):
        return [(one.step, one.value) for one in tracking.client().get_metric_history(run.run_id, key)]

    assert history("loss") == [(0, 3.5), (1, 3.0)]
    assert history("held_out_loss") == [(1, 2.25), (2, 2.0)]
    assert run.metrics["trained_tokens"] == 640


def test_search_shows_how_its_front_grows_and_a_resumed_one_shows_all_of_it(tmp_path, settings, monkeypatch):
    study, first = searched(tmp_path, settings, monkeypatch)
    results = [Result.from_json(one["result"]) for one in study.finished()]
    points = [(one.score(study.objective)[0], one.peak_memory_bytes) for one in results]
    expected = [pareto.hypervolume(points[:n], points[0][0], points[0][1] + SPACE.reach) / 2**30 for n in (1, 2, 3, 4)]
    assert expected[0] == 0 < expected[-1]

    def curve(run):
        return [(one.step, one.value) for one in tracking.client().get_metric_history(run.run_id, "hypervolume")]

    assert curve(first) == list(enumerate(expected, 1))
    more = settings.model_copy(update={"search": settings.search.model_copy(update={"n_trials": 6})})
    _, second = searched(tmp_path, more, monkeypatch)
    assert curve(second)[:4] == curve(first) and [step for step, _ in curve(second)] == [1, 2, 3, 4, 5, 6]


def test_trial_finished_in_the_study_is_finished_in_mlflow_after_a_kill_in_between(tmp_path, settings, monkeypatch):
    searched(tmp_path, settings, monkeypatch)
    victim = found()[-1].run_id
    tracking.client().set_terminated(victim, "KILLED")  # as reaping does with a run whose end was not written
    _, run = searched(tmp_path, settings, monkeypatch)
    assert len(found()) == 4
    assert {one.tags["mlflow.parentRunId"] for one in found()} == {run.run_id}


def test_lost_store_is_filled_again_from_the_study(tmp_path, settings, monkeypatch):
    searched(tmp_path, settings, monkeypatch)
    before = {(run.params["bits"], run.metrics["accuracy"]) for run in found()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    searched(tmp_path, settings, monkeypatch)
    assert {(run.params["bits"], run.metrics["accuracy"]) for run in found()} == before
    searched(tmp_path, settings, monkeypatch)
    assert len(found()) == 4


def test_reference_is_measured_once_and_stands_outside_the_trials(tmp_path, settings, monkeypatch):
    searched(tmp_path, settings, monkeypatch)
    searched(tmp_path, settings, monkeypatch)
    (reference,) = found(stage="reference")
    assert reference.params["bits"] == "8" * UNITS


def test_stages_that_load_no_model_do_not_import_torch():
    code = "import sys; from pipeline.stages import pareto, report, register; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"
