"""What a result was made from: the digest of its data, the commit of its code. Knows nothing of MLflow."""

from __future__ import annotations

import hashlib
import subprocess
from contextlib import suppress
from pathlib import Path

from pipeline.tracking.store import root

_CHUNK = 1 << 22


def md5(path: str | Path) -> str:
    """Return the MD5 of a file, or of a folder's files in order of their names (DVC versions data by MD5)."""
    path = Path(path)
    value = hashlib.md5(usedforsecurity=False)
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                value.update(chunk)
    return value.hexdigest()


def git_commit() -> str:
    """Return the commit of the project's root, or an empty string outside git or without it."""
    with suppress(FileNotFoundError):
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root(), capture_output=True, text=True, check=False)
        return done.stdout.strip()
    return ""
