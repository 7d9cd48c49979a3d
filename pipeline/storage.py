"""Files and checkpoint folders written whole or not at all, and checked before they are read. Imports nothing heavy.

A checkpoint is a folder closed by ``checksums.json``, which is written last: a folder without it was never finished,
and one that does not match it was changed afterwards.

What is being written has a hidden name of its own beside its place, and is locked by its writer. A writer that was
killed no longer holds the lock: ``clear`` removes what it left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.locks import Lock

CHECKSUMS = "checksums.json"
_CHUNK = 1 << 22
_WRITING = ".writing-"  # between the name of what is written and a random ending
_OLD = ".replaced"  # after the name of a folder while another one takes its place
_NAMES = {int: "whole number", float: "number", str: "text", list: "list", dict: "mapping", bool: "true or false"}


class CheckpointError(UserError):
    """What a stage wrote is missing, unfinished or changed; the message names the stage to run again."""


class DiskError(UserError):
    """A file or folder cannot be written; the message says which and why."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value.update(chunk)
    return value.hexdigest()


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``folder``, checksums added, if the block succeeds.

    Raises:
        DiskError: The disk is full or the place cannot be written.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear(folder.parent)
    with _reserved(folder, tempfile.mkdtemp) as temporary:
        try:
            yield temporary
        except Exception as error:
            if _is_full(error):
                raise DiskError(_cannot_write(folder, "no space left on the device")) from error
            raise
        with disk_errors(folder):
            _close(temporary)
            _replace(temporary, folder)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of text in UTF-8; see ``write_bytes``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file that is either whole or as it was before; when this returns, it is on the disk.

    It is a new file: where DVC links its cache into the folder, the old one must not change.

    Raises:
        DiskError: The disk is full or the place cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _reserved(path, _new_file) as temporary:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)


@contextmanager
def _reserved(place: Path, make: Callable[..., str]) -> Iterator[Path]:
    """Give a new file or folder beside ``place``, locked until the block ends, and remove what is left of it then."""
    while True:
        temporary = Path(make(prefix=f".{place.name}{_WRITING}", dir=place.parent))
        lock = Lock(temporary)
        with suppress(OSError):  # some network file systems lock no folders: what is left there is never cleared
            lock.take(wait=True)
        if temporary.exists():
            break
        lock.release()  # another process cleared it as a leftover before it was locked
    try:
        yield temporary
    finally:
        _remove(temporary)
        lock.release()


def _new_file(prefix: str, dir: Path) -> str:
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=dir)
    os.close(descriptor)
    return name


def _close(temporary: Path) -> None:
    """Write the checksums of a finished folder and make it readable."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sums = {str(path.relative_to(temporary)): sha256(path) for path in files}
    write_text(temporary / CHECKSUMS, json.dumps(sums, indent=1))
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    temporary.chmod(0o755)


def _replace(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place; what was there goes only when it stands."""
    old = folder.with_name(f".{folder.name}{_OLD}")
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


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn what the system says of a write into an error that names the place."""
    try:
        yield
    except OSError as error:
        raise DiskError(_cannot_write(place, error.strerror or str(error))) from error


def _cannot_write(place: Path, reason: str) -> str:
    return (
        f"{place} cannot be written: {reason}. Nothing half-written is left: mend that and run the same command again"
    )


def _is_full(error: Exception) -> bool:
    """Return whether an error says that the disk or a quota is full; safetensors gives the number in its text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error)


def clear(*folders: Path) -> list[Path]:
    """Remove what killed processes left half-written in some folders; return what was removed.

    A folder whose replacement was cut short is put back in its place.
    """
    removed = []
    for folder in folders:
        removed += [path for path in folder.glob(f".*{_WRITING}*") if _remove_if_dead(path)]
        for old in folder.glob(f".*{_OLD}"):
            place = old.with_name(old.name[1:].removesuffix(_OLD))
            if any(folder.glob(f".{place.name}{_WRITING}*")):  # its writer lives
                continue
            if place.exists():
                _remove(old)
                removed.append(old)
            else:
                old.rename(place)
    return removed


def _remove_if_dead(path: Path) -> bool:
    """Remove what nobody writes any more; return whether it was removed."""
    try:
        lock = Lock(path)
    except OSError:
        return False
    try:
        if free := lock.take():
            _remove(path)
        return free
    except OSError:
        return False
    finally:
        lock.release()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path, stage: str, needs: Mapping[str, type] | None = None) -> Any:
    """Return what a stage wrote into a JSON file.

    Args:
        path: The file.
        stage: The stage that writes it, named in the error.
        needs: Key -> type that the mapping, or each mapping of the list, in the file must have; None: not checked.

    Raises:
        CheckpointError: It is missing, was truncated or edited, or lacks what it must have.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {again(stage)}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} was truncated or edited; {again(stage)}") from None
    for place, mapping in _mappings(values) if needs is not None else ():
        check(mapping, needs or {}, f"{path}{place}", stage)
    return values


def read_lines(path: Path, stage: str) -> list[dict[str, Any]]:
    """Return the mappings that a stage wrote into a file, one a line in JSON.

    Raises:
        CheckpointError: It is missing, or was truncated or edited.
    """
    try:
        # Not splitlines: JSON strings may hold other line separators, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {again(stage)}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} was truncated or edited; {again(stage)}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise CheckpointError(f"{path}, line {number}, was truncated or edited; {again(stage)}")
        rows.append(row)
    return rows


def _mappings(values: object) -> Iterator[tuple[str, object]]:
    if isinstance(values, list):
        yield from ((f", entry {index}", entry) for index, entry in enumerate(values, 1))
    else:
        yield "", values


def check(values: object, needs: Mapping[str, type], place: str, stage: str) -> None:
    """Check that a mapping has keys of given types; a float is any finite number.

    Args:
        values: The mapping.
        needs: Key -> type.
        place: Where it stands, for the error.
        stage: The stage that writes it.

    Raises:
        CheckpointError: It has not.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{place}: a mapping of names to values was expected; {again(stage)}")
    if lacking := [key for key in needs if key not in values]:
        raise CheckpointError(f"{place} lacks {', '.join(lacking)}; {again(stage)}")
    for key, kind in needs.items():
        value = values[key]
        if kind is float:
            right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        else:
            right = type(value) is kind
        if not right:
            shown = json.dumps(value)[:60]
            raise CheckpointError(f"{place}: {key} is {shown}, which is no {_NAMES[kind]}; {again(stage)}")


def again(stage: str) -> str:
    """Return what to do where a stage's output is missing or damaged."""
    return f"run it again with: dvc repro --force --single-item {stage}"


def verify(folder: str | Path, stage: str) -> str:
    """Check a checkpoint against its checksums, which must cover every file but hidden ones.

    Args:
        folder: The checkpoint.
        stage: The stage that makes it, named in the error.

    Returns:
        Twelve hex digits that name its content.

    Raises:
        CheckpointError: A file is missing, was truncated, changed or added.
    """
    folder = Path(folder)
    listing = folder / CHECKSUMS
    if not listing.exists():
        raise CheckpointError(f"{folder} is missing or was never finished; {again(stage)}")
    sums = read_json(listing, stage)
    if not isinstance(sums, dict) or not sums:
        raise CheckpointError(f"{listing} lists no file; {again(stage)}")
    for name, expected in sums.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing; {again(stage)}")
        if sha256(path) != expected:
            raise CheckpointError(f"{path} does not match its checksum: it was truncated or edited; {again(stage)}")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in sums and name != CHECKSUMS and not path.name.startswith("."):
            raise CheckpointError(f"{path} is not in {CHECKSUMS}: it was added later; {again(stage)}")
    return sha256(listing)[:12]
