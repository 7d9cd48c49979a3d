"""Recovery on Alpaca (paper section 3.3, appendix B): the loss of the responses, AdamW, linear decay.

``lora`` trains the adapters, ``full`` also all that is not quantized. Held-out rows may end it early, and the state of
an interrupted one may be kept and taken up again.

A plain training loop, because a trial's cost is mostly this: rows of similar length share a batch, only response
positions reach ``lm_head``, their logits exist a chunk at a time, and no attention mask is needed (padding is on the
right, which causal attention never sees).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.data.alpaca import IGNORED, Batch, Example, batch, batches, padded
from pipeline.errors import UserError
from pipeline.params import Recover
from pipeline.trial.memory import LOSS_CHUNK

_MAX_NORM = 1.0
_BUCKET = 16  # batches whose rows are sorted by length together


class RecoverError(UserError):
    """Training diverged: at which step, and what to change."""


@dataclass(frozen=True)
class Recovered:
    """What a recovery measured.

    Attributes:
        losses: Mean response loss of each step, in nats a token.
        validation_rows: Of each held-out row the sum of its losses and their number, of the model as it is left.
        validation_losses: Step -> the same after so many steps, where ``validate_every`` asks for it.
        tokens: Tokens trained on, padding left out.
    """

    losses: tuple[float, ...]
    validation_rows: tuple[tuple[float, int], ...]
    validation_losses: dict[int, float]
    tokens: int

    @property
    def validation_loss(self) -> float:
        """Return the mean loss of a response token on held-out rows, in nats."""
        return mean_loss(self.validation_rows)[0]

    @property
    def validation_stderr(self) -> float:
        """Return its standard error."""
        return mean_loss(self.validation_rows)[1]


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

    The gradients that are wanted are computed along with the loss, so that no chunk's logits outlive the chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if any(ctx.needs_input_grad) else None
        heads = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), LOSS_CHUNK):
            here = slice(start, start + LOSS_CHUNK)
            logits = (hidden[here] @ head.T).float().log_softmax(-1)
            at_labels = torch.arange(len(logits), device=logits.device), labels[here]
            total -= logits[at_labels].sum()
            if gradient is not None:
                logits.exp_()
                logits[at_labels] -= 1
                gradient[here] = logits.to(hidden.dtype) @ head
            if heads is not None:
                heads += logits.T @ hidden[here].float()
            del logits  # else they live until the next chunk's exist
        ctx.save_for_backward(gradient, None if heads is None else heads.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        gradient, heads = ctx.saved_tensors
        outer = outer.to(gradient.dtype)
        return gradient * outer, None if heads is None else heads * outer, None


def response_loss(model: Any, part: Batch) -> tuple[torch.Tensor, int]:
    """Return (sum of the next-token losses at labelled positions, their number).

    Args:
        model: A causal language model, plain or wrapped by PEFT.
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
    hidden, head = _before_head(model, tokens)
    return _ChunkedLoss.apply(hidden[where], head, wanted)


def _before_head(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states that next tokens are predicted from, [B, L - 1, hidden], and the head's weight."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden[:, :-1], causal.lm_head.weight


def run(
    model: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: Recover,
    steps: int,
    padding: int,
    seed: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    keep: Path | None = None,
) -> Recovered:
    """Train a model and measure its validation loss; changes the model.

    With ``validate_every``, the held-out rows are scored after each so many steps and at the end; the model is left as
    it was at the lowest of these losses, and ``patience`` of them in a row that are no lower end the training.

    Args:
        model: Wrapped by PEFT; parameters that require gradients are trained.
        train: Rows to train on.
        validation: Held-out rows.
        settings: Section ``recover`` of the params.
        steps: Optimizer steps; 0 only measures.
        padding: Token id of padded positions.
        seed: Order of the rows and dropout.
        progress: Wraps the steps.
        keep: File for the state of training, written each ``save_every`` steps and removed at the end. One that is
            there already, of an interrupted run of the same settings, is taken up.

    Raises:
        RecoverError: There are no rows, or a loss or gradient is not finite.
    """
    for name, rows_ in (("training", train), ("validation", validation)):
        if not rows_:
            raise RecoverError(
                f"no {name} row is left: the prompt alone fills recover.max_length ({settings.max_length}) in all; "
                "raise recover.max_length or name other rows in data.alpaca"
            )

    def held_out(step: int) -> tuple[tuple[float, int], ...]:
        found = row_losses(model, validation, settings.micro_batch_size, padding)
        _must_be_finite("validation loss", mean_loss(found)[0], step, settings)
        return found

    if not steps:
        return Recovered((), held_out(0), {}, 0)
    torch.manual_seed(seed)
    training = _Training(model, settings, steps)
    rows = endless(train, settings.batch_size, seed)
    if keep is not None and keep.exists():
        training.restore(keep)
        for _ in range(training.step):
            next(rows)
    for step in progress(range(training.step, steps)):
        model.train()
        training.take_step([batch(part, padding, False) for part in _parts(next(rows), settings)])
        if settings.validate_every and (training.step % settings.validate_every == 0 or training.step == steps):
            training.judge(held_out(training.step))
            if settings.patience and training.worse >= settings.patience:
                break
        if keep is not None and settings.save_every and (step + 1) % settings.save_every == 0:
            training.save(keep)
    training.take_best()
    if keep is not None:
        keep.unlink(missing_ok=True)
    rows_left = training.rows if training.validation else held_out(training.step)
    return Recovered(tuple(training.losses), rows_left, training.validation, training.tokens)


def train_in_full(model: Any, quantized: Container[str]) -> None:
    """Let gradients reach all that is not quantized, not only the adapters; what they reach is the model's own copy.

    A quantized weight is a constant: bitsandbytes' codes or their values, which only its adapter changes. At 16 bits
    nothing is quantized, and this is full-parameter fine-tuning.

    Args:
        model: Wrapped by PEFT.
        quantized: Names of the linears that are quantized.
    """
    for name, weight in model.get_base_model().named_parameters():
        if weight.is_floating_point() and not (name.endswith(".weight") and linear_of(name) in quantized):
            weight.data = weight.detach().clone()  # the tensors that a model is built of are shared by all trials
            weight.requires_grad_(True)


def linear_of(name: str) -> str:
    """Return the module that a parameter belongs to, by the name it had before PEFT wrapped its linear."""
    return name.rpartition(".")[0].removesuffix(".base_layer")


def _parts(rows: Sequence[Example], settings: Recover) -> list[list[Example]]:
    """Cut a batch into micro-batches: no more padded tokens in each than in ``micro_batch_size`` rows of full length.

    Memory is a matter of tokens, and the loss is a mean over the whole batch: where rows are short, fewer and fuller
    passes give the same gradient.
    """
    room = settings.micro_batch_size * padded(settings.max_length)
    found: list[list[Example]] = [[]]
    for row in rows:
        longest = max(len(one.tokens) for one in [*found[-1], row])
        if found[-1] and (len(found[-1]) + 1) * padded(longest) > room:
            found.append([])
        found[-1].append(row)
    return found


class _Training:
    """The state of a recovery between two steps; all of it can be saved and taken up again."""

    def __init__(self, model: Any, settings: Recover, steps: int):
        self.model, self.settings, self.steps = model, settings, steps
        self.masters = _Masters([weight for weight in model.parameters() if weight.requires_grad])
        self.optimizer = adamw(self.masters.copies, settings.learning_rate, model.device)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.tokens, self.worse = 0, 0, 0
        self.losses: list[float] = []
        self.validation: dict[int, float] = {}
        self.rows: tuple[tuple[float, int], ...] = ()  # at the lowest loss, as ``row_losses`` returns them
        self.best: list[torch.Tensor] | None = None

    def take_step(self, parts: Sequence[Batch]) -> None:
        """Train on one batch, given as micro-batches.

        Raises:
            RecoverError: The loss or its gradient is not finite.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _rate(self.step, self.settings.warmup_steps, self.steps)
        count = sum(int((part.labels[:, 1:] != IGNORED).sum()) for part in parts)
        device, total = self.model.device, 0.0
        for part in parts:
            value, _ = response_loss(self.model, part.to(device))
            (value / count).backward()
            total += value.item() / count
            del value  # its graph holds the inputs of 8-bit linears, also after the backward pass
        _must_be_finite("loss", total, self.step, self.settings)
        self.masters.take_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.masters.copies, _MAX_NORM)
        _must_be_finite("gradient", norm.item(), self.step, self.settings)  # after the last step no loss would tell
        self.optimizer.step()
        self.masters.give_back()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        self.tokens += sum(part.length for part in parts)
        self.step += 1

    def judge(self, rows: tuple[tuple[float, int], ...]) -> None:
        """Note a validation loss; keep the weights if it is the lowest."""
        loss, _ = mean_loss(rows)
        if loss < min(self.validation.values(), default=math.inf):
            self.best, self.worse = [copy.detach().clone() for copy in self.masters.copies], 0
            self.rows = rows
        else:
            self.worse += 1
        self.validation[self.step] = loss

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the weights of the lowest validation loss, if any was measured."""
        if self.best is not None:
            for copy, best in zip(self.masters.copies, self.best, strict=True):
                copy.copy_(best)
            self.masters.give_back()

    def save(self, path: Path) -> None:
        """Write the state as safetensors, atomically."""
        tensors = {f"weight.{index}": copy.detach() for index, copy in enumerate(self.masters.copies)}
        tensors |= {f"best.{index}": copy for index, copy in enumerate(self.best or ())}
        # Not `state_dict`, in which bitsandbytes wraps its states.
        for index, copy in enumerate(self.masters.copies):
            state = self.optimizer.state[copy]
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors["random"] = torch.get_rng_state()
        if self.model.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.model.device)
        plain = {key: getattr(self, key) for key in ("step", "tokens", "worse", "losses", "validation", "rows")}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in tensors.items()}, scratch, {"state": json.dumps(plain)})
        scratch.replace(path)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Take up a saved state."""
        with safe_open(path, "pt", device=str(self.model.device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
            plain = json.loads(file.metadata()["state"])
        for index, copy in enumerate(self.masters.copies):
            copy.copy_(tensors[f"weight.{index}"])
        self.masters.give_back()
        if "best.0" in tensors:
            self.best = [tensors[f"best.{index}"] for index in range(len(self.masters.copies))]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                # PyTorch counts steps in a tensor of floats, bitsandbytes in an int.
                kept = value if value.is_floating_point() else value.item()
                self.optimizer.state[self.masters.copies[int(index)]][name] = kept
        torch.set_rng_state(tensors["random"].cpu())
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"].cpu(), self.model.device)
        for key in ("step", "tokens", "worse", "losses"):
            setattr(self, key, plain[key])
        self.rows = tuple((loss, count) for loss, count in plain["rows"])
        self.validation = {int(step): loss for step, loss in plain["validation"].items()}


def _must_be_finite(what: str, value: float, step: int, settings: Recover) -> None:
    if not math.isfinite(value):
        raise RecoverError(f"{what} is {value} at step {step}; lower recover.learning_rate ({settings.learning_rate})")


def adamw(weights: Sequence[torch.Tensor], learning_rate: float, device: torch.device) -> torch.optim.Optimizer:
    """Return the paper's paged AdamW with 32-bit states on CUDA, AdamW elsewhere; no weight decay."""
    if device.type == "cuda":
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW32bit(weights, lr=learning_rate, weight_decay=0.0)
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


@torch.no_grad()
def row_losses(model: Any, examples: Sequence[Example], size: int, padding: int) -> tuple[tuple[float, int], ...]:
    """Return of each row the sum of its response tokens' losses, in nats, and their number; shorter rows first."""
    model.eval()
    found: list[tuple[float, int]] = []
    for part in batches(examples, size, padding, False):
        here = part.to(model.device)
        hidden, head = _before_head(model, here.tokens)
        for states, wanted in zip(hidden, here.labels[:, 1:], strict=True):
            chosen = wanted != IGNORED
            loss = _ChunkedLoss.apply(states[chosen], head, wanted[chosen])
            found.append((loss.item(), int(chosen.sum())))
    return tuple(found)


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
