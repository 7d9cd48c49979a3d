"""DVC reruns what an override changes, and never sees the file changed."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from pipeline import documents, overrides
from tests.end_to_end.project import heed_interrupts

PARAMS = "seed: 42\nprune: # a comment\n  ratios: 0.2\n  noise: 1e-05\n"
STAGES = (
    "stages:\n  prune:\n    cmd: echo done >> out\n    params: [seed, prune.ratios]\n    outs: [out: {persist: true}]\n"
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "dvc.yaml").write_text(STAGES)
    call(tmp_path, "dvc", "init", "--no-scm", "--quiet")
    return tmp_path


def call(folder, module, *arguments, changed="", **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT), overrides.OVERRIDES: changed} | variables
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(folder):
    """How often the stage ran, and the ratio that DVC noted."""
    locked = documents.read(folder / "dvc.lock")["stages"]["prune"]["params"]["params.yaml"]
    return len((folder / "out").read_text().split()), locked["prune.ratios"]


def test_override_reruns_the_stage_once_and_a_plain_repro_takes_the_file_again(folder):
    call(folder, "pipeline.repro", "repro")
    assert state(folder) == (1, 0.2)
    for _ in range(2):
        call(folder, "pipeline.repro", "repro", changed='{"prune.ratios": 0.3}')
        assert state(folder) == (2, 0.3)
    call(folder, "dvc", "repro")
    assert state(folder) == (3, 0.2)
    call(folder, "pipeline.repro", "repro", changed='{"prune.noise": 0.5}')  # which the stage does not read
    assert state(folder) == (3, 0.2)
    assert (folder / "params.yaml").read_text() == PARAMS


def test_preset_stands_for_the_file(folder):
    (folder / "presets").mkdir()
    (folder / "presets/other.yaml").write_text(PARAMS.replace("0.2", "0.4"))
    call(folder, "pipeline.repro", "repro", QPRUNER_PRESET="other")
    assert state(folder) == (1, 0.4)


@pytest.mark.parametrize("named", ["QPRUNER_PYTHON", ".venv", "PATH"])
def test_stage_runs_with_the_projects_own_python(tmp_path, named):
    shown = tmp_path / (".venv/bin" if named == ".venv" else "elsewhere") / "python"
    shown.parent.mkdir(parents=True)
    shown.write_text(f'#!/bin/sh\necho {named} "$@"\n')
    shown.chmod(0o755)
    path = f"{shown.parent}:/usr/bin:/bin" if named == "PATH" else "/usr/bin:/bin"
    environment = {"PATH": path} | ({named: str(shown)} if named == "QPRUNER_PYTHON" else {})
    done = subprocess.run(
        ["sh", ROOT / "pipeline/stage.sh", "prune"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == f"{named} -m pipeline prune\n"


def test_interrupt_while_dvc_is_imported_shows_no_traceback(tmp_path):
    package = tmp_path / "dvc"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.repro", "repro"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=30)
    assert (process.returncode, shown) == (-signal.SIGINT, "")


@pytest.mark.parametrize("cut", ["", '{"write": {', '{"write": 3}'])
def test_dvcs_list_that_was_cut_off_stops_no_command(folder, cut):
    (folder / ".dvc/tmp/rwlock").write_text(cut)
    assert "rwlock was cut off when DVC was killed; it is removed" in call(folder, "pipeline.repro", "repro")
    assert state(folder)[0] == 1


def test_dvcs_list_of_living_processes_stays(folder):
    kept = {"write": {str(folder / "elsewhere"): {"pid": os.getpid(), "cmd": "another"}}, "read": {}}
    (folder / ".dvc/tmp/rwlock").write_text(json.dumps(kept))
    assert "cut off" not in call(folder, "pipeline.repro", "repro")
    assert json.loads((folder / ".dvc/tmp/rwlock").read_text())["write"] == kept["write"]


@pytest.mark.parametrize("cut", ["", "schema: '2.0'\nstag", "schema: '2.0'\nstages:\n  prune:\n    cmd: 'echo"])
def test_dvcs_record_that_was_cut_off_is_set_aside_and_made_again(folder, cut):
    call(folder, "pipeline.repro", "repro")
    whole = documents.read(folder / "dvc.lock")
    (folder / "dvc.lock").write_text(cut)
    said = call(folder, "pipeline.repro", "repro")
    assert "it is kept as dvc.lock.damaged" in said
    assert (folder / "dvc.lock.damaged").read_text() == cut
    assert documents.read(folder / "dvc.lock")["stages"]["prune"]["params"] == whole["stages"]["prune"]["params"]
