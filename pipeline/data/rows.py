"""Files of rows as users have them: JSON lines, a JSON array or Parquet, plain or gzipped; faulty rows left out."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.console import note
from pipeline.errors import UserError

_SHOWN = 20  # faults of one file
_NOTED = 3  # of those that are left out
_FORMS = "one JSON object a line, a JSON array, or Parquet; any of them plain or gzipped"
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet)",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"ARROW1": "an Arrow file",
    b"version https://git-lfs": "a Git LFS pointer (run: git lfs pull)",
}
_MARKS = (  # longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


T = TypeVar("T")


class FetchError(UserError):
    """Something that could not be had: what was asked, why it failed, what to do."""


def read(path: Path, what: str) -> list[object]:
    """Return the rows of a file.

    Args:
        path: The file.
        what: What to call it in messages.

    Raises:
        FetchError: It cannot be read, or holds no rows.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FetchError(f"{what} is a damaged gzip file ({error}); download it again") from None
    except OSError as error:
        raise FetchError(f"{what} cannot be read: {error.strerror or error}; name a file of {_FORMS}") from None
    for start, kind in _OTHERS.items():
        if content.startswith(start):
            raise FetchError(f"{what} is {kind}; convert it to {_FORMS}")
    rows = _parquet(content, what) if content.startswith(_PARQUET) else _json(_decoded(content, what), what)
    if not rows:
        raise FetchError(f"{what} is empty; it needs {_FORMS}")
    return rows


def usable(
    rows: Sequence[T], faults: Sequence[str], what: str, place: str, most: float, numbers: Sequence[int] | None = None
) -> list[T]:
    """Return the rows that have no fault; tell how many were left out and why.

    Args:
        rows: The rows.
        faults: The fault of each; an empty text is none.
        what: What to call their file in messages.
        place: What to call a row: ``row`` or ``item``.
        most: Share of the rows that may be left out.
        numbers: Of each row in its file, where some were left out before; None: from 1 on.

    Raises:
        FetchError: More than that are faulty, or all of them.
    """
    numbered = zip(numbers or range(1, len(rows) + 1), faults, strict=True)
    told = [f"{place} {number}: {fault}" for number, fault in numbered if fault]
    if not told:
        return list(rows)
    if len(told) == len(rows) or len(told) > most * len(rows):
        lines = [f"{what}, {line}" for line in told[:_SHOWN]]
        if len(told) > _SHOWN:
            lines.append(f"... and {len(told) - _SHOWN} more")
        lines.append(
            f"{what}: {len(told)} of {len(rows)} {place}s cannot be used, and data.max_skipped allows a share of "
            f"{most}; mend or remove them, or raise data.max_skipped"
        )
        raise FetchError("\n".join(lines))
    more = f", and {len(told) - _NOTED} more" if len(told) > _NOTED else ""
    note(f"{what}: {len(told)} of {len(rows)} {place}s are left out: {'; '.join(told[:_NOTED])}{more}")
    return [row for row, fault in zip(rows, faults, strict=True) if not fault]


def _decoded(content: bytes, what: str) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise FetchError(
            f"{what} is no {encoding.upper()} text (byte {error.start}); convert it, such as with "
            "iconv -f latin1 -t utf-8"
        ) from None


def _json(text: str, what: str) -> list[object]:
    if text.lstrip().startswith("["):
        return _parsed(text, what)
    # Not splitlines: JSON strings may hold other line separators, such as U+2028.
    lines = enumerate(text.split("\n"), 1)
    return [_parsed(line, f"{what}, line {number}") for number, line in lines if line.strip()]


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise FetchError(f"{what} is nested too deep to be read as JSON; it needs {_FORMS}") from None
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise FetchError(f"{what} cannot be read as JSON: {error}; it needs {_FORMS}") from None


def _parquet(content: bytes, what: str) -> list[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FetchError(f"{what} is a damaged Parquet file ({error}); download it again") from None
