"""One trial: a bit vector -> assembled, recovered and evaluated model -> figures.

Search, references and build all come through here; there is no second way to turn bits into a score.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from pipeline import GIB, architecture, checkpoint, device, storage
from pipeline.architecture import Unit
from pipeline.compress import quantize
from pipeline.data import alpaca, tasks
from pipeline.data.alpaca import Example
from pipeline.device import Compute
from pipeline.params import Evaluate, Params, Recover
from pipeline.search.allocate import Space
from pipeline.trial import evaluate, memory, recover

INT8_MULTIPLE = 4  # cuBLAS multiplies int8 matrices whose sides are multiples of it


@dataclass(frozen=True)
class Context:
    """What all trials of a study share; loaded once.

    Attributes:
        config: Config of the pruned model.
        state: Its tensors.
        bank: The layer bank.
        tokenizer: The tokenizer.
        units: What one bit choice covers.
        tasks: lm-eval's tasks by name.
        train: Rows to recover on.
        validation: Held-out rows.
        params: The params.
        compute: Where trials run and in which type.
    """

    config: Any
    state: dict[str, torch.Tensor]
    bank: quantize.Bank
    tokenizer: Any
    units: tuple[Unit, ...]
    tasks: Mapping[str, Any]
    train: list[Example]
    validation: list[Example]
    params: Params
    compute: Compute

    @property
    def device(self) -> torch.device:
        """Return where trials run."""
        return self.compute.device

    @property
    def memory_setting(self) -> memory.Setting:
        """Return the batch and adapter sizes that peak memory depends on."""
        return memory_setting(self.params.recover, self.params.evaluate, self.bank.settings)

    def bits_of(self, bits: Sequence[int]) -> dict[str, int]:
        """Return each linear's bits."""
        return quantize.linear_bits(self.units, bits)

    def predict(self, bits: Sequence[int]) -> memory.Peak:
        """Return the predicted peak memory of a bit vector."""
        return memory.predict(self.config, self.bits_of(bits), self.memory_setting)


@dataclass(frozen=True)
class Result:
    """What a trial measured; plain values, ready for JSON and MLflow.

    Attributes:
        bits: Such as ``4484...``, or ``16``.
        accuracy: Mean accuracy in [0, 1].
        accuracy_stderr: Its standard error.
        tasks: Task -> (accuracy, standard error).
        other: Further metrics of the tasks.
        gold_logprob: See ``evaluate.Scores``.
        gold_logprob_stderr: Its standard error.
        validation_loss: Nats a response token on held-out rows.
        validation_loss_stderr: Its standard error.
        peak_memory_bytes: Of training.
        inference_memory_bytes: Of inference.
        memory_source: ``measured`` or ``predicted``.
        seconds: Phase -> seconds.
        items: Items scored.
        losses: Training loss of each step.
        by_item: Task -> of each item its own metric and the log-probability of its gold choice.
        by_row: Of each held-out row the sum of its losses and their number.
        validation_losses: (step, validation loss) during recovery, where ``recover.validate_every`` asks for it.
        trained_tokens: Tokens of the recovery, padding left out.
    """

    bits: str
    accuracy: float
    accuracy_stderr: float
    tasks: dict[str, tuple[float, float]]
    other: dict[str, float]
    gold_logprob: float
    gold_logprob_stderr: float
    validation_loss: float
    validation_loss_stderr: float
    peak_memory_bytes: int
    inference_memory_bytes: int
    memory_source: str
    seconds: dict[str, float]
    items: int
    losses: list[float] = field(default_factory=list)
    by_item: dict[str, list[tuple[float, float]]] = field(default_factory=dict, repr=False)
    by_row: list[tuple[float, int]] = field(default_factory=list, repr=False)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    trained_tokens: int = 0

    @property
    def response_logprob(self) -> float:
        """Return the mean log-probability of a response token on held-out rows, in nats: higher is better."""
        return -self.validation_loss

    @property
    def response_logprob_stderr(self) -> float:
        """Return its standard error."""
        return self.validation_loss_stderr

    def metrics(self) -> dict[str, float]:
        """Return the figures by their names in MLflow."""
        found = {
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr,
            "gold_logprob": self.gold_logprob,
            "gold_logprob_stderr": self.gold_logprob_stderr,
            "validation_loss": self.validation_loss,
            "response_logprob": self.response_logprob,
            "response_logprob_stderr": self.response_logprob_stderr,
            "peak_memory_bytes": float(self.peak_memory_bytes),
            "peak_memory_gib": self.peak_memory_bytes / GIB,
            "inference_memory_bytes": float(self.inference_memory_bytes),
            "items": float(self.items),
            "trained_tokens": float(self.trained_tokens),
            **self.other,
        }
        for task, (value, error) in self.tasks.items():
            found[task] = value
            found[f"{task}_stderr"] = error
        return found | {f"seconds_{phase}": value for phase, value in self.seconds.items()}

    def score(self, objective: str) -> tuple[float, float]:
        """Return an objective of section ``search`` by its name, and its standard error."""
        return getattr(self, objective), getattr(self, f"{objective}_stderr")

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Result:
        """Return the result that ``as_json`` was made from."""
        pairs = {task: (float(pair[0]), float(pair[1])) for task, pair in values["tasks"].items()}
        by_item = {task: [(own, gold) for own, gold in items] for task, items in values["by_item"].items()}
        by_row = [(loss, count) for loss, count in values["by_row"]]
        curve = [(step, loss) for step, loss in values["validation_losses"]]
        return Result(**{**values, "tasks": pairs, "by_item": by_item, "by_row": by_row, "validation_losses": curve})

    @property
    def record(self) -> dict[str, Any]:
        """Return what it measured item by item, as ``paired`` reads it."""
        return {"by_item": self.by_item, "by_row": self.by_row}


# Part of what names a study or a cell: a version that measures something else starts its own.
MEASURED = [one.name for one in fields(Result)]


def memory_setting(settings: Recover, evaluation: Evaluate, bank: Any) -> memory.Setting:
    """Return the batch and adapter sizes that peak memory depends on.

    Args:
        settings: Section ``recover``.
        evaluation: Section ``evaluate``.
        bank: Section ``quantize`` that the adapters come from.
    """
    length = alpaca.padded(settings.max_length)
    rows = max(1, evaluation.batch_tokens // evaluate.ROW)
    return memory.Setting(
        tokens=settings.micro_batch_size * length,
        r=bank.r,
        double_quant=bank.double_quant,
        inference_tokens=rows * evaluate.ROW,
        rows=settings.micro_batch_size,
        inference_rows=rows,
        dropout=settings.dropout,
        accumulate=settings.batch_size > settings.micro_batch_size,
        full=settings.train == "full",
        keeps_best=settings.validate_every > 0,
    )


def load(params: Params, pruned: Path, bank: Path, rows: Path, items: Path) -> Context:
    """Load and verify what trials share.

    Raises:
        CheckpointError: The pruned model or the bank is missing or was changed.
        ValueError: A bit string in the params does not fit the model, or the model a GPU.
    """
    storage.verify(pruned, "prune")
    storage.verify(bank, "quantize")
    gc.collect()
    gc.freeze()  # what is imported by now stays; looking through it took a third of a second a phase
    compute = device.choose(params.device, params.dtype)
    model = checkpoint.load_model(pruned, dtype=compute.dtype)
    tokenizer = checkpoint.load_tokenizer(pruned)
    if compute.device.type == "cuda" and any(
        shape.channels % INT8_MULTIPLE for shape in architecture.shapes(model.config)
    ):
        raise ValueError(
            f"{pruned}: a block's number of channels is no multiple of {INT8_MULTIPLE}, which 8 bits need on a GPU; "
            f"set prune.multiple_of to a multiple of {INT8_MULTIPLE} and prune again, or set device to cpu"
        )
    units = architecture.units(model.config, params.search.granularity)
    for bits in params.search.seed_bits:
        quantize.read_bits(bits, units)
    train, held_out = alpaca.split(alpaca.read(rows), params.data.validation_rows, params.seed)
    length = params.recover.max_length
    return Context(
        config=model.config,
        state=model.state_dict(),
        bank=quantize.Bank(bank),
        tokenizer=tokenizer,
        units=units,
        tasks=tasks.load(params.evaluate.tasks, items),
        train=alpaca.encode(train, tokenizer, length),
        validation=alpaca.encode(held_out, tokenizer, length),
        params=params,
        compute=compute,
    )


def untouched(context: Context, base: Path) -> Context:
    """Return a context of the base model, before pruning; for 16 bits only, as the bank is of the pruned one.

    Raises:
        CheckpointError: The base model is missing or was changed.
    """
    storage.verify(base, "fetch")
    model = checkpoint.load_base(base, dtype=context.compute.dtype)
    config = checkpoint.pruned_config(model.config, architecture.shapes(model.config))
    return replace(context, config=config, state=model.state_dict())


def space(context: Context) -> Space:
    """Return the feasible bit vectors: all limits of section ``search`` at once.

    Raises:
        ValueError: The limits leave no vector, or no unit at 8 bits where some are asked for, or they forbid one of
            the user's own seeds.
    """
    settings = context.params.search
    budget = settings.memory_budget_gib
    found = Space.of(
        lambda bits: memory.training(context.config, context.bits_of(bits), context.memory_setting)[1],
        len(context.units),
        settings.max_8bit_fraction,
        None if budget is None else int(budget * GIB),
        [sum(context.state[f"{name}.weight"].numel() for name in unit.linears) for unit in context.units],
        settings.average_bits,
    )
    for bits in settings.seed_bits:
        if quantize.read_bits(bits, context.units) not in found:
            raise ValueError(
                f"search.seed_bits: {bits!r} is beyond search.max_8bit_fraction, memory_budget_gib or average_bits; "
                "remove it or loosen the limit"
            )
    return found


def run(
    context: Context,
    bits: Sequence[int],
    *,
    steps: int | None = None,
    limit: int | None = None,
    skip: int = 0,
    progress: Callable[[Any], Any] = iter,
    trained: bool = True,
    keep: Path | None = None,
) -> tuple[Result, PeftModel]:
    """Assemble, recover and evaluate one bit vector.

    Args:
        context: What trials share.
        bits: Bits of each unit: 4, 8 or 16.
        steps: Optimizer steps; None: the params' own.
        limit: Items of a task; None: the params' own.
        skip: First items of each task that are left out.
        progress: Wraps the recovery's steps.
        trained: False leaves recovery out and reports inference memory as the peak (the untouched model).
        keep: Where an unfinished recovery is kept (``recover.run``).

    Returns:
        The result and the recovered model.
    """
    params = context.params
    steps = params.recover.steps if steps is None else steps
    limit = params.evaluate.limit if limit is None else limit
    seconds: dict[str, float] = {}
    peaks: dict[str, int | None] = {}

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result, peaks[phase] = memory.measured(work, context.device)
        seconds[phase] = time.perf_counter() - start
        return result

    model = timed("assemble", lambda: assemble(context, bits))
    padding = context.tokenizer.pad_token_id
    recovered = timed(
        "recover",
        lambda: recover.run(
            model,
            context.train,
            context.validation,
            params.recover,
            steps if trained else 0,
            padding,
            params.seed,
            progress,
            keep,
        ),
    )
    model.eval()

    def evaluated() -> evaluate.Scores:
        # On a GPU the adapters stay beside bitsandbytes' modules, as they will be served.
        with nullcontext() if context.device.type == "cuda" else merged(model):
            return evaluate.run(model, context.tokenizer, context.tasks, limit, params.evaluate.batch_tokens, skip=skip)

    scores = timed("evaluate", evaluated)
    predicted = context.predict(bits)
    on_gpu = peaks["recover"] is not None and peaks["evaluate"] is not None
    training = peaks["recover"] if on_gpu else predicted.training
    inference = peaks["evaluate"] if on_gpu else predicted.inference
    result = Result(
        bits=quantize.write_bits(bits),
        accuracy=scores.mean,
        accuracy_stderr=scores.mean_stderr,
        tasks={task: (value, scores.stderr[task]) for task, value in scores.accuracy.items()},
        other=scores.other | ({"predicted_peak_memory_bytes": float(predicted.training)} if on_gpu else {}),
        gold_logprob=scores.gold_logprob,
        gold_logprob_stderr=scores.gold_logprob_stderr,
        validation_loss=recovered.validation_loss,
        validation_loss_stderr=recovered.validation_stderr,
        peak_memory_bytes=int((training if trained else inference) or 0),
        inference_memory_bytes=int(inference or 0),
        memory_source="measured" if on_gpu else "predicted",
        seconds=seconds,
        items=scores.items,
        losses=list(recovered.losses),
        by_item={task: [(round(a, 6), round(b, 6)) for a, b in items] for task, items in scores.by_item.items()},
        by_row=[(round(loss, 6), count) for loss, count in recovered.validation_rows],
        validation_losses=list(recovered.validation_losses.items()),
        trained_tokens=recovered.tokens,
    )
    return result, model


def assemble(context: Context, bits: Sequence[int], *, real: bool | None = None) -> PeftModel:
    """Build the model of a bit vector from the bank, with adapters at their initialization.

    Args:
        context: What trials share.
        bits: Bits of each unit.
        real: bitsandbytes' own modules (the default on CUDA), or weights dequantized once (elsewhere:
            equal for 4 bits, and several times faster than bitsandbytes is on a CPU).
    """
    bits_of = context.bits_of(bits)
    real = context.device.type == "cuda" if real is None else real
    if real:
        model = mixed_model(context, bits_of)
    else:
        simulated = quantize.simulated(context.state, context.bank, bits_of)
        model = checkpoint.from_state(context.config, simulated, context.device)
    on_cpu = context.device.type == "cpu"
    # On a CPU, adapters in the weights' type, byte dropout and plain attention double the speed of a training step.
    config = lora_config(context.params, context.bank.settings)
    with torch.random.fork_rng():  # a dense linear's adapter is drawn
        torch.manual_seed(context.params.seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=not on_cpu)
    if on_cpu:
        recover.use_byte_dropout(adapted, config.lora_dropout)
        model.set_attn_implementation("eager")
    set_adapters(adapted, context.bank, bits_of)
    if context.params.recover.train == "full":
        recover.train_in_full(adapted, {name for name, width in bits_of.items() if width != 16})
    return adapted


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Add the adapters to dense weights for a while: two thirds of the matrix products go, the sum is the same.

    The weights are put back as they were, to the bit.
    """
    weights = [layer.get_base_layer().weight for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [weight.detach().clone() for weight in weights]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def trained_state(model: PeftModel, bits_of: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the tensors that full training may have changed, by the names they have in the pruned model."""
    found = {}
    for name, weight in model.get_base_model().named_parameters(remove_duplicate=False):  # a tied head by both names
        linear, _, kind = name.rpartition(".")
        quantized = kind == "weight" and bits_of.get(recover.linear_of(name), 16) != 16
        if "lora_" not in name and not quantized:
            found[f"{linear.removesuffix('.base_layer')}.{kind}"] = weight.detach().cpu()
    return found


def mixed_model(context: Context, bits_of: Mapping[str, int]) -> Any:
    """Build a model of bitsandbytes' modules from the bank's codes, on the context's device."""
    config = copy.deepcopy(context.config)
    settings = context.bank.settings
    named = {name: bits for name, bits in bits_of.items() if bits != 16}
    if named:
        mixed = checkpoint.MixedBitsConfig(named, settings.four_bit, settings.double_quant)
        config.quantization_config = mixed.to_dict()
    return checkpoint.from_state(config, quantize.quantized(context.state, context.bank, bits_of), context.device)


def lora_config(params: Params, settings: Any) -> LoraConfig:
    """Return PEFT's description of the adapters: all seven projections, as in appendix B."""
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=params.recover.dropout,
        target_modules=architecture.TARGET_MODULES,
        task_type="CAUSAL_LM",
    )


def set_adapters(model: PeftModel, bank: quantize.Bank, bits_of: Mapping[str, int]) -> None:
    """Give each linear the bank's initialization for its bits; a dense linear keeps PEFT's (B = 0)."""
    base = model.get_base_model()
    with torch.no_grad():
        for name, bits in bits_of.items():
            if bits == 16:
                continue
            layer, adapter = base.get_submodule(name), bank.adapter(name, bits)
            layer.lora_A["default"].weight.copy_(adapter.a)
            layer.lora_B["default"].weight.copy_(adapter.b)
