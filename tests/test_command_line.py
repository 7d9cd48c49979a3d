"""What the command line makes of a stage's failure, and of what MLflow and DVC ask of it."""

import errno
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from mlflow.projects import _project_spec

from pipeline import __main__ as command
from pipeline import checks, documents, overrides, project, tracking
from pipeline.errors import UserError
from pipeline.stages import shell


@pytest.fixture(autouse=True)
def plain(request, monkeypatch):
    """A process whose environment stays, and params of no file except where a test asks for ``real_checks``."""
    monkeypatch.setattr(command, "_quiet_environment", lambda: None)
    if "real_checks" not in request.fixturenames:
        monkeypatch.setattr(checks, "load", lambda path=None: "params")
    for name in (overrides.PRESET, overrides.OVERRIDES):
        monkeypatch.setenv(name, "")  # whatever a command line sets is taken back
    monkeypatch.chdir(ROOT)


@pytest.fixture
def real_checks(monkeypatch):
    """The params are checked as always; an entry point that passes the checks fails before it starts anything."""
    monkeypatch.delattr(project, "lock")


@pytest.mark.parametrize("moment", ["prepare", "parse", "work"])
def test_interrupt_at_any_moment_is_one_line(monkeypatch, capsys, moment):
    def interrupted(*_):
        raise KeyboardInterrupt

    places = {"prepare": (command.runtime, "prepare"), "parse": (command, "_parser"), "work": (command, "_run")}
    monkeypatch.setattr(*places[moment], interrupted)
    assert command.main(["fetch"]) == command.INTERRUPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "interrupted; finished trials and cells are kept, run the same command to go on"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["2 GiB", "micro_batch_size", "plan"]),
        (UserError("prune.ratio: too much"), ["prune.ratio: too much"]),
        (OSError(errno.ENOSPC, "No space left on device", "artifacts/bank"), ["artifacts/bank", "disk is full", "gc"]),
        (PermissionError(errno.EACCES, "Permission denied", "reports"), ["reports", "Permission denied", "owner"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "artifacts/base"), ["artifacts/base", "rename"]),
        (tracking.StoreError("the store does not answer"), ["the store does not answer"]),
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


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a bug"),
        ValueError("shapes do not match"),
        FileNotFoundError(errno.ENOENT, "No such file", "artifacts/x"),
        OSError("no errno"),
    ],
)
def test_any_other_failure_shows_where(error, monkeypatch):
    def fails(name, _):
        raise error

    monkeypatch.setattr(shell, "start", fails)
    with pytest.raises(type(error)):
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
    if words[:2] == ["sh", "pipeline/stage.sh"]:
        words = ["python", "-m", "pipeline", *words[2:]]
    assert words[:3] == ["python", "-m", "pipeline"]
    assert command.main(words[3:]) == 0


def entry_point(name, given):
    """The command of an entry point, as MLflow makes it."""
    return _project_spec.load_project(ROOT).get_entry_point(name).compute_command(given, None)


def test_entry_points_of_mlproject_are_understood_with_their_defaults(asked):
    entries = _project_spec.load_project(ROOT)._entry_points
    assert set(entries) == {"main", *command.STAGES, *command.PAPER, "plan"}
    for name in entries:
        give(entry_point(name, {}))
        assert not os.environ.get(overrides.PRESET) and overrides.active() == {}
    wanted = {name: ("run", name) for name in entries}
    wanted |= {"main": ("run", "search"), "plan": ("plan", "params.yaml", "24")}
    assert asked == list(wanted.values())


@pytest.mark.parametrize(
    ("entry", "given", "changed"),
    [
        ("search", {"n_trials": "30"}, {"search.n_trials": 30}),
        (
            "main",
            {"memory_budget_gib": "1.5", "ratios": "3e-1"},
            {"search.memory_budget_gib": 1.5, "prune.ratios": 0.3},
        ),
        (
            "prune",
            {"set": "prune.ratios=0.3 evaluate.tasks=[boolq, piqa] search.history=null data.alpaca='path:a b'"},
            {
                "prune.ratios": 0.3,
                "evaluate.tasks": ["boolq", "piqa"],
                "search.history": None,
                "data.alpaca": "path:a b",
            },
        ),
        ("table", {"set": "table.ratios=[0.2]"}, {"table.ratios": [0.2]}),
    ],
)
def test_what_a_user_gives_an_entry_point_arrives_typed(entry, given, changed, asked):
    give(entry_point(entry, given))
    assert overrides.active() == changed
    assert asked == [("run", "search" if entry == "main" else entry)]


def test_preset_is_chosen_by_name(asked):
    give(entry_point("search", {"preset": "llama-7b"}))
    assert overrides.path() == overrides.PRESETS / "llama-7b.yaml"
    assert overrides.read()["model"]["source"] == "hub:huggyllama/llama-7b@main"


def test_plan_gets_its_own_arguments(asked):
    give(entry_point("plan", {"config": "llama-7b", "memory_gib": "40"}))
    assert asked == [("plan", "llama-7b", "40")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "prune.ratoi=0.3"], "prune.ratoi: unknown key; did you mean prune.ratios"),
        (["--set", "ratio=0.3"], "ratio: unknown key; did you mean ablation.ratio"),
        (["--set", "prune=0.3"], "prune: is a section; name a key in it, such as prune.ratio"),
        (["--set", "0.3"], "set: '0.3' is not of the form key=value"),
        (["--set", "seed=1 seed=2"], "set: seed stands there twice"),
        (["--set", "prune.ratios=[0.3"], "prune.ratios: '[0.3' is no YAML value (line 1"),
        (["--set", "prune.ratios=0.3", "--ratios", "0.4"], "prune.ratios: set twice, by set and by ratios"),
        (["--preset", "llama"], "preset: 'llama' is no preset; there are default, gemma-3-1b, gemma-3-270m, llama-13b"),
        (["--preset", "../params"], "preset: '../params' is no preset"),
    ],
)
def test_override_that_means_nothing_is_refused_before_anything_runs(arguments, said, real_checks, capsys):
    assert command.main(["run", "search", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_faults_of_the_command_line_and_of_the_file_are_told_in_one_list(tmp_path, real_checks, monkeypatch, capsys):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("steps: 4 ", "steps: many "))
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    text = "prune.rato=0.3 seed=1 seed=2 evaluate.tasks=[pika] build.steps=[1 prune.ratios=0.3 recover.dropout=7"
    assert command.main(["run", "search", "--set", text, "--ratios", "0.4"]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"error: params.yaml has {len(lines)} faults:"
    wanted = ["prune.rato", "set", "evaluate.tasks", "build.steps", "prune.ratios", "recover.dropout", "recover.steps"]
    assert sorted(line.strip().partition(":")[0].partition(".0")[0] for line in lines) == sorted(wanted)


def test_preset_that_is_none_hides_no_other_fault(real_checks, capsys):
    assert command.main(["check", "--preset", "llama", "--set", "prune.rato=1 seed=[1"]) == 2
    told = capsys.readouterr().err
    assert all(part in told for part in ("'llama' is no preset", "prune.rato: unknown key", "seed: '[1' is no YAML"))


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "", "\u00b2", "9" * 5000, "1" + "0" * 30])
def test_number_of_trials_that_is_none_is_refused_before_anything_runs(value, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(overrides.OVERRIDES, "")
    assert command.main(["run", "search", "--n-trials", value]) == 2
    first, line = capsys.readouterr().err.splitlines()
    assert first == "error: params.yaml has 1 fault:"
    assert line.startswith("  search.n_trials: Input should be ") and len(line) < 250


def test_overrides_set_by_hand_must_be_a_json_object(monkeypatch, capsys):
    monkeypatch.setenv(overrides.OVERRIDES, json.dumps([1]))
    with pytest.raises(checks.ParamsError, match="QPRUNER_OVERRIDES: .* is no JSON object"):
        overrides.active()


def test_stages_of_dvc_are_those_of_the_command_line(asked):
    stages = documents.read(ROOT / "dvc.yaml")["stages"]
    assert tuple(stages) == command.STAGES
    for stage in stages.values():
        give(stage["cmd"])
    assert asked == [("_stage", name, "params") for name in command.STAGES]


def test_incomplete_environment_is_one_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         "from pipeline.__main__ import main; sys.exit(main(['check']))"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: package ") and "run: make setup" in done.stderr
    assert len(done.stderr.splitlines()) == 1
