"""Gram matrices of what linears receive, and whether the text they come from is long enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.checkpoint.experts import routes
from pipeline.data.alpaca import IGNORED, Batch

# With a damping of 0.01 error feedback from one token an input is worse than the nearest codes on other text, from two
# better; with the damping of the default half a token is enough.
TOKENS_PER_INPUT = 2
_TILE = 256  # columns of a Gram matrix computed at a time, from the diagonal on: the other half is the same


def tokens_needed(inputs: int) -> int:
    """Return the calibration tokens that a linear of so many inputs needs."""
    return TOKENS_PER_INPUT * inputs


def enough_tokens(inputs: int, tokens: int) -> bool:
    """Return whether calibration on so many tokens beats the nearest codes on other text."""
    return tokens >= tokens_needed(inputs)


def count_tokens(batches: Sequence[Batch]) -> int:
    """Return the tokens that Gram matrices are computed from, padding left out."""
    return sum(int(_real(part).sum()) for part in batches)


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    sequential: bool = False,
    device: torch.device | None = None,
) -> Iterator[dict[str, torch.Tensor | None]]:
    """Yield, block by block, X^T X / tokens of every linear's inputs X: full name -> [in, in] fp32, in CPU memory.

    Linears with the same inputs (q, k, v; gate, up) share one tensor. An expert's have None where it reads too few of
    the tokens (``enough_tokens``). The computing device holds one block with its
    matrices; the CPU's memory holds the hidden states of all batches between two blocks.

    Args:
        model: The model; where it lies, the embeddings are looked up.
        batches: Calibration text; padding is left out.
        sequential: Compute what reaches the next block after the caller took a block's matrices, with the weights that
            the block then has: put its quantized weights there. Costs a second pass through each block.
        device: Where blocks are computed, each in its turn; None: where the model lies.
    """
    model.eval()
    home = model.device
    there = home if device is None else device
    starts = [_start(model, part) for part in batches]
    states, calls = [state for state, _ in starts], [call for _, call in starts]
    real = [_real(part).to(there) for part in batches]
    total = count_tokens(batches)
    groups = architecture.same_inputs(model.config)
    for number, block in enumerate(architecture.blocks(model)):
        halves: dict[str, torch.Tensor] = {}
        tokens: dict[str, int] = {}
        following = []
        block.to(there)
        for state, call, mask in zip(states, calls, real, strict=True):
            with _inputs(model, block, [group[0] for group in groups]) as seen:
                following.append(_passed(block, state, call[number], there))
            for name, (value, places) in seen.items():
                inputs = value.flatten(0, -2)[(mask.flatten() if places is None else mask.flatten()[places])]
                tokens[name] = tokens.get(name, 0) + len(inputs)
                _add_gram(halves, name, inputs.float())
        whole = {
            name: ((half.triu() + half.triu(1).T) / total).cpu()
            for name, half in halves.items()
            if tokens[name] == total or enough_tokens(len(half), tokens[name])
        }
        yield {architecture.linear_name(number, name): whole.get(group[0]) for group in groups for name in group}
        if sequential:
            following = [_passed(block, state, call[number], there) for state, call in zip(states, calls, strict=True)]
        block.to(home)
        states = following


def _passed(block: nn.Module, state: torch.Tensor, call: Mapping[str, object], device: torch.device) -> torch.Tensor:
    """Return what leaves a block, in the CPU's memory."""
    return block(state.to(device), **{name: _moved(value, device) for name, value in call.items()}).cpu()


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, tuple):
        return tuple(_moved(member, device) for member in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _add_gram(halves: dict[str, torch.Tensor], name: str, inputs: torch.Tensor) -> None:
    """Add X^T X of inputs X, [tokens, in], to the upper half of a matrix."""
    width = inputs.shape[1]
    half = halves.setdefault(name, torch.zeros(width, width, device=inputs.device))
    for start in range(0, width, _TILE):
        here = slice(start, start + _TILE)
        half[here, start:].addmm_(inputs[:, here].T, inputs[:, start:])


def _real(part: Batch) -> torch.Tensor:
    """Return which positions are no padding: [B, L]."""
    real = part.labels != IGNORED
    real[:, 0] = True
    return real


@contextmanager
def _inputs(
    model: PreTrainedModel, block: nn.Module, names: Sequence[str]
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor | None]]]:
    """Collect what some of a block's linears receive: name -> (what, [..., in], of which tokens; None: of all)."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    sent: dict[int, torch.Tensor] = {}  # to each expert
    about, count = architecture.description(model.config).experts, architecture.experts(model.config)

    def route(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sent.update((expert, tokens) for expert, tokens, _ in routes(inputs[1], count))

    def keep(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        expert = architecture.expert_of(model.config, name)
        seen[name] = inputs[0], None if expert is None else sent[expert]

    with ExitStack() as hooks:
        if about is not None:
            hooks.callback(block.get_submodule(about.module).register_forward_pre_hook(route).remove)
        for name in names:
            handle = block.get_submodule(name).register_forward_pre_hook(partial(keep, name))
            hooks.callback(handle.remove)
        yield seen


def _start(model: PreTrainedModel, part: Batch) -> tuple[torch.Tensor, list[Mapping[str, object]]]:
    """Return the hidden states that enter the first block and what else each block is called with."""
    states: list[torch.Tensor] = []
    calls: list[Mapping[str, object]] = []

    def skip(hidden: torch.Tensor, **others: object) -> torch.Tensor:
        states.append(hidden)
        calls.append(others)
        return hidden

    with ExitStack() as mended:
        for block in architecture.blocks(model):
            block.forward = skip
            mended.callback(delattr, block, "forward")
        model.get_submodule("model")(input_ids=part.tokens.to(model.device), use_cache=False)
    return states[0].cpu(), calls
