"""What the params ask of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

from pipeline.checks.check import Check, reads
from pipeline.errors import UserError


@reads("device", "dtype")
def _device_is_there(given: SimpleNamespace) -> Iterator[str]:
    if given.device != "cuda":  # torch, which knows, takes seconds to import
        return
    from pipeline import device

    try:
        device.choose(given.device, given.dtype)
    except UserError as error:
        yield str(error)


CHECKS: tuple[Check, ...] = (_device_is_there,)
