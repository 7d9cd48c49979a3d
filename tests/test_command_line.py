"""What the command line makes of a stage's failure, and of what MLflow and DVC ask of it."""

import shlex

import pytest
import torch
import yaml
from conftest import ROOT
from mlflow.projects import _project_spec

from pipeline import __main__ as command
from pipeline import params, project
from pipeline.stages import shell


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Params of no file, and a process whose environment stays."""
    monkeypatch.setattr(command, "_quiet_environment", lambda: None)
    monkeypatch.setattr(params, "load", lambda: "params")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["2 GiB", "micro_batch_size", "plan"]),
        (ValueError("prune.ratio: too much"), ["prune.ratio: too much"]),
    ],
)
def test_expected_failure_is_one_message_and_no_traceback(error, said, monkeypatch, capsys):
    def fails(name, _):
        raise error

    monkeypatch.setattr(shell, "start", fails)
    assert command.main(["prune"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error in stage prune: ") and "Traceback" not in told
    assert all(part in told for part in said)
    assert ("micro_batch_size" in told) == isinstance(error, torch.OutOfMemoryError)


def test_any_other_failure_shows_where(monkeypatch):
    def fails(name, _):
        raise KeyError("a bug")

    monkeypatch.setattr(shell, "start", fails)
    with pytest.raises(KeyError):
        command.main(["prune"])


@pytest.fixture
def asked(monkeypatch):
    """What the command line was asked for, noted instead of done."""
    noted = []
    for module, name in ((project, "run"), (project, "plan"), (command, "_stage")):
        monkeypatch.setattr(module, name, lambda *given, name=name: noted.append((name, *given)) or 0)
    return noted


def give(line):
    """Give a command of MLproject or dvc.yaml to the command line."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "pipeline"]
    assert command.main(words[3:]) == 0


def test_entry_points_of_mlproject_are_understood_with_their_defaults(asked):
    entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(entries) == {"main", *command.STAGES, *command.PAPER, "plan"}
    found = _project_spec.load_project(ROOT)
    for name in entries:
        give(found.get_entry_point(name).compute_command({}, None))
    wanted = {name: ("run", name, "params.yaml") for name in entries}
    wanted |= {"main": ("run", "search", "params.yaml"), "plan": ("plan", "params.yaml", "24")}
    assert asked == list(wanted.values())


@pytest.mark.parametrize(
    ("entry", "given", "wanted"),
    [
        ("search", {"n_trials": "30"}, ("run", "search", "30")),
        ("main", {"n_trials": "30"}, ("run", "search", "30")),
        ("plan", {"config": "llama-7b", "memory_gib": "40"}, ("plan", "llama-7b", "40")),
    ],
)
def test_what_a_user_gives_an_entry_point_arrives(entry, given, wanted, asked):
    give(_project_spec.load_project(ROOT).get_entry_point(entry).compute_command(given, None))
    assert asked == [wanted]


def test_stages_of_dvc_are_those_of_the_command_line(asked):
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert tuple(found) == command.STAGES
    for one in found.values():
        give(one["cmd"])
    assert asked == [("_stage", name, "params") for name in command.STAGES]
