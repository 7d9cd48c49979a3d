"""DVC, with the params that are really used in place of ``params.yaml``: ``python -m pipeline.repro <arguments>``.

DVC compares the values in ``params.yaml`` with those that it noted when a stage last ran. A preset or an override is
no change of that file, so that DVC would rerun nothing and note values that nobody used. Here it reads the document
that the stages will read. The file itself is never written, so nothing needs to be restored after a crash; and a
plain ``dvc repro`` later on compares with the file again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def repro(arguments: Sequence[str]) -> int:
    """Run DVC; return its exit status."""
    # Seconds of imports, before DVC looks after Ctrl-C: it should end them without a traceback.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dvc.cli import main

    from pipeline import overrides

    show(overrides.read(), Path(overrides.DEFAULT).resolve())
    mend_lock(Path(".dvc/tmp"))
    set_cut_record_aside(Path("dvc.lock"))
    signal.signal(signal.SIGINT, before)
    return main(list(arguments))


def show(document: object, file: Path) -> None:
    """Let DVC read a document wherever it would read a file."""
    from dvc.dependency import param

    read = param.load_path

    def load_path(path: str, *arguments: object, **named: object) -> object:
        return document if Path(path).resolve() == file else read(path, *arguments, **named)

    param.load_path = load_path


def mend_lock(folder: Path) -> None:
    """Remove DVC's list of the files that its processes work on, if it was cut off.

    DVC writes it in place, and refuses every command once it was killed while it did. It is read as DVC does, under the
    same guard, so that no other process is writing it now.
    """
    from dvc import rwlock
    from dvc.fs import localfs

    from pipeline.console import note

    file = folder / rwlock.RWLOCK_FILE
    if not file.exists():
        return
    try:
        with rwlock._edit_rwlock(str(folder), localfs, False):
            pass
    except (rwlock.RWLockFileCorruptedError, rwlock.RWLockFileFormatError):
        file.unlink(missing_ok=True)
        note(f"{file} was cut off when DVC was killed; it is removed")


def set_cut_record_aside(file: Path) -> None:
    """Rename DVC's record of its stages if it was cut off, as DVC refuses every command then.

    Without it DVC looks for each stage's results in its cache, by what went in, and writes a new record.
    """
    from pipeline import documents
    from pipeline.console import note

    try:
        record = documents.read(file) if file.exists() else {"stages": {}}
    except documents.DocumentError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("stages"), dict):
        kept = file.replace(file.with_name(f"{file.name}.damaged"))
        note(f"{file} was cut off when DVC was killed; it is kept as {kept}, and stages are looked up in DVC's cache")


if __name__ == "__main__":
    sys.exit(repro(sys.argv[1:]))
