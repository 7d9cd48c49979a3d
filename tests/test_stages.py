import contextlib
import dataclasses
import errno
import json
import math
import shutil
import subprocess
import sys
import types
import weakref

import pytest
import torch
from conftest import ROOT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient

from pipeline import console, device, storage, tracking, workers
from pipeline.identity import Identity
from pipeline.paths import REPORTS
from pipeline.search import pareto, search
from pipeline.search.allocate import Spaces
from pipeline.search.crew import ANSWERS, Answer, Answers
from pipeline.search.study import Study
from pipeline.stages.agreement import TrackingBehind, verified_runs
from pipeline.stages.attempts import Attempts
from pipeline.stages.recorder import Recorder, search_settings
from pipeline.stages.shell import made
from pipeline.stages.work import answers_of, crew
from pipeline.tracking import outbox, runs
from pipeline.trial import trial
from tests.fixtures.searches import PROBLEM, RATIO, SPACES, STUDY, UNITS, result


@pytest.fixture
def settings(default, monkeypatch, empty_store_here):
    monkeypatch.setattr(runs, "_outbox", outbox.Outbox())
    sizes = {"n_trials": 4, "n_random": 1, "references": ("uniform8",)}
    return default.model_copy(update={"search": default.search.model_copy(update=sizes)})


def contexts_of(units):
    """What trials share, as far as the recorder reads it."""
    compute = device.Compute(torch.device("cpu"), torch.float32)
    context = types.SimpleNamespace(units=[None] * units, further=None, compute=compute)
    return types.SimpleNamespace(any=context, folders={RATIO: None}, at=lambda ratio: context)


def searched(folder, settings, monkeypatch, broken=None, run=None):
    """Run a search whose trials are looked up instead of trained."""

    def fake(context, bits, work=None, **_):
        if tuple(bits) == broken:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return result(bits), None

    monkeypatch.setattr(trial, "run", run or fake)
    study = Study(folder, STUDY)
    with tracking.stage("search", {}) as top:
        own = Recorder(top, study, settings, SPACES)
        own.take_up(answers_of(study))
        own.agree()
        with tracking.patient():
            run_trials(own)
    return study, top


def run_trials(own):
    """References and trials in this process, as the stage runs them."""
    contexts, screen = contexts_of(UNITS), console.Search(own.params.search.n_trials)
    with crew(own.params, contexts, own.study, screen) as hands:
        attempts = Attempts(own, hands, screen)
        attempts.references(contexts.any, [RATIO])
        search.run(own.study, search_settings(own.params, UNITS), PROBLEM, attempts)


class Model:
    """Stands for what a trial leaves behind."""


def test_no_model_of_an_earlier_trial_is_left_when_the_next_one_is_measured(tmp_path, settings, monkeypatch):
    left = []

    def fake(context, bits, work=None, **_):
        assert all(one() is None for one in left)
        model = Model()
        left.append(weakref.ref(model))
        return result(bits), model

    monkeypatch.setattr(trial, "run", fake)
    chosen = settings.search.model_copy(update={"references": ("llm_pruner", "uniform8")})
    chosen = settings.model_copy(update={"search": chosen})
    study = Study(tmp_path, STUDY)
    with tracking.stage("search", {}) as run:
        run_trials(Recorder(run, study, chosen, SPACES))
    assert len(left) == 6


def found(status="FINISHED", stage="trial"):
    return [run for run in tracking.trials(STUDY.name) if run.status == status and run.tags["stage"] == stage]


def test_trial_out_of_memory_is_failed_with_its_cause_and_search_goes_on(tmp_path, settings, monkeypatch):
    study, _ = searched(tmp_path, settings, monkeypatch, broken=(4, 8, 4, 8, 4, 4, 4, 4))
    (failed,) = found("FAILED")
    assert failed.tags["error"] == "OutOfMemoryError: tried to allocate 20 GiB"
    assert "accuracy" not in failed.metrics
    assert len(found()) == 4 == len(study.finished())


def test_trial_without_a_number_for_a_score_is_failed_and_search_goes_on(tmp_path, settings, monkeypatch):
    def fake(context, bits, work=None, **_):
        found = result(bits)
        return result(bits, gold_logprob=math.nan) if bits[1] == 8 else found, None

    study, _ = searched(tmp_path, settings, monkeypatch, run=fake)
    (failed, *_) = found("FAILED")
    assert failed.tags["error"].startswith("SearchError: gold_logprob is nan")
    assert len(found()) == 4 == len(study.finished())


class Outage:
    """A store whose calls fail from one to another, counted in calls of ``name`` of MLflow's client."""

    def __init__(self, monkeypatch, name, calls, error):
        self.calls, self.count, self.error = calls, 0, error
        real = getattr(MlflowClient, name)

        def perhaps(*arguments, **named):
            self.count += 1
            if self.count in self.calls:
                raise self.error
            return real(*arguments, **named)

        monkeypatch.setattr(MlflowClient, name, perhaps)
        monkeypatch.setattr(outbox, "_PAUSE", 0)


@pytest.mark.parametrize("error", [ConnectionError("the store is away"), OSError(errno.ENOSPC, "no space")])
def test_outage_of_the_store_holds_up_no_search_and_is_said_once(tmp_path, settings, monkeypatch, capsys, error):
    Outage(monkeypatch, "set_terminated", calls=(2, 3), error=error)  # the first trial's end, and one attempt later
    study, _ = searched(tmp_path, settings, monkeypatch)
    assert len(study.finished()) == 4 == len(found())
    shown = capsys.readouterr().out
    assert shown.count("tracking is behind: ") == 1 == shown.count("tracking has caught up")
    assert ("the store is away" in shown) != ("is full; make room" in shown)
    for record in study.finished():
        assert tracking.run(record.run_id).metrics["accuracy"] == record.result.accuracy


def test_store_that_stays_away_loses_no_trial_and_agrees_at_the_next_start(tmp_path, settings, monkeypatch, capsys):
    outage = Outage(monkeypatch, "set_terminated", range(3, 1000), MlflowException("away", TEMPORARILY_UNAVAILABLE))
    searched(tmp_path, settings, monkeypatch)
    assert "writes are lost" in capsys.readouterr().out
    assert len(Study(tmp_path, STUDY).finished()) == 4 and len(found()) == 1
    outage.calls = ()
    monkeypatch.setattr(runs, "_outbox", outbox.Outbox())  # another process
    study, _ = searched(tmp_path, settings, monkeypatch)
    assert len(study.finished()) == 4 == len(found())
    assert len(verified_runs(study.name, study.journal, study.finished())) == 4


def test_store_that_refuses_to_the_end_stops_the_search_after_all_its_trials(tmp_path, settings, monkeypatch):
    refusal = MlflowException("The run x must be in the 'active' state", INVALID_PARAMETER_VALUE)
    outage = Outage(monkeypatch, "set_terminated", range(3, 1000), refusal)
    with pytest.raises(tracking.StoreError, match="runs restore --run-id x"):
        searched(tmp_path, settings, monkeypatch)
    assert len(Study(tmp_path, STUDY).finished()) == 4
    outage.calls = ()
    monkeypatch.setattr(runs, "_outbox", outbox.Outbox())
    study, _ = searched(tmp_path, settings, monkeypatch)
    assert len(verified_runs(study.name, study.journal, study.finished())) == 4


def test_trial_whose_run_could_not_be_opened_gets_one_later(tmp_path, settings, monkeypatch):
    Outage(monkeypatch, "create_run", (4, 5), MlflowException("no", INVALID_PARAMETER_VALUE))
    study, _ = searched(tmp_path, settings, monkeypatch)
    known = verified_runs(study.name, study.journal, study.finished())
    assert [run.tags["name"] for run in known] == ["trial 1", "trial 2", "trial 3", "trial 4"]
    assert sum(tracking.JOURNAL_ID in run.tags for run in known) == 1


def test_trials_run_shows_what_compares_it_with_others(tmp_path, settings, monkeypatch):
    searched(tmp_path, settings, monkeypatch)
    (run,) = [run for run in found() if run.tags["bits"] == "48484444"]
    assert run.params == {
        "bits": "4 8 4 8 4 4 4 4", "method": "qpruner2", "granularity": "block", "ratio": "0.2", "share_raised": "0.25",
    }  # fmt: skip
    assert run.tags["name"] == "trial 2" and run.name.startswith("trial 2: response")


def test_average_bits_of_a_run_weigh_units_by_their_size(tmp_path, settings, monkeypatch):
    sized = Spaces({RATIO: dataclasses.replace(SPACES.at[RATIO], sizes=(1, 7, *[4] * 6))}, {})
    monkeypatch.setattr(sys.modules[__name__], "SPACES", sized)
    searched(tmp_path, settings, monkeypatch)
    (run,) = [run for run in found() if run.tags["bits"] == "48484444"]
    assert float(run.params["average_bits"]) == 4 + 4 * (7 + 4) / 32


def test_runs_of_another_journal_on_the_same_server_are_not_this_searchs(tmp_path, settings, monkeypatch):
    first, _ = searched(tmp_path / "a", settings, monkeypatch)
    second, _ = searched(tmp_path / "b", settings, monkeypatch)
    assert first.name == second.name and len(found()) == 8
    for study in (first, second):
        runs = verified_runs(study.name, study.journal, study.finished())
        assert [run.run_id for run in runs] == [record.run_id for record in study.finished()]


def test_runs_that_a_copy_of_the_journal_added_are_left_out_and_told(tmp_path, settings, monkeypatch, capsys):
    study, _ = searched(tmp_path / "a", settings, monkeypatch)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    more = settings.model_copy(update={"search": settings.search.model_copy(update={"n_trials": 6})})
    searched(tmp_path / "b", more, monkeypatch)
    records = [*study.finished(), *study.references()]
    assert len(verified_runs(study.name, study.journal, records)) == 5
    assert "2 runs of study study-code are not in this folder's journal" in capsys.readouterr().out


def test_missing_run_is_named_with_what_writes_it_again(tmp_path, settings, monkeypatch):
    study, _ = searched(tmp_path, settings, monkeypatch)
    tracking.client().delete_run(study.finished()[1].run_id)
    with pytest.raises(TrackingBehind, match="no finished run of trial 2, .*mlflow run . -e search"):
        verified_runs(study.name, study.journal, study.finished())


def test_run_that_was_edited_is_named_with_the_figure(tmp_path, settings, monkeypatch):
    study, _ = searched(tmp_path, settings, monkeypatch)
    victim = study.finished()[1]
    tracking.client().log_metric(victim.run_id, "accuracy", 0.99)
    with pytest.raises(TrackingBehind, match="trial 2.* what the journal says: accuracy 0.99, journal 0.06"):
        verified_runs(study.name, study.journal, study.finished())


def test_trials_of_earlier_code_are_named_and_not_used(tmp_path, settings, monkeypatch, capsys):
    searched(tmp_path, settings, monkeypatch)
    edited = Study(tmp_path, Identity(STUDY.settings, "edited"))
    Recorder(None, edited, settings).announce()
    assert edited.finished() == []
    shown = capsys.readouterr().out
    assert (
        f"4 trials of an earlier version of the code are kept in {tmp_path / 'journal.log'}; they are not used" in shown
    )
    other = Study(tmp_path, Identity("other settings", "code"))
    Recorder(None, other, settings).announce()
    assert capsys.readouterr().out == ""


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
    results = [one.result for one in study.finished()]
    points = [(one.score(study.objective)[0], one.peak_memory_bytes) for one in results]
    expected = [pareto.hypervolume(points[:n], points[0][0], points[0][1] + SPACES.reach) / 2**30 for n in (1, 2, 3, 4)]
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
    before = {(run.tags["bits"], run.metrics["accuracy"]) for run in found()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    searched(tmp_path, settings, monkeypatch)
    assert {(run.tags["bits"], run.metrics["accuracy"]) for run in found()} == before
    searched(tmp_path, settings, monkeypatch)
    assert len(found()) == 4


def test_reference_is_measured_once_and_stands_outside_the_trials(tmp_path, settings, monkeypatch):
    searched(tmp_path, settings, monkeypatch)
    searched(tmp_path, settings, monkeypatch)
    (reference,) = found(stage="reference")
    assert reference.tags["bits"] == "8" * UNITS


# --- several workers ---------------------------------------------------------------------------------------------


class Side:
    """Two workers without Ray: the task that was handed out last is answered first."""

    size = 2

    def __init__(self, answers):
        self.answers, self.tasks, self.dies = answers, [], False

    def submit(self, task):
        self.tasks.append(task)

    def wait(self):
        task = self.tasks.pop()
        self.answers.write(task, result(task.vector.bits))
        if self.dies and task.name == "trial 3":
            raise KeyboardInterrupt
        return Answer(task.name, result(task.vector.bits), "worker 2", "a host")


@pytest.fixture
def side_by_side(settings, monkeypatch):
    pools = []

    @contextlib.contextmanager
    def started(count, prepare, cluster, gpus):
        assert (count, cluster, gpus) == (2, None, False)
        answers, mark = prepare.args[2:4]
        assert answers.marked(mark)
        pools.append(Side(answers))
        pools[-1].dies = len(pools) == 1 and dies
        yield pools[-1]

    monkeypatch.setattr(workers, "started", started)
    dies = False

    def searched_by_two(folder, interrupted=False):
        nonlocal dies
        dies = interrupted
        two = settings.model_copy(update={"search": settings.search.model_copy(update={"workers": 2})})
        return searched(folder, two, monkeypatch)

    return searched_by_two


def test_trials_of_workers_have_the_same_runs_and_name_who_computed_them(tmp_path, side_by_side):
    study, top = side_by_side(tmp_path)
    trials, (reference,) = found(), found(stage="reference")
    assert len(trials) == 4 == len(study.finished()) and reference.tags["bits"] == "8" * UNITS
    for run in [*trials, reference]:
        assert (run.tags["worker"], run.tags["worker_host"]) == ("worker 2", "a host")
        assert run.tags["mlflow.parentRunId"] == top.run_id
    assert len(verified_runs(study.name, study.journal, [*study.finished(), *study.references()])) == 5
    assert not (tmp_path / ANSWERS).exists()


def test_what_workers_wrote_before_an_interruption_is_taken_up_by_the_next_search(tmp_path, side_by_side, capsys):
    with pytest.raises(KeyboardInterrupt):
        side_by_side(tmp_path, interrupted=True)
    before = Study(tmp_path, STUDY)
    killed = {run.tags["name"]: run.run_id for run in found("KILLED")}
    written = set(Answers(tmp_path, before.name).read())
    assert "trial 3" in written and "trial 3" not in {record.name for record in before.finished()}
    study, _ = side_by_side(tmp_path)
    assert "taken up: trial 3, which workers had finished" in capsys.readouterr().out
    (third,) = [record for record in study.finished() if record.name == "trial 3"]
    assert third.run_id == killed["trial 3"] and third.run_id in {run.run_id for run in found()}
    vectors = [record.result.vector for record in study.finished()]
    assert len(vectors) == 4 == len(set(vectors)) == len(found())
    assert not (tmp_path / ANSWERS).exists()


def test_stages_that_load_no_model_do_not_import_torch():
    code = "import sys; from pipeline.stages import pareto, report, register; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "False"


def test_version_without_the_alias_is_a_report_that_others_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {"model": "models:/qpruner/2", "alias": None, "reason": "another version is better"}
    storage.write_text(REPORTS / "register.json", json.dumps(kept))
    assert made("register") == kept
    storage.write_text(REPORTS / "register.json", json.dumps({"alias": "champion"}))
    with pytest.raises(storage.CheckpointError, match="register.json"):
        made("register")
