"""The loss of responses: only their positions reach the head, and their logits exist a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from pipeline.compress.modules import cap_of, capped, head_of, last_states
from pipeline.data.alpaca import IGNORED, Batch, Example, batches
from pipeline.trial.setting import LOSS_CHUNK

Where = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # a mask, or rows and columns
RowLosses = tuple[tuple[float, int], ...]  # of each row the sum of its losses in nats, and their number


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; a GPU takes it from the CPU's memory without being waited for."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the causal language model that PEFT wrapped, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies of ``hidden @ head.T``, a chunk of positions at a time.

    Logits are capped as the model caps them. The gradients that are wanted are computed along with the loss, so that no
    chunk's logits outlive the chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, cap: float | None
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if any(ctx.needs_input_grad) else None
        heads = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), LOSS_CHUNK):
            here = slice(start, start + LOSS_CHUNK)
            logits = (hidden[here] @ head.T).float()
            slope = None if cap is None else 1 - (logits / cap).tanh_().square_()
            logits = capped(logits, cap).log_softmax(-1)
            at_labels = torch.arange(len(logits), device=logits.device), labels[here]
            total -= logits[at_labels].sum()
            if gradient is not None:
                logits.exp_()
                logits[at_labels] -= 1
                if slope is not None:
                    logits *= slope
                gradient[here] = logits.to(hidden.dtype) @ head
            if heads is not None:
                heads += logits.T @ hidden[here].float()
            del logits, slope  # else they live until the next chunk's exist
        ctx.save_for_backward(gradient, None if heads is None else heads.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        gradient, heads = ctx.saved_tensors
        outer = outer.to(gradient.dtype)
        return gradient * outer, None if heads is None else heads * outer, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of ``hidden @ head.T`` with distributions p, given as targets p' head.

    It is log sum exp(head x) - x' target for each state x, with the gradient softmax(head x)' head - target.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = -(hidden.float() * targets.float()).sum()
        gradient = -targets.to(hidden.dtype) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), LOSS_CHUNK):
            here = slice(start, start + LOSS_CHUNK)
            logits = (hidden[here] @ head.T).float()
            first = logits[:, 0].clone()
            logits = logits.log_softmax(-1)  # two of this size exist at most, as for labels
            total += (first - logits[:, 0]).sum()
            if gradient is not None:
                gradient[here] += logits.exp_().to(hidden.dtype) @ head
            del logits  # else they live until the next chunk's exist
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None


def response_loss(model: nn.Module, part: Batch, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """Return (sum of the next-token losses at labelled positions, their number).

    Args:
        model: A causal language model, plain or wrapped by PEFT.
        part: Tokens and labels, in the CPU's memory: positions that are found there need no wait for a GPU.
        targets: Of each labelled position, row after row, what is wanted in place of its label (``loss_at``).
    """
    labels, device = part.labels[:, 1:], head_of(unwrapped(model)).weight.device
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    wanted = labels[rows, columns] if targets is None else targets
    where = sent(rows, device), sent(columns, device)
    return loss_at(model, sent(part.tokens, device), where, sent(wanted, device), part.told(device)), len(rows)


def blended(model: nn.Module, part: Batch, targets: torch.Tensor, answers_weight: float) -> torch.Tensor:
    """Return targets of which a share is the answers themselves: a token's own row of the head, [n, hidden].

    Args:
        model: As for ``response_loss``.
        part: Labels, in the CPU's memory.
        targets: The teacher's, [n, hidden].
        answers_weight: The answers' share.
    """
    head = head_of(unwrapped(model)).weight.detach()
    targets = sent(targets, head.device)
    if not answers_weight:
        return targets
    labels = part.labels[:, 1:]
    answers = head[sent(labels[labels != IGNORED], head.device)]
    return torch.lerp(targets.to(answers.dtype), answers, answers_weight)


def loss_at(
    model: nn.Module,
    tokens: torch.Tensor,
    where: Where,
    wanted: torch.Tensor,
    told: Mapping[str, object] | None = None,
) -> torch.Tensor:
    """Return the sum of the next-token losses at some positions; ``memory`` traces it on tensors without data.

    Args:
        model: As for ``response_loss``.
        tokens: Token ids, [B, L].
        where: What picks the positions out of [B, L - 1]: a boolean mask, or n rows and n columns.
        wanted: The token after each of them, [n]; or of a distribution p of it p' head, [n, hidden], for a head that is
            not trained; where a model caps its logits, before the cap.
        told: What else the model is told, by its arguments' names.
    """
    hidden, head = _before_head(model, tokens, told or {})
    if wanted.is_floating_point():
        return _ChunkedCrossEntropy.apply(hidden[where], head, wanted)
    return _ChunkedLoss.apply(hidden[where], head, wanted, cap_of(unwrapped(model)))


def head_width(model: nn.Module) -> int:
    """Return the size of the states that the head reads."""
    return head_of(unwrapped(model)).in_features


def _before_head(
    model: nn.Module, tokens: torch.Tensor, told: Mapping[str, object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states that next tokens are predicted from, [B, L - 1, hidden], and the head's weight."""
    causal = unwrapped(model)
    return last_states(causal, tokens, **told)[:, :-1], head_of(causal).weight


@torch.no_grad()
def row_losses(model: PreTrainedModel | PeftModel, examples: Sequence[Example], size: int, padding: int) -> RowLosses:
    """Return of each row the sum of its response tokens' losses, in nats, and their number; shorter rows first."""
    model.eval()
    losses: list[torch.Tensor] = []
    counts: list[int] = []
    for part in batches(examples, size, padding, False):
        hidden, head = _before_head(model, sent(part.tokens, model.device), {})
        for states, labels in zip(hidden, part.labels[:, 1:], strict=True):
            (columns,) = (labels != IGNORED).nonzero(as_tuple=True)
            wanted = sent(labels[columns], head.device)
            chosen = states[sent(columns, head.device)]
            losses.append(_ChunkedLoss.apply(chosen, head, wanted, cap_of(unwrapped(model))))
            counts.append(len(columns))
    values = torch.stack(losses).tolist() if losses else []
    return tuple(zip(values, counts, strict=True))


def mean_loss(rows: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the mean loss of a token and its standard error over the rows, in nats.

    The error is that of a ratio, as rows differ in tokens; of a single row, which tells nothing of it, 0.

    Args:
        rows: Of each row the sum of its losses and their number.
    """
    count = sum(positions for _, positions in rows)
    mean = sum(value for value, _ in rows) / count
    squares = sum((value - mean * positions) ** 2 for value, positions in rows)
    return mean, math.sqrt(squares * len(rows) / max(len(rows) - 1, 1)) / count
