"""What all trials of a study share: the pruned model, its layer bank, the data and the settings, loaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lm_eval.api.task import Task
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline import architecture, checkpoint, storage
from pipeline.architecture import Unit
from pipeline.compress import layer_bank, quantize
from pipeline.data import alpaca, tasks
from pipeline.data.alpaca import Example
from pipeline.device import Compute
from pipeline.errors import UserError
from pipeline.trial import memory, recover
from pipeline.trial.further import Further
from pipeline.trial.setting import ROW, Setting
from pipeline.trial.teacher import Teacher

_FULL = 2**15  # tokens of an evaluation's pass beyond which it gains nothing
INT8_MULTIPLE = 4  # cuBLAS multiplies int8 matrices whose sides are multiples of it


@dataclass(frozen=True)
class Settings:
    """How a trial is run.

    Attributes:
        recover: How a model is recovered.
        limit: Items of a task that it is judged on; 0: all.
        batch_tokens: Tokens of one forward pass of evaluation.
        cached_tokens: Tokens whose keys and values the inference memory holds as well.
        seed: Of adapters that are drawn, of the order of rows, of dropout, and of the held-out rows.
    """

    recover: recover.Settings
    limit: int
    batch_tokens: int
    seed: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Passes:
    """How much one pass takes where it runs; what memory is judged by is the user's (``Context.memory_setting``).

    Attributes:
        rows: Rows of full length in recovery.
        tokens: Tokens in evaluation.
    """

    rows: int
    tokens: int


@dataclass(frozen=True)
class Sources:
    """Where the parts of a context lie.

    Attributes:
        ratio: The share of the parameters that was pruned.
        pruned: The pruned model.
        bank: Its layer bank.
        rows: File of Alpaca rows.
        items: Folder of benchmark items.
        base: The dense model.
        answers: Where its answers are kept.
    """

    ratio: float
    pruned: Path
    bank: Path
    rows: Path
    items: Path
    base: Path
    answers: Path


@dataclass(frozen=True)
class Context:
    """What all trials of a study share.

    Attributes:
        config: Config of the pruned model.
        state: Its tensors.
        bank: The layer bank.
        tokenizer: The tokenizer.
        units: What one bit choice covers.
        tasks: lm-eval's tasks by name.
        train: Rows to recover on.
        validation: Held-out rows.
        settings: How a trial is run.
        compute: Where trials run and in which type.
        teacher: The dense model, where recovery aims at its predictions.
        ratio: The share of the parameters that was pruned.
        further: What is measured of references and tables' cells beside what trials go by.
    """

    config: PretrainedConfig
    state: dict[str, torch.Tensor]
    bank: layer_bank.Bank
    tokenizer: PreTrainedTokenizerBase
    units: tuple[Unit, ...]
    tasks: Mapping[str, Task]
    train: list[Example]
    validation: list[Example]
    settings: Settings
    compute: Compute
    teacher: Teacher | None = None
    ratio: float = 0.0
    further: Further | None = None

    @property
    def device(self) -> torch.device:
        """Return where trials run."""
        return self.compute.device

    @property
    def memory_setting(self) -> Setting:
        """Return the batch and adapter sizes that peak memory depends on."""
        settings = self.settings
        return memory_setting(settings.recover, settings.batch_tokens, self.bank.settings, settings.cached_tokens)

    def widths(self, bits: Sequence[int]) -> dict[str, int]:
        """Return each linear's bits from the bits of the units."""
        return layer_bank.linear_bits(self.units, bits)

    def predict(self, bits: Sequence[int]) -> memory.Peak:
        """Return the predicted peak memory of a bit vector."""
        return memory.predict(self.config, self.widths(bits), self.memory_setting)

    def predict_run(self, bits: Sequence[int], passes: Passes) -> memory.Peak:
        """Return the predicted peak memory of a bit vector in passes of another size."""
        recovery = replace(self.settings.recover, micro_batch_size=passes.rows)
        return memory.predict(
            self.config, self.widths(bits), memory_setting(recovery, passes.tokens, self.bank.settings)
        )

    def passes(self, bits: Sequence[int], room: int | None) -> Passes:
        """Return how full passes are: the user's, or larger ones where a GPU has room for them.

        A batch's gradient is the same however it is cut, and fewer, fuller passes launch fewer kernels.

        Args:
            bits: Bits of each unit.
            room: Bytes that a peak may take; None: not on a GPU.
        """
        recovery, tokens = self.settings.recover, self.settings.batch_tokens
        users = Passes(recovery.micro_batch_size, tokens)
        if room is None:
            return users
        rows = memory.largest(
            _halved(recovery.batch_size, users.rows),
            lambda size: self.predict_run(bits, replace(users, rows=size)).training,
            room,
        )
        tokens = memory.largest(
            _halved(max(_FULL, users.tokens), users.tokens),
            lambda size: self.predict_run(bits, replace(users, tokens=size)).inference,
            room,
        )
        return Passes(rows, tokens)


def _halved(most: int, least: int) -> list[int]:
    """Return descending sizes, each half of the one before it, that end with the least."""
    sizes = []
    while most > least:
        sizes.append(most)
        most //= 2
    return [*sizes, least]


def memory_setting(
    recovery: recover.Settings, batch_tokens: int, adapters: quantize.Settings, cached_tokens: int = 0
) -> Setting:
    """Return the batch and adapter sizes that peak memory depends on.

    Args:
        recovery: How a model is recovered.
        batch_tokens: Tokens of one forward pass of evaluation.
        adapters: How the bank that the adapters come from is made.
        cached_tokens: Tokens whose keys and values the inference memory holds as well.
    """
    rows = max(1, batch_tokens // ROW)
    return Setting(
        tokens=recovery.micro_batch_size * alpaca.padded(recovery.max_length),
        r=adapters.r,
        double_quant=adapters.double_quant,
        inference_tokens=rows * ROW,
        rows=recovery.micro_batch_size,
        inference_rows=rows,
        dropout=recovery.dropout,
        accumulate=recovery.batch_size > recovery.micro_batch_size,
        full=recovery.train == "full",
        keeps_best=recovery.validate_every > 0,
        teacher=recovery.target == "teacher",
        cached_tokens=cached_tokens,
        fast=recovery.fast,
    )


def load(
    sources: Sources,
    settings: Settings,
    compute: Compute,
    *,
    granularity: str,
    task_names: Sequence[str],
    validation_rows: int,
    further: Further | None = None,
) -> Context:
    """Load and verify what trials share.

    Args:
        sources: Where its parts lie.
        settings: How a trial is run.
        compute: Where trials run and in which type.
        granularity: What one bit choice covers (``architecture.parts``).
        task_names: lm-eval's tasks.
        validation_rows: Rows that are held out.
        further: What is measured beside what trials go by.

    Raises:
        CheckpointError: The pruned model or the bank is missing or was changed.
        UserError: The model does not suit a GPU.
    """
    tokenizer = checkpoint.load_tokenizer(sources.base)
    train, held_out = alpaca.split(alpaca.read(sources.rows), validation_rows, settings.seed)
    length = settings.recover.max_length
    teacher = None
    if settings.recover.target == "teacher":
        teacher = Teacher(sources.base, sources.answers, tokenizer.pad_token_id, compute)
    config, state = _pruned(sources.pruned, compute)
    return Context(
        config=config,
        state=state,
        bank=_bank(sources.bank),
        tokenizer=tokenizer,
        units=architecture.units(config, granularity),
        tasks=tasks.load(task_names, sources.items),
        train=alpaca.encode(train, tokenizer, length),
        validation=alpaca.encode(held_out, tokenizer, length),
        settings=settings,
        compute=compute,
        teacher=teacher,
        ratio=sources.ratio,
        further=further,
    )


def at_ratio(context: Context, ratio: float, pruned: Path, bank: Path) -> Context:
    """Return the context of the model that was pruned to another ratio.

    Raises:
        CheckpointError: The pruned model or the bank is missing or was changed.
        UserError: The model does not suit a GPU.
    """
    config, state = _pruned(pruned, context.compute)
    return replace(context, ratio=ratio, config=config, state=state, bank=_bank(bank))


def _pruned(folder: Path, compute: Compute) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """Load and verify a pruned model; return its config and its tensors."""
    storage.verify(folder, "prune")
    model = checkpoint.load_model(folder, dtype=compute.dtype)
    on_gpu = compute.device.type == "cuda"
    if on_gpu and any(shape.channels % INT8_MULTIPLE for shape in architecture.shapes(model.config)):
        raise UserError(
            f"{folder}: a block's number of channels is no multiple of {INT8_MULTIPLE}, which 8 bits need on a "
            f"GPU; set prune.multiple_of to a multiple of {INT8_MULTIPLE} and prune again, or set device to cpu"
        )
    return model.config, model.state_dict()


def _bank(folder: Path) -> layer_bank.Bank:
    storage.verify(folder, "quantize")
    return layer_bank.Bank(folder)


def untouched(context: Context, base: Path) -> Context:
    """Return a context of the base model, before pruning; for 16 bits only, as the bank is of the pruned one.

    Raises:
        CheckpointError: The base model is missing or was changed.
    """
    storage.verify(base, "fetch")
    model = checkpoint.load_base(base, dtype=context.compute.dtype)
    config = checkpoint.pruned_config(model.config, architecture.shapes(model.config))
    return replace(context, ratio=0.0, config=config, state=model.state_dict())
