"""Files and checkpoints written whole or not at all, and checked before they are read. Imports nothing heavy.

A checkpoint is a folder closed by ``checksums.json``, which is written last: a folder without it was never finished,
and one that does not match it was changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

CHECKSUMS = "checksums.json"
_CHUNK = 1 << 22


class CheckpointError(UserError):
    """A checkpoint that is missing, unfinished or changed, with the stage to run again."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value.update(chunk)
    return value.hexdigest()


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``folder``, checksums added, if the block succeeds."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        sums = {
            str(path.relative_to(temporary)): sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()
        }
        write_text(temporary / CHECKSUMS, json.dumps(sums, indent=1))
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        temporary.chmod(0o755)
        old = folder.with_name(f".{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file that is either whole or as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, stage: str) -> Any:
    """Return what a stage wrote into a JSON file.

    Raises:
        CheckpointError: It is missing, was truncated or edited.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {_again(stage)}") from None
    except ValueError:
        raise CheckpointError(f"{path} was truncated or edited; {_again(stage)}") from None


def _again(stage: str) -> str:
    return f"run it again with: dvc repro --force --single-item {stage}"


def verify(folder: str | Path, stage: str) -> str:
    """Check a checkpoint against its checksums.

    Args:
        folder: The checkpoint.
        stage: The stage that makes it, named in the error.

    Returns:
        Twelve hex digits that name its content.

    Raises:
        CheckpointError: A file is missing, was truncated or changed.
    """
    folder = Path(folder)
    again = _again(stage)
    listing = folder / CHECKSUMS
    if not listing.exists():
        raise CheckpointError(f"{folder} is missing or was never finished; {again}")
    sums = read_json(listing, stage)
    for name, expected in sums.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing; {again}")
        if sha256(path) != expected:
            raise CheckpointError(f"{path} does not match its checksum: it was truncated or edited; {again}")
    return sha256(listing)[:12]
