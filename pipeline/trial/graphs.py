"""Blocks as CUDA graphs: all kernels of a block are launched at once, in the forward and in the backward pass.

A pruned model has a shape a block, so that compiling would take seconds for each; capturing one takes milliseconds. A
graph has one length of a sequence, so rows are packed to few lengths (``LENGTH``), and blocks are captured again where
a new one comes. Graphs keep what autograd keeps until training ends, which the memory prediction leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from pipeline.trial.loss import unwrapped

LENGTH = 512  # of which a packed sequence is a multiple


class _Block(nn.Module):
    """A decoder block as a function of tensors alone."""

    def __init__(self, layer: nn.Module, longest: int):
        super().__init__()
        self.layer, self.longest = layer, longest

    def forward(
        self, hidden: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        return type(self.layer).forward(
            self.layer,
            hidden,
            position_embeddings=(cosines, sines),
            use_cache=False,
            cu_seq_lens_q=starts,
            max_length_q=self.longest,
        )


@contextmanager
def used(model: PeftModel) -> Iterator[None]:
    """Let a model's blocks run as graphs for a while, wherever gradients are wanted of packed rows."""
    layers = list(cast(nn.ModuleList, unwrapped(model).get_submodule("model.layers")))
    captured: dict[torch.Size, tuple[Any, ...]] = {}

    def run(index: int, hidden: torch.Tensor, **told: Any) -> torch.Tensor:
        layer = layers[index]
        if not torch.is_grad_enabled() or told.get("cu_seq_lens_q") is None:
            return type(layer).forward(layer, hidden, **told)
        given = (hidden, *told["position_embeddings"], told["cu_seq_lens_q"])
        if hidden.shape not in captured:  # in the first block
            captured[hidden.shape] = _graphs(layers, given, told["max_length_q"])
        return captured[hidden.shape][index](*given)

    for index, layer in enumerate(layers):
        layer.forward = partial(run, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _graphs(layers: list[nn.Module], given: tuple[torch.Tensor, ...], longest: int) -> tuple[Any, ...]:
    """Capture all blocks in the order in which they run, so that they may share memory."""
    hidden, *others = (tensor.detach().clone() for tensor in given)
    samples = [(hidden, *others)]  # what the first block reads needs no gradient
    for _ in layers[1:]:
        samples.append((hidden.clone().requires_grad_(True), *others))
    return torch.cuda.make_graphed_callables(tuple(_Block(layer, longest) for layer in layers), tuple(samples))
