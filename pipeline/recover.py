"""LoRA recovery on Alpaca (paper section 3.3, appendix B): the loss of the responses, AdamW, linear decay.

A plain training loop, because a trial's cost is mostly this: rows of similar length share a batch, only response
positions reach ``lm_head``, their logits exist a chunk at a time, and no attention mask is needed (padding is on the
right, which causal attention never sees).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.alpaca import IGNORED, Batch, Example, batch, batches
from pipeline.memory import LOSS_CHUNK
from pipeline.params import Recover

_MAX_NORM = 1.0
_BUCKET = 16  # batches whose rows are sorted by length together


class RecoverError(RuntimeError):
    """Training diverged: at which step, and what to change."""


@dataclass(frozen=True)
class Recovered:
    """What a recovery measured.

    Attributes:
        losses: Mean response loss of each step, in nats a token.
        validation_loss: The same on held-out rows, after training.
        tokens: Tokens trained on, padding left out.
    """

    losses: tuple[float, ...]
    validation_loss: float
    tokens: int


class ByteDropout(torch.nn.Module):
    """Dropout from random bytes: an eighth of the random numbers, which on a CPU are a fifth of a training step.

    The probability is rounded to 256ths (0.05 to 13/256).
    """

    def __init__(self, p: float):
        super().__init__()
        self.threshold = round(p * 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero each value with the probability, scale up the others."""
        if not self.training or self.threshold == 0:
            return x
        words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),), dtype=torch.int64, device=x.device)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.threshold
        return x * (kept.to(x.dtype) * (256 / (256 - self.threshold)))


def use_byte_dropout(model: torch.nn.Module, p: float) -> None:
    """Replace the adapters' dropout by ``ByteDropout``; changes the model."""
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = ByteDropout(p)


class _Masters:
    """32-bit copies of low-precision parameters for the optimizer; without them small updates round to nothing."""

    def __init__(self, weights: Sequence[torch.nn.Parameter]):
        self.weights = list(weights)
        self.copies = [
            weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_(True)
            for weight in weights
        ]

    def take_gradients(self) -> None:
        """Move the gradients of the parameters to the copies."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if copy is not weight and weight.grad is not None:
                copy.grad, weight.grad = weight.grad.float(), None

    @torch.no_grad()
    def give_back(self) -> None:
        """Round the copies into the parameters."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if copy is not weight:
                weight.copy_(copy)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies of ``hidden @ head.T``, a chunk of positions at a time.

    The head is frozen, so the gradient of the hidden states is all that backward needs; it is computed along with the
    loss, and no chunk's logits outlive the chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), LOSS_CHUNK):
            here = slice(start, start + LOSS_CHUNK)
            logits = (hidden[here] @ head.T).float()
            wanted = labels[here]
            total += F.cross_entropy(logits, wanted, reduction="sum")
            logits = logits.softmax(-1)
            logits[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            gradient[here] = logits.to(hidden.dtype) @ head
            del logits  # else they live until the next chunk's exist
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None


def response_loss(model: Any, part: Batch) -> tuple[torch.Tensor, int]:
    """Return (sum of the next-token losses at labelled positions, their number).

    Args:
        model: A causal language model, plain or wrapped by PEFT, with a frozen head.
        part: Tokens and labels, on the model's device.
    """
    labels = part.labels[:, 1:]
    chosen = labels != IGNORED
    return loss_at(model, part.tokens, chosen, labels[chosen]), int(chosen.sum())


def loss_at(model: Any, tokens: torch.Tensor, where: Any, wanted: torch.Tensor) -> torch.Tensor:
    """Return the sum of the next-token losses at some positions; ``memory`` traces it on tensors without data.

    Args:
        model: As for ``response_loss``.
        tokens: Token ids, [B, L].
        where: What picks the positions out of [B, L - 1]: a boolean mask, or n rows and n columns.
        wanted: The token after each of them, [n].
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    return _ChunkedLoss.apply(hidden[where], causal.lm_head.weight, wanted)


def run(
    model: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: Recover,
    steps: int,
    padding: int,
    seed: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Recovered:
    """Train the adapters of a model and measure its validation loss; changes the model.

    Args:
        model: Wrapped by PEFT; parameters that require gradients are trained.
        train: Rows to train on.
        validation: Held-out rows.
        settings: Section ``recover`` of the params.
        steps: Optimizer steps; 0 only measures.
        padding: Token id of padded positions.
        seed: Order of the rows and dropout.
        progress: Wraps the steps.

    Raises:
        RecoverError: There are no rows, or the loss is not finite.
    """
    for name, rows_ in (("training", train), ("validation", validation)):
        if not rows_:
            raise RecoverError(
                f"no {name} row is left: the prompt alone fills recover.max_length ({settings.max_length}) in all; "
                "raise recover.max_length or name other rows in data.alpaca"
            )
    losses, tokens = [], 0
    device = model.device
    if steps:
        model.train()
        torch.manual_seed(seed)
        masters = _Masters([parameter for parameter in model.parameters() if parameter.requires_grad])
        optimizer = adamw(masters.copies, settings.learning_rate, device)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.warmup_steps, steps))
        rows = endless(train, settings.batch_size, seed)
        for step in progress(range(steps)):
            chosen = next(rows)
            size = settings.micro_batch_size
            parts = [batch(chosen[i : i + size], padding, False) for i in range(0, len(chosen), size)]
            count = sum(int((part.labels[:, 1:] != IGNORED).sum()) for part in parts)
            total = 0.0
            for part in parts:
                value, _ = response_loss(model, Batch(part.tokens.to(device), part.labels.to(device)))
                (value / count).backward()
                total += value.item() / count
                del value  # its graph holds the inputs of 8-bit linears, also after the backward pass
            if not math.isfinite(total):
                raise RecoverError(
                    f"loss is {total} at step {step}; lower recover.learning_rate ({settings.learning_rate})"
                )
            masters.take_gradients()
            torch.nn.utils.clip_grad_norm_(masters.copies, _MAX_NORM)
            optimizer.step()
            masters.give_back()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            tokens += sum(len(example.tokens) for example in chosen)
    return Recovered(tuple(losses), validation_loss(model, validation, settings.micro_batch_size, padding), tokens)


def adamw(weights: Sequence[torch.Tensor], learning_rate: float, device: torch.device) -> torch.optim.Optimizer:
    """Return the paper's paged AdamW with 32-bit states on CUDA, AdamW elsewhere; no weight decay."""
    if device.type == "cuda":
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW32bit(weights, lr=learning_rate)
    return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)


def _rate(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(steps - warmup, 1)


def endless(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches for ever: rows shuffled each epoch, batches of similar length in random order."""
    order = random.Random(seed)
    while True:
        rows = list(examples)
        order.shuffle(rows)
        found: list[list[Example]] = []
        for start in range(0, len(rows), size * _BUCKET):
            bucket = sorted(rows[start : start + size * _BUCKET], key=lambda example: len(example.tokens))
            found += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        order.shuffle(found)
        yield from found


def validation_loss(model: Any, examples: Sequence[Example], size: int, padding: int) -> float:
    """Return the mean loss of a response token on held-out rows, in nats."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for part in batches(examples, size, padding, False):
            value, positions = response_loss(model, Batch(part.tokens.to(model.device), part.labels.to(model.device)))
            total += value.item()
            count += positions
    return total / count
