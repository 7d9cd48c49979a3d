"""Whole or not at all: kills, a full disk, edited files."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.storage import CheckpointError, DiskError

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import storage
with storage.writing(sys.argv[1]) as folder:
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def saved(folder, **files):
    with storage.writing(folder) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_that_was_killed_while_written_is_cleared_at_the_next_start(tmp_path):
    final = saved(tmp_path / "final", weights="old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(final)], check=False)
    assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
    (left,) = storage.clear(tmp_path)
    assert left.name.startswith(".final.writing-") and names(tmp_path) == ["final"]
    assert storage.verify(final, "build") and (final / "weights").read_text() == "old"


def test_next_write_beside_clears_what_a_kill_left(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "final")], check=False)
    saved(tmp_path / "bank", codes="new")
    assert names(tmp_path) == ["bank"]


def test_folder_that_is_being_written_is_not_cleared(tmp_path):
    with storage.writing(tmp_path / "final") as temporary:
        (temporary / "weights").write_text("new")
        clear = "import sys, pathlib; from pipeline import storage; print(storage.clear(pathlib.Path(sys.argv[1])))"
        done = subprocess.run([sys.executable, "-c", clear, str(tmp_path)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]" and storage.clear(tmp_path) == []
    assert names(tmp_path) == ["final"]


def test_folder_whose_replacement_was_cut_short_is_put_back(tmp_path):
    final = saved(tmp_path / "final", weights="old")
    final.rename(tmp_path / ".final.replaced")  # and the process dies here
    storage.clear(tmp_path)
    assert storage.verify(final, "build") and names(tmp_path) == ["final"]


def test_replaced_folder_that_a_kill_left_goes(tmp_path):
    saved(tmp_path / "final", weights="new")
    (tmp_path / ".final.replaced").mkdir()
    storage.clear(tmp_path)
    assert names(tmp_path) == ["final"]


def test_hidden_files_of_others_stay(tmp_path):
    (tmp_path / ".gitignore").write_text("x")
    (tmp_path / ".study.lock").write_text("")
    assert storage.clear(tmp_path) == [] and len(names(tmp_path)) == 2


def test_failed_write_leaves_the_folder_as_it_was(tmp_path):
    final = saved(tmp_path / "final", weights="old")
    with pytest.raises(KeyError), storage.writing(final) as temporary:
        (temporary / "weights").write_text("half")
        raise KeyError
    assert (final / "weights").read_text() == "old" and names(tmp_path) == ["final"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_named_with_the_folder_and_leaves_nothing(tmp_path, error):
    with pytest.raises(DiskError, match="final cannot be written: no space left"), storage.writing(tmp_path / "final"):
        raise error
    assert names(tmp_path) == []


def test_error_of_reading_while_a_folder_is_written_is_not_the_disks(tmp_path):
    with pytest.raises(FileNotFoundError), storage.writing(tmp_path / "final"):
        Path("nowhere").read_text()


def test_file_on_a_full_disk_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    storage.write_text(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="report.json cannot be written: No space left on device"):
        storage.write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["report.json"]


def test_place_that_is_a_file_is_named(tmp_path):
    (tmp_path / "reports").write_text("")
    with pytest.raises(DiskError, match="search.json cannot be written: (Not a directory|File exists)"):
        storage.write_text(tmp_path / "reports" / "search.json", "{}")


NEEDS = {"study": str, "finished": int, "score": float, "units": list}
WHOLE = {"study": "a", "finished": 4, "score": 1, "units": []}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "lacks study, finished, score, units"),
        ("", "truncated or edited"),
        ('{"study": "a", ', "truncated or edited"),
        ("[" * 100_000, "truncated or edited"),
        ("4", "a mapping of names to values was expected"),
        (json.dumps(WHOLE | {"study": 3}), "study is 3, which is no text"),
        (json.dumps(WHOLE | {"finished": True}), "finished is true, which is no whole number"),
        (json.dumps(WHOLE | {"finished": 4.5}), "finished is 4.5, which is no whole number"),
        (json.dumps(WHOLE | {"score": None}), "score is null, which is no number"),
        (json.dumps(WHOLE | {"score": float("nan")}), "score is NaN, which is no number"),
        (json.dumps([WHOLE, {}]), "entry 2 lacks study"),
    ],
)
def test_report_without_what_is_read_of_it_is_named_with_its_stage(tmp_path, text, message):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        storage.read_json(path, "search", NEEDS)
    assert str(path) in str(caught.value)
    assert "dvc repro --force --single-item search" in str(caught.value)


def test_whole_report_is_returned(tmp_path):
    path = tmp_path / "search.json"
    path.write_text(json.dumps(WHOLE))
    assert storage.read_json(path, "search", NEEDS) == WHOLE


@pytest.mark.parametrize("name", ["prune", "importance", "search", "pareto", "build", "evaluate", "register"])
def test_empty_report_of_any_stage_is_refused(tmp_path, monkeypatch, name):
    from pipeline.stages import shell

    monkeypatch.chdir(tmp_path)
    storage.write_text(Path("reports") / f"{name}.json", "[{}]" if name == "pareto" else "{}")
    with pytest.raises(CheckpointError, match=f"reports/{name}.json.* lacks .*--single-item {name}"):
        shell.made(name)


@pytest.mark.parametrize("listing", ["{}", "[]", "null", '""'])
def test_empty_listing_verifies_nothing_and_is_refused(tmp_path, listing):
    folder = saved(tmp_path / "pruned", weights="w")
    (folder / storage.CHECKSUMS).write_text(listing)
    with pytest.raises(CheckpointError, match="checksums.json lists no file; .*--single-item prune"):
        storage.verify(folder, "prune")


def test_file_that_the_listing_does_not_cover_is_refused(tmp_path):
    folder = saved(tmp_path / "pruned", weights="w", config="c")
    listing = json.loads((folder / storage.CHECKSUMS).read_text())
    del listing["weights"]
    (folder / storage.CHECKSUMS).write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match="weights is not in checksums.json: it was added later"):
        storage.verify(folder, "prune")


def test_hidden_file_in_a_checkpoint_is_no_matter(tmp_path):
    folder = saved(tmp_path / "pruned", weights="w")
    (folder / ".DS_Store").write_text("")
    assert len(storage.verify(folder, "prune")) == 12


def test_lines_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a\u2028b"}, {"text": "é"}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert storage.read_lines(file, "fetch") == rows


@pytest.mark.parametrize("harm", [b'{"text": "cut', b"[1]\n", b"3\n", b"[" * 100_000, b"\xff"])
def test_damaged_lines_name_the_stage_that_wrote_them(tmp_path, harm):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "whole"}\n' + harm)
    place = "rows.jsonl" if harm == b"\xff" else "rows.jsonl, line 2,"
    with pytest.raises(CheckpointError, match=f"{place} was truncated or edited; .*--single-item fetch"):
        storage.read_lines(file, "fetch")


def test_missing_lines_name_the_stage_that_writes_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"rows.jsonl is missing; .* fetch"):
        storage.read_lines(tmp_path / "rows.jsonl", "fetch")
