"""The study's journal as a file: opened without Optuna's lock, read without writing, mended where it is damaged.

A journal has one operation a line, as JSON. Optuna writes a line and waits until it is on the disk. What can go wrong:

* A kill tears the last line. It is cut off: what it told was not announced yet.
* Lines in the middle are damaged (a failing disk, an editor). All whole lines are kept, and the damaged file under
  another name. Operations name studies and trials by their place among the creations, so a creation that is lost is
  put back where the next line about that trial shows that it is missing.
* Optuna's own lock is a symbolic link beside the journal, which a kill leaves pointing at nothing; DVC stumbles over
  it. The study's folder is locked by its process (``study.Study``), so the journal needs no lock.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from pipeline import storage

Operation = dict[str, Any]  # one line, as Optuna writes it
NAME = "journal.log"
_CREATE_STUDY, _CREATE_TRIAL = 0, 4
_NEEDED = {  # by Optuna's numbers of operations: what it reads of each
    _CREATE_STUDY: {"study_name", "directions"},
    2: {"study_id", "user_attr"},
    3: {"study_id", "system_attr"},
    _CREATE_TRIAL: {"study_id", "datetime_start"},
    6: {"trial_id", "state", "values"},
    8: {"trial_id", "user_attr"},
    9: {"trial_id", "system_attr"},
}


class _NoLock:
    """The lock of a journal that one process alone writes."""

    def acquire(self) -> bool:
        """Return True."""
        return True

    def release(self) -> None:
        """Do nothing."""


class _Backend(JournalFileBackend):
    """Optuna's journal in a file; what a full disk cuts short is taken back."""

    def __init__(self, path: Path):
        super().__init__(str(path), lock_obj=_NoLock())
        self._path = path

    def append_logs(self, logs: list[Operation]) -> None:
        """Append operations, all or none of them.

        Raises:
            DiskError: The disk is full or the journal cannot be written.
        """
        size = self._path.stat().st_size
        with storage.disk_errors(self._path):
            try:
                super().append_logs(logs)
            except OSError:
                _truncate(self._path, size)
                raise


def opened(path: Path) -> JournalStorage:
    """Return Optuna's storage of a journal."""
    return JournalStorage(_Backend(path))


@dataclass(frozen=True)
class Mended:
    """What was done to a damaged journal.

    Attributes:
        lines: Damaged lines.
        results: Results of trials in the lines that were kept.
        aside: Where the damaged file is.
    """

    lines: int
    results: int
    aside: Path


def mend(path: Path) -> Mended | None:
    """Make a journal readable: no dangling lock, no torn last line, no damaged line; changes the file.

    Returns:
        What was damaged; None if nothing but a torn last line was.
    """
    for link in path.parent.glob(f"{path.name}.lock*"):  # of versions that let Optuna lock the journal
        link.unlink()
    if not path.exists():
        return None
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        _truncate(path, len(content))
    lines = content.splitlines(keepends=True)
    operations = [_operation(line) for line in lines]
    damaged = operations.count(None)
    if not damaged:
        return None
    aside = _aside(path)
    kept = _complete([operation for operation in operations if operation is not None])
    shutil.copyfile(path, aside)
    storage.write_text(path, "".join(json.dumps(operation, separators=(",", ":")) + "\n" for operation in kept))
    results = sum("result" in operation.get("user_attr", ()) for operation in kept if "trial_id" in operation)
    return Mended(damaged, results, aside)


def damaged(path: Path) -> bool:
    """Return whether a journal has a damaged line; a torn last one does not count."""
    lines = path.read_bytes().splitlines(keepends=True)
    return any(_operation(line) is None for line in lines if line.endswith(b"\n"))


def _truncate(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


def _aside(path: Path) -> Path:
    """Return a new name for a damaged journal, outside the folder that DVC keeps."""
    folder = path.parent
    count = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{count}.log")).exists():
        count += 1
    return aside


def _operation(line: bytes) -> Operation | None:
    """Return a line's operation, or None if it is damaged."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("op_code") not in _NEEDED or "worker_id" not in values:
        return None
    return values if _NEEDED[values["op_code"]] <= values.keys() else None


def _complete(operations: list[Operation]) -> list[Operation]:
    """Return operations with lost creations of trials put back.

    A lost creation of a study cannot be put back, as nothing else names the study: what follows it is left out.
    """
    kept: list[Operation] = []
    studies: set[str] = set()
    trials = current = 0
    for operation in operations:
        current = operation.get("study_id", current)
        if operation["op_code"] == _CREATE_STUDY:
            studies.add(operation["study_name"])
        elif current >= len(studies):
            return kept
        while operation.get("trial_id", -1) >= trials:
            lost = {"op_code": _CREATE_TRIAL, "study_id": current, "datetime_start": None}
            kept.append(lost | {"worker_id": operation["worker_id"]})
            trials += 1
        kept.append(operation)
        trials += operation["op_code"] == _CREATE_TRIAL
    return kept
