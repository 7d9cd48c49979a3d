"""What compression reads of a model: a linear's weight, the decoder, the head, and the loss of each token."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from pipeline.data.alpaca import IGNORED

_POSITIONS = 1024  # whose logits exist at once
Keep = list[dict[str, torch.Tensor]]  # of each block: structure kind -> indices of those that stay, ascending
Scores = list[dict[str, torch.Tensor]]  # of each block: structure kind -> score of each structure


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return the weight of a linear, named as in ``architecture.linears``: [out, in]."""
    return cast(nn.Linear, model.get_submodule(name)).weight


def head_of(model: nn.Module) -> nn.Linear:
    """Return the linear that predicts tokens from a causal model's last states."""
    return cast(nn.Linear, model.get_submodule("lm_head"))


def cap_of(model: nn.Module) -> float | None:
    """Return the bound that a causal model keeps its logits within; None: it does not."""
    return getattr(model.config, "final_logit_softcapping", None)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return what a head's outputs become where a model keeps its logits below a cap: cap tanh(logits / cap)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def last_states(model: nn.Module, tokens: torch.Tensor, **told: object) -> torch.Tensor:
    """Return the states that a causal model's head reads: [B, L] -> [B, L, hidden]; ``told`` goes to the model."""
    return model.get_submodule("model")(input_ids=tokens, use_cache=False, **told).last_hidden_state


def mean_embedding(model: nn.Module, last: torch.Tensor) -> torch.Tensor:
    """Return what the head's rows, weighted by a model's predictions, add up to: [positions, hidden] in fp32.

    Of a distribution over the next token it is all that a divergence from it needs (``importance``, ``teacher``). Where
    a model caps its logits, it is that of the logits before the cap: with them the same holds, after it nothing short.

    Args:
        model: Its head is read.
        last: The model's last states, [positions, hidden].
    """
    head = head_of(model)
    parts = [head(states).float().softmax(-1).to(last.dtype) @ head.weight for states in last.split(_POSITIONS)]
    return torch.cat(parts).float() if parts else last.float()


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each next token, zero where it is not labelled: [B, T - 1]."""
    # Flat, as the sum over the vocabulary is several times slower on a CPU where that is not the last dimension.
    each = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(len(labels), -1)


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each row's labelled tokens: [B]."""
    return token_losses(logits, labels).sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)
