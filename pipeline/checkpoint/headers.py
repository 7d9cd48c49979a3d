"""What a model folder's safetensors files say that they hold: names, types and shapes, without reading a weight.

A file is a length (8 bytes), a header of that length (JSON: name -> type, shape, place) and the tensors' bytes. Large
models are split into several files, and an index names the file of each tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pipeline.console import note
from pipeline.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # what transformers looks for, in this order
DENSE = ("BF16", "F16", "F32", "F64")
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2} | {
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "F8_E8M0": 1,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, as in the format's own reader
_POINTER = b"version https://git-lfs"
_AGAIN = "download it again"


class WeightsError(UserError):
    """A model whose files are damaged, incomplete, or not of the model that its config describes."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        file: The file.
        dtype: Its type, as the format writes it, such as ``BF16``.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


class _Entry(TypedDict):
    """What a header says of a tensor, once ``_span`` has judged it."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def read_json(path: Path) -> dict[str, object]:
    """Return a JSON object out of a model folder.

    Raises:
        WeightsError: The file is missing or holds none.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{path.name} is missing; {_AGAIN}") from None
    except OSError as error:
        raise WeightsError(f"{path.name} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise WeightsError(f"{path.name} is nested too deep to be a model's; {_AGAIN}") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise WeightsError(f"{path.name} is no JSON ({error}); {_AGAIN}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path.name} is no JSON object; {_AGAIN}")
    return values


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load a folder's weights from.

    Raises:
        WeightsError: There are none, or the index is damaged or names files that are not there.
    """
    whole, index = folder / WHOLE, folder / INDEX
    if whole.exists():
        if index.exists():
            note(f"{INDEX} is not used: {WHOLE} beside it is read as a whole")
        return [whole]
    if not index.exists():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise WeightsError(
            f"the weights are in {', '.join(others[:3])}, and no {INDEX} names them; rename a single file to {WHOLE}, "
            "or add the index"
        )
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise WeightsError(f"{INDEX} has no weight_map of tensor names to file names; {_AGAIN}")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{INDEX} names {name!r}, which is no safetensors file of its folder; {_AGAIN}")
    if lost := [name for name in names if not (folder / name).exists()]:
        raise WeightsError(f"{', '.join(lost)} is missing, which {INDEX} names; complete the folder")
    return [folder / name for name in names]


def tensors(files: list[Path]) -> dict[str, Tensor]:
    """Return what the files hold, by the tensors' names.

    Raises:
        WeightsError: A file is damaged, or two of them hold the same tensor.
    """
    held: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in held:
                raise WeightsError(f"{file.name} and {held[name].file.name} both hold {name}; {_AGAIN}")
            held[name] = tensor
    return held


def _header(file: Path) -> dict[str, Tensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start and _POINTER.startswith(start):
                raise WeightsError(f"{file.name} is a Git LFS pointer, not the weights; run: git lfs pull")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise WeightsError(f"{file.name} is cut off or no safetensors file ({size:,} bytes); {_AGAIN}")
            values = json.loads(stream.read(length))
    except OSError as error:
        raise WeightsError(f"{file.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise WeightsError(f"{file.name} has a header that is no JSON; {_AGAIN}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{file.name} has a header that is no JSON object; {_AGAIN}")
    values.pop("__metadata__", None)
    if not values:
        raise WeightsError(f"{file.name} holds no tensor; {_AGAIN}")
    spans = sorted((*_span(file, name, value), name) for name, value in values.items())
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            raise WeightsError(f"{file.name}: the bytes of {name} overlap others or leave a gap; {_AGAIN}")
        expected = end
    if expected != size - 8 - length:
        raise WeightsError(
            f"{file.name} is cut off or damaged: its header tells of {expected:,} bytes of weights, and "
            f"{size - 8 - length:,} are there; {_AGAIN}"
        )
    return {name: Tensor(file, value["dtype"], tuple(value["shape"])) for name, value in values.items()}


def _span(file: Path, name: str, value: _Entry) -> tuple[int, int]:
    """Return (begin, end) of a tensor's bytes, if type, shape and place agree."""
    try:
        width, shape, (begin, end) = _BYTES[value["dtype"]], value["shape"], value["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        if whole and end - begin == math.prod(shape) * width:
            return begin, end
    except (KeyError, TypeError, ValueError):
        pass
    raise WeightsError(f"{file.name}: type, shape and bytes of {name} do not agree; {_AGAIN}")
