"""Experts as linears of their own, in place of transformers' single tensors of all experts.

Transformers multiplies by [experts, out, in]. bitsandbytes quantizes linears and PEFT adapts linears, so that each
expert is a gated MLP of three here. Its tensors have the names that models are stored under, such as
``mlp.experts.3.up_proj.weight``; transformers puts them together when it loads a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from pipeline.architecture import evenly


class Expert(nn.Module):
    """A gated MLP: down(act(gate x) * up x)."""

    def __init__(self, hidden: int, channels: int, act_fn: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, channels, bias=False)
        self.up_proj = nn.Linear(hidden, channels, bias=False)
        self.down_proj = nn.Linear(channels, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the expert makes of its tokens: [n, hidden] -> [n, hidden]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of a block. One that no token is sent to is not computed, and its adapters get no gradient."""

    def __init__(self, fused: nn.Module):
        """Take sizes and function, not the weights, of transformers' own module."""
        own = cast(Any, fused)
        super().__init__(Expert(own.hidden_dim, own.intermediate_dim, own.act_fn) for _ in range(own.num_experts))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of what the chosen experts make of each token, [T, hidden].

        Args:
            hidden: What the router read, [T, hidden].
            chosen: The experts of each token, [T, k].
            weights: The router's weight of each of them, [T, k].
        """
        total = torch.zeros_like(hidden)
        for index, tokens, places in routes(chosen, len(self)):
            output = self[index](hidden[tokens]) * weights[tokens, places, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        return total


def routes(chosen: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (expert, its tokens, which of a token's choices it is) for each expert that some token chose.

    On tensors without data nobody knows who chose what: there the experts share the tokens evenly.

    Args:
        chosen: The experts of each token, [T, k].
        count: Number of experts.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    sizes = evenly(len(flat), count) if flat.is_meta else torch.bincount(flat, minlength=count).tolist()
    for index, part in enumerate(order.split(sizes)):
        if sizes[index]:
            yield index, part // chosen.shape[1], part % chosen.shape[1]
