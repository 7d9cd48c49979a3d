"""Bit vectors as text: the only place that parses, writes or shortens them.

A bit vector holds the bits of each unit, block 0 first. As text it is one character a unit, such as ``4484``; ``16``
alone stands for a dense model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from pipeline.errors import UserError

DENSE = 16
_DENSE_TEXT = "16"
_TEXT = re.compile(r"[48]+")


def is_text(text: str) -> bool:
    """Return whether a text has the form of a quantized bit vector: 4s and 8s alone."""
    return _TEXT.fullmatch(text) is not None


def parse(text: str, units: int) -> tuple[int, ...]:
    """Return the bits of each unit.

    Args:
        text: Such as ``4484``, or ``16`` for a dense model.
        units: How many units the model has.

    Raises:
        UserError: The text does not have one 4 or 8 for each unit.
    """
    if text == _DENSE_TEXT:
        return (DENSE,) * units
    if len(text) != units or not is_text(text):
        raise UserError(f"bits {text!r}: needs {units} digits, 4 or 8, one for each unit (block 0 first)")
    return tuple(int(digit) for digit in text)


def write(bits: Sequence[int]) -> str:
    """Return bits as text; the reverse of ``parse``."""
    return _DENSE_TEXT if set(bits) == {DENSE} else "".join(str(width) for width in bits)


def grouped(text: str, units_a_block: int) -> str:
    """Return a bit text with a space between blocks, such as ``4484 4444``: nothing that reads as one number."""
    if text == _DENSE_TEXT:
        return "dense"
    return " ".join(text[start : start + units_a_block] for start in range(0, len(text), units_a_block))


def summary(text: str) -> str:
    """Return a few words for a bit text: ``all 4``, ``30 of 120 at 8`` or ``16``."""
    if text == _DENSE_TEXT:
        return text
    counts = Counter(text)
    if len(counts) == 1:
        return f"all {text[0]}"
    return f"{counts['8']} of {len(text)} at 8"
