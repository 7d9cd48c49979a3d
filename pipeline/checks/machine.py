"""What the params ask of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace

from pipeline.checks.check import Check, reads
from pipeline.errors import UserError, shown


@reads("device", "dtype")
def _device_is_there(given: SimpleNamespace) -> Iterator[str]:
    if given.device != "cuda":  # torch, which knows, takes seconds to import
        return
    from pipeline import device

    try:
        device.choose(given.device, given.dtype)
    except UserError as error:
        yield str(error)


@reads("search.workers", "search.cluster")
def _workers_have_ray(given: SimpleNamespace) -> Iterator[str]:
    workers, cluster = given.search.workers, given.search.cluster
    if cluster is not None and workers == 1:
        yield (
            f"search.cluster: {shown(cluster)} is named, but workers is 1, which is this process; set workers to auto "
            "or more than 1, or cluster to null"
        )
    elif (cluster is not None or workers not in (1, "auto")) and find_spec("ray") is None:
        yield (
            f"search.workers: {workers} needs Ray, which is not installed; run `make workers`, or set workers to 1 and "
            "cluster to null"
        )


CHECKS: tuple[Check, ...] = (_device_is_there, _workers_have_ray)
