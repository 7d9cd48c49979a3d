"""What the entry points ask of DVC, which runs nothing here."""

import json
import tempfile
from types import SimpleNamespace

import pytest
from conftest import ROOT

from pipeline import checks, doctor, overrides, params, paths, project, storage, tracking
from pipeline.stages import report


class Asked:
    """Stands for DVC and the store: what was asked of the one, what the other holds."""

    def __init__(self, tracked, registered):
        self.calls, self.tracked, self.registered = [], tracked, registered

    def dvc(self, *arguments):
        self.calls.append(" ".join(arguments))
        return 0


def overridden(raw):
    for key, value in overrides.active().items():
        section, name = key.split(".")
        raw[section][name] = value
    return raw


@pytest.fixture
def asked(raw_params, tmp_path, monkeypatch):
    """A finished search of four trials, in a folder of its own under git."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    items = ROOT / "data/sample/benchmarks"
    raw_params["data"] |= {"alpaca": f"path:{tmp_path / 'rows.jsonl'}", "benchmarks": f"path:{items}"}
    raw_params["search"]["n_trials"] = 4
    monkeypatch.setattr(checks, "load", lambda path=None: checks.parse(overridden(raw_params)))
    monkeypatch.chdir(tmp_path)
    searched = {"study": "s", "journal": "j", "search_run": "r", "finished": 4}
    storage.write_text(paths.REPORTS / "search.json", json.dumps(searched))
    storage.write_text(paths.REPORTS / "register.json", json.dumps({"model": "models:/m/1", "alias": "a"}))
    made = Asked(tracked=4, registered=True)
    monkeypatch.setattr(project, "dvc", made.dvc)
    monkeypatch.setattr(project, "_tracked", lambda: made.tracked)
    monkeypatch.setattr(tracking, "registered", lambda uri: made.registered)
    for module, name in ((tracking, "reap"), (tracking, "adopt_project_run"), (tracking, "on_termination_interrupt")):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setattr(report, "show", lambda checked: None)
    monkeypatch.setattr(doctor, "summary", lambda compute, default: "a machine")
    monkeypatch.delenv(overrides.OVERRIDES, raising=False)
    return made


WHOLE = ["repro search", "repro report register"]


def test_finished_search_is_asked_for_once(asked):
    assert project.run("search") == 0
    assert asked.calls == WHOLE


def test_trials_that_the_store_lacks_are_written_again(asked):
    asked.tracked = 3
    project.run("search")
    assert asked.calls == [WHOLE[0], "repro --force --single-item search", WHOLE[1]]


def test_model_that_the_registry_lacks_is_registered_again(asked):
    asked.registered = False
    project.run("search")
    assert asked.calls == [*WHOLE, "repro --force --single-item register"]


def test_more_trials_than_are_finished_are_run(asked, monkeypatch):
    monkeypatch.setenv(overrides.OVERRIDES, json.dumps({"search.n_trials": 5}))
    project.run("search")
    assert asked.calls == [WHOLE[0], "repro --force --single-item search", WHOLE[1]]


def test_file_of_a_source_that_changed_is_fetched_again_once(asked, tmp_path):
    project.run("prune")
    (tmp_path / "rows.jsonl").write_text("{ }")
    project.run("prune")
    project.run("prune")
    assert asked.calls == ["repro prune", "repro --force --single-item fetch", "repro prune", "repro prune"]


def test_damaged_memory_of_the_sources_means_fetching_again(asked):
    project.run("prune")
    project._SOURCES.write_text("{")
    project.run("prune")
    assert asked.calls == ["repro prune", "repro --force --single-item fetch", "repro prune"]


def test_paper_commands_only_fetch_through_dvc(asked, monkeypatch):
    launched = []
    monkeypatch.setattr(project, "launch", lambda *arguments: launched.append(arguments) or 0)
    project.run("table")
    assert asked.calls == ["repro fetch"] and launched == [("pipeline", "table")]


def test_copy_without_its_history_is_no_matter(asked, tmp_path):
    (tmp_path / ".git").rmdir()
    project.run("fetch")
    assert asked.calls == ["config --quiet --local core.no_scm true", "repro fetch"]


def test_temporary_copy_says_where_its_results_stay(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path.parent))
    project.run("fetch")
    assert f"Working in a temporary copy, {tmp_path}: artifacts stay there" in capsys.readouterr().out
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    project.run("fetch")
    assert "temporary" not in capsys.readouterr().out


def test_what_the_command_line_changed_is_logged_with_the_projects_run(asked, monkeypatch):
    logged = {}
    monkeypatch.setattr(tracking, "adopt_project_run", lambda: "r")
    monkeypatch.setattr(tracking, "Run", lambda run_id, experiment: SimpleNamespace(params=logged.update))
    monkeypatch.setenv(overrides.OVERRIDES, json.dumps({"search.n_trials": 3}))
    project.run("search")
    assert logged.keys() == {"compute", "search.n_trials"} and logged["search.n_trials"] == 3


def test_trial_to_build_that_the_store_lacks_is_refused_before_anything_runs(asked, monkeypatch):
    monkeypatch.setenv(overrides.OVERRIDES, json.dumps({"build.choose": "0" * 32}))
    monkeypatch.setattr(tracking, "reopen", lambda run_id: None)
    with pytest.raises(params.ParamsError, match="build.choose: no run has the id 0{32}; take a trial's run id"):
        project.run("search")
    assert asked.calls == []
