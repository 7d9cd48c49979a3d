"""The ways in which a GPU recovers a model faster: which there are, and how a model takes them for a while.

An H100 spends three quarters of a plain step waiting for kernels to be launched, and much of the rest on what autograd
keeps. None of that is so on a CPU, which takes the plain path; the plain path is also the reference of the tests. The
ways do not depend on each other. No GPU has run them yet, so ``recover.fast`` is off unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel


@dataclass(frozen=True)
class Ways:
    """What a recovery does otherwise than plainly; each computes the same but for rounding.

    Attributes:
        flat: One vector for the optimizer, and losses that are read every few steps (``masters``).
        packed: Rows end to end without padding (``packing``).
        fused: One autograd function for all linears that read the same input (``fused``).
        graphs: Each block as a CUDA graph (``graphs``); on a GPU alone.
    """

    flat: bool = False
    packed: bool = False
    fused: bool = False
    graphs: bool = False


PLAIN = Ways()


def chosen(model: PeftModel, fast: bool, longest: int) -> Ways:
    """Return the ways that a recovery takes: all but graphs on a GPU if they are asked for, else none.

    Args:
        model: Wrapped by PEFT.
        fast: Whether they are asked for.
        longest: Tokens of the longest row.
    """
    if not fast or model.device.type != "cuda":
        return PLAIN
    window = getattr(model.config, "sliding_window", None)
    return Ways(flat=True, packed=packable(model.dtype, window, longest), fused=True)


def packable(dtype: torch.dtype, window: int | None, longest: int) -> bool:
    """Return whether a GPU can attend to packed rows: in 16 bits, and if no row is longer than a sliding window."""
    return dtype in (torch.bfloat16, torch.float16) and (window is None or longest <= window)


@contextmanager
def taken(model: PeftModel, ways: Ways) -> Iterator[None]:
    """Let a model take ways for a while; afterwards it is as it was, but for what was trained."""
    if ways == PLAIN:
        yield
        return
    from pipeline.trial import fused, graphs, packing  # what a CPU does not take it need not load

    with ExitStack() as stack:
        for wanted, way in ((ways.fused, fused.used), (ways.packed, packing.used), (ways.graphs, graphs.used)):
            if wanted:
                stack.enter_context(way(model))
        yield
