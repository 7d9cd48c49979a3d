"""Bit vectors as text: the only place that parses, writes or shortens them.

A bit vector holds the bits of each unit, block 0 first. As text it is one character a unit, such as ``4484``: ``4``,
``8``, and ``f`` for 16 bits, which is not quantized. A vector of the search has a pruning ratio, too: ``0.2:4484``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import UserError

Bits = tuple[int, ...]
DENSE = 16
WIDTHS = (4, 8, DENSE)  # that a unit may have
_LETTERS = {4: "4", 8: "8", DENSE: "f"}
_WIDTHS = {letter: width for width, letter in _LETTERS.items()}
_TEXT = re.compile(r"[48f]+")
_VECTOR = re.compile(r"(?:(0(?:\.\d+)?):)?([48f]+)")


class Vector(NamedTuple):
    """What a search decides: the share of the parameters that is pruned, and the bits of each unit."""

    ratio: float
    bits: Bits


def is_text(text: str) -> bool:
    """Return whether a text has the form of a bit vector: the letters of bits alone."""
    return _TEXT.fullmatch(text) is not None


def split(text: str) -> tuple[float | None, str] | None:
    """Return (ratio, bits) of a text such as ``0.2:4484`` or ``4484``, whose ratio is None; None of any other text."""
    parts = _VECTOR.fullmatch(text)
    return parts and (None if parts[1] is None else float(parts[1]), parts[2])


def parse(text: str, units: int) -> Bits:
    """Return the bits of each unit.

    Args:
        text: Such as ``4484``.
        units: How many units the model has.

    Raises:
        UserError: The text does not have one letter for each unit.
    """
    if len(text) != units or not is_text(text):
        raise UserError(f"bits {text!r}: needs {units} letters, 4, 8 or f (16 bits), one a unit (block 0 first)")
    return read(text)


def read(text: str) -> Bits:
    """Return the bits of a text that is one."""
    return tuple(_WIDTHS[letter] for letter in text)


def write(bits: Sequence[int]) -> str:
    """Return bits as text; the reverse of ``parse``."""
    return "".join(_LETTERS[width] for width in bits)


def write_vector(vector: Vector) -> str:
    """Return a vector as text, such as ``0.2:4484``."""
    return f"{vector.ratio:g}:{write(vector.bits)}"


def grouped(text: str, units_a_block: int) -> str:
    """Return a bit text with a space between blocks, such as ``4484 4444``: nothing that reads as one number."""
    return " ".join(text[start : start + units_a_block] for start in range(0, len(text), units_a_block))


def share_raised(text: str) -> float:
    """Return the share of units above 4 bits."""
    return 1 - text.count("4") / len(text)


def summary(text: str) -> str:
    """Return a few words for a bit text: ``all 4``, ``30 of 120 at 8``, ``30 at 8 and 2 at 16 of 120``."""
    counts = Counter(read(text))
    if len(counts) == 1:
        return f"all {next(iter(counts))}"
    raised = [(counts[width], width) for width in WIDTHS[1:] if counts[width]]
    if len(raised) == 1:
        return f"{raised[0][0]} of {len(text)} at {raised[0][1]}"
    return " and ".join(f"{count} at {width}" for count, width in raised) + f" of {len(text)}"
