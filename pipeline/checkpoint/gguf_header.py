"""Whether a GGUF file is whole: its header followed from field to field, no weight read.

The reader of package ``gguf`` believes what a header says. A count that lies makes it loop for ever, and a file that
was cut off ends in whatever numpy stumbles on.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES

from pipeline.checkpoint.headers import WeightsError

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_TEXT, _ARRAY = 8, 9
_SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}  # type -> (values, bytes) of a block
_MOST = 1 << 24  # entries of a header


def check(file: Path) -> None:
    """Refuse a GGUF file whose header or tensors do not lie within it.

    Raises:
        WeightsError: It is cut off, empty, of another kind, or says what cannot be.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(4)
        if start != b"GGUF":
            raise WeightsError(f"{file.name} is no GGUF file ({size:,} bytes); download it again")
        try:
            needed = _end_of_tensors(stream, size)
        except (struct.error, EOFError):
            raise WeightsError(f"{file.name} is cut off within its header; download it again") from None
        except ValueError as error:
            raise WeightsError(f"{file.name} is damaged: {error}; download it again") from None
    if needed > size:
        raise WeightsError(f"{file.name} is cut off: it has {size:,} of {needed:,} bytes; download it again")


def _end_of_tensors(stream: BinaryIO, size: int) -> int:
    """Return the number of bytes that a file must have for all of its tensors."""
    version, tensors, fields = struct.unpack("<IQQ", stream.read(20))
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3")
    if not 0 < tensors <= _MOST or fields > _MOST:
        raise ValueError(f"its header tells of {tensors:,} tensors and {fields:,} fields")
    alignment = 32
    for _ in range(fields):
        name = _text(stream, size)
        kind = _number(stream, "<I")
        if name == b"general.alignment" and kind == 4:
            alignment = _number(stream, "<I")
            if alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"its alignment is {alignment}, no power of two")
        else:
            _skip(stream, kind, size)
    end = 0
    for _ in range(tensors):
        name = _text(stream, size)
        dimensions = _number(stream, "<I")
        if not 0 < dimensions <= 4:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = [_number(stream, "<Q") for _ in range(dimensions)]
        kind, place = _number(stream, "<I"), _number(stream, "<Q")
        if kind not in _SIZES or not all(shape) or shape[0] % _SIZES[kind][0]:
            raise ValueError(f"{name!r} has type {kind} and shape {shape}, which do not agree")
        values, width = _SIZES[kind]
        end = max(end, place + math.prod(shape) // values * width)
    start = -(-stream.tell() // alignment) * alignment
    return start + end


def _number(stream: BinaryIO, form: str) -> int:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _text(stream: BinaryIO, size: int) -> bytes:
    length = _number(stream, "<Q")
    if length > size - stream.tell():
        raise EOFError
    return stream.read(length)


def _skip(stream: BinaryIO, kind: int, size: int) -> None:
    if kind == _TEXT:
        _text(stream, size)
    elif kind == _ARRAY:
        kind, count = _number(stream, "<I"), _number(stream, "<Q")
        if count > size - stream.tell():  # each entry takes a byte at least
            raise EOFError
        if kind == _TEXT:
            for _ in range(count):
                _text(stream, size)
        else:
            _jump(stream, kind, count, size)
    else:
        _jump(stream, kind, 1, size)


def _jump(stream: BinaryIO, kind: int, count: int, size: int) -> None:
    if kind not in _WIDTHS:
        raise ValueError(f"a field has the unknown type {kind}")
    end = stream.tell() + count * _WIDTHS[kind]
    if end > size:
        raise EOFError
    stream.seek(end)
