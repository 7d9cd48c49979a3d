"""Where a model or data comes from, as the params name it: a hub, a package or a path.

These checks run within pydantic's, which turns their ValueErrors into faults of a key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

from pipeline.errors import shown

FORMS = {
    "hub:": "hub:<org>/<name>@<revision>",
    "package:": "package:<name>==<version>",
    "path:": "path:<file or folder>",
}
_HUB = re.compile(r"hub:\w[\w.-]*/\w[\w.-]*@\w[\w./-]*", re.ASCII)


def expanded(path: str) -> Path:
    """Return a path with ``~`` written out.

    Raises:
        ValueError: It stands for a home folder that is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError("the home folder that ~ stands for is not known; write the whole path") from None


def check(source: str, kinds: tuple[str, ...] = tuple(FORMS), more: str = "") -> str:
    """Return a source, ``~`` written out.

    Args:
        source: Such as ``path:~/models/llama``.
        kinds: The forms that are allowed.
        more: What else is allowed, for the message.

    Raises:
        ValueError: The source has none of these forms, or is a path that does not exist.
    """
    kind, _, place = source.partition(":")
    sound = {"hub": _HUB.fullmatch(source), "package": _is_package(place), "path": place}
    if f"{kind}:" not in kinds or not sound[kind]:
        raise ValueError(f"must be of the form {', '.join(FORMS[kind] for kind in kinds)}{more}")
    if kind != "path":
        return source
    path = expanded(place)
    try:
        there = path.exists()
    except OSError as error:
        raise ValueError(f"the path cannot be read ({error.strerror}); name a file or folder that can") from None
    if not there:
        raise ValueError(f"{shown(str(path))[1:-1]} does not exist; name a file or folder that does")
    return f"path:{path}"


def _is_package(place: str) -> bool:
    """Return whether a text is a name and a version by the packaging standard, with nothing around them."""
    name, _, version = place.partition("==")
    if not place.isascii() or re.search(r"\s", place):
        return False
    try:
        canonicalize_name(name, validate=True)
        Version(version)
    except (InvalidName, InvalidVersion):
        return False
    return True


def must_be(source: str, kind: Callable[[Path], bool], what: str) -> str:
    """Return a source; refuse a path that is not of a kind.

    Raises:
        ValueError: It is not.
    """
    if source.startswith("path:") and not kind(Path(source.removeprefix("path:"))):
        raise ValueError(f"{source.removeprefix('path:')} is no {what}; name one")
    return source
