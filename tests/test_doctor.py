"""What the command line tells of a machine before an hour is spent."""

import os
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from conftest import ROOT

from pipeline import doctor, documents
from pipeline.__main__ import main
from pipeline.device import Compute

CPU = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def found():
    return {finding.name: finding for finding in doctor.examine()}


def test_minutes_are_those_of_the_two_machines_that_were_measured():
    assert doctor.minutes(115) == pytest.approx(22.9, abs=0.1)
    assert doctor.minutes(411) == pytest.approx(12.7, abs=0.1)


def test_minutes_are_those_of_the_default_model():
    assert documents.read("presets/default.yaml")["model"]["source"] == doctor.MEASURED_MODEL


def test_speed_is_operations_in_a_second(monkeypatch):
    clock = iter([0.0, 0.25, 0.5, 1.0, 1.0])  # three products in a second
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    assert doctor.gflops(CPU, seconds=1.0) == pytest.approx(3 * 2 * 2048**3 / 1e9)


def test_summary_is_one_line_with_minutes_for_the_default_model_alone(monkeypatch):
    monkeypatch.setattr(doctor, "gflops", lambda compute: 115.4)
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    line = "This machine: cpu, float32, 2 cores, 115 GFLOP/s"
    assert doctor.summary(CPU, default=True) == f"{line}; the default search takes about 23 minutes"
    assert doctor.summary(CPU, default=False) == line


def test_command_reports_everything_and_ends_well_here(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "gflops", lambda compute: 400.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "_missing", lambda: [])
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for name in ("Python", "cores", "memory", "disk", "HOME", "instructions", "GPU", "compute", "make search"):
        assert f" {name}  " in told
    assert "400 GFLOP/s" in told and "about 13 minutes" in told


def test_missing_python_is_one_line_that_says_what_to_install():
    done = subprocess.run(
        ["make", "setup", "PYTHONS=python3.0", "VENV=nowhere"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and len(said) == 1
    assert said[0].startswith("no Python found that can make environments: install one of python3.0")


Version = namedtuple("Version", "major minor micro releaselevel serial")


@pytest.mark.parametrize("minor, fatal", [(10, True), (11, False), (13, False), (14, True)])
def test_python_without_wheels_is_refused(monkeypatch, minor, fatal):
    monkeypatch.setattr(doctor.sys, "version_info", Version(3, minor, 0, "final", 0))
    finding = doctor._python()
    assert finding.fatal is fatal and ("install Python 3.11 to 3.13" in finding.advice) is fatal


@pytest.mark.parametrize(
    "system, machine, fatal, said",
    [
        ("Linux", "x86_64", False, ""),
        ("Linux", "aarch64", False, ""),
        ("Darwin", "arm64", False, "nothing was measured"),
        ("Darwin", "x86_64", True, "use Linux"),
        ("Windows", "AMD64", True, "WSL 2"),
    ],
)
def test_other_systems_are_refused(monkeypatch, system, machine, fatal, said):
    monkeypatch.setattr(doctor.platform, "system", lambda: system)
    monkeypatch.setattr(doctor.platform, "machine", lambda: machine)
    finding = doctor._system()
    assert finding.fatal is fatal and said in finding.advice and bool(finding.advice) == bool(said)


@pytest.mark.parametrize("home", ["", "/dev/null"])
def test_home_that_cannot_be_written_is_named(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    finding = found()["HOME"]
    assert not finding.fatal and finding.value.startswith(home or "not set")
    assert "libraries keep their caches in artifacts/cache" in finding.value


def test_full_disk_is_named(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**29))
    finding = found()["disk"]
    assert finding.fatal and finding.value.startswith("0.5 GiB free here") and "make room for" in finding.advice


def test_incomplete_environment_ends_the_report_before_anything_heavy(monkeypatch, tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# pinned\nnumpy==0.0.1  # another version\nno-such-package==1\npytest>=1\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", requirements)
    findings = found()
    assert list(findings)[-1] == "environment"
    assert findings["environment"].value == "lacks numpy==0.0.1, no-such-package==1"
    assert "make setup" in findings["environment"].advice and "6.1 GB" in findings["environment"].advice


def test_report_needs_no_package(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         "from pipeline.__main__ import main; sys.exit(main(['doctor']))"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-500:]
    assert "FAIL environment" in done.stdout and not done.stderr
