"""A journal that was damaged, torn, or left with Optuna's lock."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from test_search import SPACE, STUDY, result, run, settings  # noqa: F401  (a fixture)

from pipeline.identity import Identity
from pipeline.search import journal
from pipeline.search.study import Candidate, Study, read
from pipeline.storage import CheckpointError, DiskError
from tests.fixtures.searches import PROBLEM, at


@pytest.fixture
def finished(tmp_path, settings):  # noqa: F811
    """The folder of a study with four finished trials, and their bits."""
    folder = tmp_path / "study"
    study, _, _ = run(folder, dataclasses.replace(settings, n_trials=4))
    study.record_reference("dense", "abc", result((4,) * 8))
    return folder, [record.result.bits for record in study.finished()]


def lines(folder):
    return (folder / journal.NAME).read_bytes().splitlines(keepends=True)


def write(folder, content):
    (folder / journal.NAME).write_bytes(b"".join(content))


def kept(folder):
    study = Study(folder, STUDY)
    return study, [record.result.bits for record in study.finished()]


def line_of(folder, **wanted):
    """The number of the first line with these values."""
    for number, line in enumerate(lines(folder)):
        values = json.loads(line)
        if all(values.get(key) == value for key, value in wanted.items()):
            return number
    raise AssertionError(wanted)


DAMAGES = {"garbage": b"\x00\xff{garbage\n", "half": b'{"op_code":8,"trial_id":1,"user\n', "other": b'{"op_code":8}\n'}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("trial", range(4))
def test_damaged_line_costs_no_other_trial(finished, trial, damage):
    folder, bits = finished
    content = lines(folder)
    victim = next(n for n, line in enumerate(content) if f'"trial_id":{trial}' in line.decode() and b'"result"' in line)
    content[victim] = damage
    write(folder, content)
    study, now = kept(folder)
    assert now == bits[:trial] + bits[trial + 1 :]
    assert study.mended.lines == 1 and study.mended.results == 3
    assert study.mended.aside == folder.parent / "study.damaged-1.log"
    assert study.mended.aside.read_bytes() == b"".join(content)
    assert [record.name for record in study.references()] == ["dense"]
    assert Study(folder, STUDY).mended is None


@pytest.mark.parametrize("trial", range(4))
def test_lost_creation_of_a_trial_does_not_shift_the_others(finished, trial):
    folder, bits = finished
    content = lines(folder)
    creations = [number for number, line in enumerate(content) if json.loads(line)["op_code"] == 4]
    content[creations[trial]] = b"\x00" * 40 + b"\n"
    write(folder, content)
    assert kept(folder)[1] == bits


def test_hole_of_many_lines_keeps_what_is_around_it(finished):
    folder, bits = finished
    content = lines(folder)
    creations = [number for number, line in enumerate(content) if json.loads(line)["op_code"] == 4]
    hole = slice(creations[1] + 1, creations[2] + 1)  # nearly all of one trial, the start of the next
    content[hole] = [b"\x00" * 4096 + b"\n"]
    write(folder, content)
    assert kept(folder)[1] == [bits[0], bits[2], bits[3]]


def test_lost_creation_of_a_study_mixes_no_studies(finished):
    folder, bits = finished
    Study(folder, Identity("other", "code"))
    content = lines(folder)
    content[line_of(folder, op_code=0)] = b"{}\n"
    write(folder, content)
    study, now = kept(folder)
    assert now == [] and study.mended.results == 0


def test_damaged_second_journal_gets_a_name_of_its_own(finished):
    folder, _ = finished
    for count in (1, 2):
        write(folder, [*lines(folder), b"garbage\n"])
        assert Study(folder, STUDY).mended.aside.name == f"study.damaged-{count}.log"


def test_search_goes_on_in_a_mended_journal(finished, settings):  # noqa: F811
    folder, bits = finished
    content = lines(folder)
    content[len(content) // 2] = b"garbage\n"
    write(folder, content)
    study, _, _ = run(folder, settings)
    assert len(study.finished()) == 7


def test_dangling_lock_of_an_earlier_version_goes(finished):
    folder, bits = finished
    (folder / "journal.log.lock").symlink_to("artifacts/study/journal.log")
    assert kept(folder)[1] == bits
    assert sorted(path.name for path in folder.iterdir()) == [journal.NAME]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.identity import Identity
from pipeline.bits import Vector
from pipeline.search.study import Candidate, Study, options_of
study = Study(Path(sys.argv[1]), Identity("study", "code"))
real = os.fsync
def dies(descriptor):
    real(descriptor)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = dies
study.start(Candidate(Vector(0.2, (4, 8)), "seed"), options_of([0.2], ["0", "1"], [4, 8]))
"""


def test_kill_while_the_journal_is_written_leaves_nothing_beside_it(tmp_path):
    folder = tmp_path / "study"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(folder) == [journal.NAME]


def test_another_process_is_refused_while_one_searches(finished):
    folder, _ = finished
    code = KILLED.replace("real = os.fsync", "sys.exit(0)")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert f"another process searches in {folder}; wait for it to end" in done.stderr


def test_study_is_read_without_taking_or_changing_it(finished):
    folder, bits = finished
    before = (folder / journal.NAME).read_bytes()
    found = read(folder, STUDY.name)
    assert [record.name for record in found.records] == ["trial 1", "trial 2", "trial 3", "trial 4", "dense"]
    assert found.journal == Study(folder, STUDY).journal
    assert (folder / journal.NAME).read_bytes() == before


def test_reading_what_is_not_there_or_damaged_names_the_stage(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(CheckpointError, match="does not hold study other.*--single-item search"):
        read(folder, "other")
    with pytest.raises(CheckpointError, match="journal.log is missing.*--single-item search"):
        read(tmp_path / "nowhere", "study")
    write(folder, [b"garbage\n", *lines(folder)])
    with pytest.raises(CheckpointError, match="journal.log is damaged.*--single-item search"):
        read(folder, STUDY.name)


def test_journals_of_one_study_have_ids_of_their_own(tmp_path):
    first, second = Study(tmp_path / "a", STUDY), Study(tmp_path / "b", STUDY)
    assert first.name == second.name == "study-code" and first.journal != second.journal
    assert Study(tmp_path / "a", STUDY).journal == first.journal


def test_opening_a_study_again_writes_nothing(finished):
    folder, _ = finished
    before = (folder / journal.NAME).read_bytes()
    Study(folder, STUDY)
    assert (folder / journal.NAME).read_bytes() == before


def test_full_disk_is_named_and_leaves_no_half_of_a_line(finished, monkeypatch):
    folder, bits = finished
    study = Study(folder, STUDY)
    before = (folder / journal.NAME).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="journal.log cannot be written: No space left on device"):
        study.start(Candidate(at(*(8,) * 8), "seed"), PROBLEM.options)
    assert (folder / journal.NAME).read_bytes() == before
    monkeypatch.undo()
    assert kept(folder)[1] == bits
