"""Recovery on Alpaca (paper section 3.3, appendix B): AdamW, linear decay.

The target is the rows' responses, as in the paper, or what the dense model predicts at each of their tokens.

``lora`` trains the adapters, ``full`` also all that is not quantized. Held-out rows may end it early, and the state of
an interrupted one may be kept and taken up again.

A plain training loop, because a trial's cost is mostly this: rows of similar length share a batch, only response
positions reach ``lm_head``, their logits exist a chunk at a time, and no attention mask is needed (padding is on the
right, which causal attention never sees).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel

from pipeline.data.alpaca import Batch, Example, batch
from pipeline.trial import fast
from pipeline.trial.fast import Ways
from pipeline.trial.loss import RowLosses, mean_loss, row_losses
from pipeline.trial.teacher import Targets
from pipeline.trial.training import RecoverError, Settings, Training, micro_batches, must_be_finite

Steps = Callable[[Iterable[int]], Iterable[int]]  # shows the progress of optimizer steps
_BUCKET = 16  # batches whose rows are sorted by length together


@dataclass(frozen=True)
class Rows:
    """What a recovery reads.

    Attributes:
        train: Rows to train on.
        validation: Held-out rows.
        padding: Token id of padded positions.
        targets: What the dense model predicts for the rows of all steps; read if that is the target.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    padding: int
    targets: Targets | None = None


@dataclass(frozen=True)
class Recovered:
    """What a recovery measured.

    Attributes:
        losses: Mean loss of a predicted token at each step, in nats; of a teacher's target its cross-entropy.
        validation_rows: Of each held-out row the sum of its losses and their number, of the model as it is left.
        validation_losses: Step -> mean loss of the held-out rows then, where ``validate_every`` asks for it.
        tokens: Tokens trained on, padding left out.
        validation_loss: Mean loss of a response token on the held-out rows, in nats, of the model as it is left.
        validation_stderr: Its standard error over the rows.
    """

    losses: tuple[float, ...]
    validation_rows: RowLosses
    validation_losses: dict[int, float]
    tokens: int
    validation_loss: float
    validation_stderr: float

    @staticmethod
    def of(
        losses: tuple[float, ...], validation_rows: RowLosses, validation_losses: dict[int, float], tokens: int
    ) -> Recovered:
        """Return what a recovery measured, with the mean over the held-out rows."""
        return Recovered(losses, validation_rows, validation_losses, tokens, *mean_loss(validation_rows))


def run(
    model: PeftModel,
    rows: Rows,
    settings: Settings,
    seed: int,
    progress: Steps = iter,
    keep: Path | None = None,
    ways: Ways | None = None,
) -> Recovered:
    """Train a model and measure its validation loss; changes the model.

    With ``validate_every``, the held-out rows are scored each so many steps and at the end. The model is left as it was
    at the lowest of these losses; ``patience`` of them in a row that are no lower end the training.

    Args:
        model: Wrapped by PEFT; parameters that require gradients are trained.
        rows: What it trains on and what it is measured on.
        settings: How it is trained.
        seed: Order of the rows and dropout.
        progress: Wraps the steps.
        keep: File for the state of training, written each ``save_every`` steps and removed at the end. One that is
            there already, of an interrupted run of the same settings, is taken up.
        ways: Those in which it is trained; None: as the settings and the device have it.

    Raises:
        RecoverError: There are no rows, or a loss or gradient is not finite.
    """
    _must_have_rows(rows, settings)
    ways = fast.chosen(model, settings.fast, settings.max_length) if ways is None else ways
    with fast.taken(model, ways):
        return _run(model, rows, settings, seed, progress, keep, ways)


def _run(
    model: PeftModel, rows: Rows, settings: Settings, seed: int, progress: Steps, keep: Path | None, ways: Ways
) -> Recovered:
    """Train a model that takes the ways already; arguments as for ``run``."""

    def held_out(step: int) -> RowLosses:
        losses = row_losses(model, rows.validation, settings.micro_batch_size, rows.padding)
        must_be_finite("validation loss", mean_loss(losses)[0], step, settings)
        return losses

    if not settings.steps:
        return Recovered.of((), held_out(0), {}, 0)
    targets = rows.targets if settings.target == "teacher" else None
    assert (targets is not None) == (settings.target == "teacher")  # the caller asks the dense model
    torch.manual_seed(seed)
    training = Training(model, settings, ways)
    parts_of, made = _passes(ways)
    batches = endless(rows.train, settings.batch_size, seed)
    if keep is not None and keep.exists():
        training.restore(keep)
        for _ in range(training.step):
            next(batches)
    for step in progress(range(training.step, settings.steps)):
        model.train()
        parts = parts_of(next(batches), settings.micro_batch_size, settings.max_length)
        wanted = None if targets is None else [[targets[row] for row in part] for part in parts]
        training.take_step([made(part, rows.padding, settings.whole) for part in parts], wanted)
        due = settings.validate_every and training.step % settings.validate_every == 0
        if due or (settings.validate_every and training.step == settings.steps):
            training.settle()
            training.judge(held_out(training.step))
            if settings.patience and training.worse >= settings.patience:
                break
        if keep is not None and settings.save_every and (step + 1) % settings.save_every == 0:
            training.save(keep)
    training.end()
    if keep is not None:
        keep.unlink(missing_ok=True)
    rows_left = training.rows if training.validation else held_out(training.step)
    return Recovered.of(tuple(training.losses), rows_left, training.validation, training.tokens)


def _passes(ways: Ways) -> tuple[Callable[..., list[list[Example]]], Callable[..., Batch]]:
    """Return what cuts a batch into passes, and what makes tensors of one."""
    if not ways.packed:
        return micro_batches, batch
    from pipeline.trial import graphs, packing

    return packing.parts, partial(packing.pack, multiple=graphs.LENGTH if ways.graphs else None)


def rows_of(train: Sequence[Example], settings: Settings, seed: int) -> list[Example]:
    """Return the rows that all steps of a recovery read, in their order."""
    if not train:
        return []
    return [row for rows in islice(endless(train, settings.batch_size, seed), settings.steps) for row in rows]


def _must_have_rows(rows: Rows, settings: Settings) -> None:
    for name, examples in (("training", rows.train), ("validation", rows.validation)):
        if not examples:
            raise RecoverError(
                f"no {name} row is left: the prompt alone fills recover.max_length ({settings.max_length}) in all; "
                "raise recover.max_length or name other rows in data.alpaca"
            )


def endless(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches for ever: rows shuffled each epoch, batches of similar length in random order."""
    order = random.Random(seed)
    while True:
        rows = list(examples)
        order.shuffle(rows)
        batches: list[list[Example]] = []
        for start in range(0, len(rows), size * _BUCKET):
            bucket = sorted(rows[start : start + size * _BUCKET], key=lambda example: len(example.tokens))
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        order.shuffle(batches)
        yield from batches
