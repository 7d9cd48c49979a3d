"""The state of a recovery between two steps: weights, optimizer, losses. It can be saved and taken up again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.data.alpaca import IGNORED, Batch, Example, padded
from pipeline.errors import UserError
from pipeline.trial.fast import PLAIN, Ways
from pipeline.trial.loss import RowLosses, blended, mean_loss, response_loss
from pipeline.trial.masters import FlatMasters, Masters

_MAX_NORM = 1.0
_READ = 16  # steps after which a GPU is waited for, to read their losses


class RecoverError(UserError):
    """Training diverged: at which step, and what to change."""


@dataclass(frozen=True)
class Settings:
    """How a model is recovered.

    Attributes:
        target: ``answers`` (the rows' own responses) or ``teacher`` (the dense model's predictions at their tokens).
        answers_weight: Share of the answers in the teacher's target.
        positions: ``response`` (its tokens are predicted) or ``all`` (the prompt's too).
        train: ``lora`` (the adapters) or ``full`` (also all that is not quantized).
        steps: Optimizer steps; 0 only measures.
        batch_size: Rows of an optimizer step.
        micro_batch_size: Rows of full length that one pass takes.
        max_length: Tokens of a row.
        learning_rate: The highest one.
        warmup_steps: Steps until it is reached.
        dropout: Of the adapters.
        validate_every: Steps between two validation losses; 0: only after the last step.
        patience: Validation losses in a row that are no lower before it stops; 0: never.
        save_every: Steps after which the state is kept; 0: never.
        fast: Whether a GPU takes the ways that no GPU has run yet (``fast``).
    """

    target: str
    answers_weight: float
    positions: str
    train: str
    steps: int
    batch_size: int
    micro_batch_size: int
    max_length: int
    learning_rate: float
    warmup_steps: int
    dropout: float
    validate_every: int
    patience: int
    save_every: int
    fast: bool = False

    @property
    def whole(self) -> bool:
        """Return whether a row's prompt is predicted too."""
        return self.positions == "all"


def micro_batches(rows: Sequence[Example], micro_batch_size: int, max_length: int) -> list[list[Example]]:
    """Cut a batch into micro-batches: no more padded tokens in each than in ``micro_batch_size`` rows of full length.

    Memory is a matter of tokens, and the loss is a mean over the whole batch: where rows are short, fewer and fuller
    passes give the same gradient.
    """
    room = micro_batch_size * padded(max_length)
    parts: list[list[Example]] = [[]]
    for row in rows:
        longest = max(len(member.tokens) for member in [*parts[-1], row])
        if parts[-1] and (len(parts[-1]) + 1) * padded(longest) > room:
            parts.append([])
        parts[-1].append(row)
    return parts


class Training:
    """The state of a recovery between two steps; all of it can be saved and taken up again."""

    def __init__(self, model: PeftModel, settings: Settings, ways: Ways = PLAIN):
        self.model, self.settings = model, settings
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.masters = FlatMasters(trained) if ways.flat else Masters(trained)
        self._read_every = _READ if ways.flat else 1
        self._unread: list[torch.Tensor] = []  # of the last steps loss and norm of the gradient, on the device
        self.optimizer = adamw(self.masters.copies, settings.learning_rate, model.device)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.tokens, self.worse = 0, 0, 0
        self.losses: list[float] = []
        self.validation: dict[int, float] = {}
        self.rows: RowLosses = ()  # at the lowest loss, as ``row_losses`` returns them
        self.best: list[torch.Tensor] | None = None

    def take_step(self, parts: Sequence[Batch], targets: Sequence[Sequence[torch.Tensor]] | None = None) -> None:
        """Train on one batch, given as micro-batches.

        Args:
            parts: The micro-batches, in the CPU's memory.
            targets: Of each the teacher's for each row, [predicted tokens, hidden]; None: the answers are the target.

        Raises:
            RecoverError: A loss or its gradient is not finite, of this step or of an earlier one that was not read.
        """
        for group, highest in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = highest * rate(self.step, self.settings.warmup_steps, self.settings.steps)
        count = sum(int((part.labels[:, 1:] != IGNORED).sum()) for part in parts)
        total = torch.zeros((), device=self.model.device)
        for number, part in enumerate(parts):
            wanted = None
            if targets is not None:
                wanted = blended(self.model, part, torch.cat([*targets[number]]), self.settings.answers_weight)
            value, _ = response_loss(self.model, part, wanted)
            (value / count).backward()
            total += value.detach() / count
            del value  # its graph holds the inputs of 8-bit linears, also after the backward pass
        self.masters.take_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.masters.copies, _MAX_NORM)
        self.optimizer.step()
        self.masters.give_back()
        self.masters.drop_gradients()
        self._unread.append(torch.stack([total, norm]))
        self.tokens += sum(part.length for part in parts)
        self.step += 1
        if len(self._unread) >= self._read_every:
            self.settle()

    def settle(self) -> None:
        """Read the losses of the last steps, for which a GPU is waited for.

        Raises:
            RecoverError: A loss or a gradient is not finite.
        """
        if not self._unread:
            return
        values, self._unread = torch.stack(self._unread).tolist(), []
        for step, (loss, norm) in enumerate(values, self.step - len(values)):
            must_be_finite("loss", loss, step, self.settings)
            must_be_finite("gradient", norm, step, self.settings)  # after the last step no loss would tell
            self.losses.append(loss)

    def end(self) -> None:
        """Leave the model with the weights of the lowest validation loss, if any was measured, and without gradients.

        Raises:
            RecoverError: As in ``settle``.
        """
        self.settle()
        self.take_best()
        self.masters.release()

    def judge(self, rows: RowLosses) -> None:
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
        """Write the state as safetensors, atomically.

        Raises:
            RecoverError: As in ``settle``.
        """
        self.settle()
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
                state = value if value.is_floating_point() else value.item()
                self.optimizer.state[self.masters.copies[int(index)]][name] = state
        torch.set_rng_state(tensors["random"].cpu())
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"].cpu(), self.model.device)
        for key in ("step", "tokens", "worse", "losses"):
            setattr(self, key, plain[key])
        self.rows = tuple((loss, count) for loss, count in plain["rows"])
        self.validation = {int(step): loss for step, loss in plain["validation"].items()}


def must_be_finite(what: str, value: float, step: int, settings: Settings) -> None:
    """Refuse a loss or gradient that is no finite number.

    Raises:
        RecoverError: Naming the step and the learning rate.
    """
    if not math.isfinite(value):
        raise RecoverError(f"{what} is {value} at step {step}; lower recover.learning_rate ({settings.learning_rate})")


def adamw(weights: Sequence[torch.Tensor], learning_rate: float, device: torch.device) -> torch.optim.Optimizer:
    """Return the paper's paged AdamW with 32-bit states on CUDA, AdamW elsewhere; no weight decay."""
    if device.type == "cuda":
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW32bit(weights, lr=learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)


def rate(step: int, warmup: int, steps: int) -> float:
    """Return the share of the highest learning rate at a step: linear warm-up, then linear decay to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(steps - warmup, 1)
