"""What the phases of a trial cost, ours beside the plain way on the same work: evaluation, recovery, assembly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import plain
from benchmarks.harness import BAR, LIMIT, Figure, interleaved, less_is_better, more_is_better, timed
from benchmarks.setup import Setup
from pipeline import architecture, checkpoint
from pipeline.compress import quantize
from pipeline.data import definitions
from pipeline.trial import evaluate, loss, recover
from pipeline.trial import trial as trials
from pipeline.trial.assemble import assemble
from pipeline.trial.recover import Rows

SUBSET = 3  # items of a task in fp32, which takes four times as long
ROWS = 1024  # tokens of one bare matmul
SAME_CHOICE, FP32_DIFFERENCE = 0.995, 1e-3


def evaluation(setup: Setup) -> dict[str, Figure]:
    """Compare ``evaluate.run`` with lm-eval's HFLM at 16 requests a batch: items a second.

    The same items and the same pruned model without adapters in bf16; plain attention on our side as in a trial, SDPA,
    its default, on the other. ``evaluation_same_choice`` is the share of items on which both choose the same answer,
    both with plain attention; ``evaluation_same_choice_softmax`` the same where lm-eval's own takes its softmax in fp32
    (its option; else it rounds the sum of a choice's log-probabilities to bf16 too, to 0.1 or 0.2 nats);
    ``evaluation_fp32_choice`` the share on which each side, as it was timed, chooses as the model does in fp32;
    ``evaluation_fp32_difference`` the largest difference of a log-likelihood when both compute in fp32, on the first
    items of each task.
    """
    context, limit = setup.context, setup.options.limit
    ours, theirs = _models(setup, float32=False)
    batch_tokens = context.settings.batch_tokens
    lm = plain.language_model(theirs, context.tokenizer)
    fed: list[int] = []
    heads: list[int] = []

    def counted(found: Any) -> Any:
        fed.append(sum(tree.size for _, rows in found for row in rows for tree in row))
        return found

    hook = ours.lm_head.register_forward_hook(lambda _, inputs, output: heads.append(len(inputs[0])))
    own = evaluate.SharedPrefixLM(ours, context.tokenizer, batch_tokens, counted)
    mine = plain.samples(own, context.tasks, limit)  # the first pass of each side generates its kernels
    hook.remove()
    reference = plain.samples(lm, context.tasks, limit)
    items = sum(len(found) for found in mine.values())
    seconds = interleaved(
        lambda: timed(lambda: evaluate.run(ours, context.tokenizer, context.tasks, limit, batch_tokens)),
        lambda: timed(lambda: plain.samples(lm, context.tasks, limit)),
        repeats=setup.options.repeats,
    )
    setup.seconds["ours", "evaluate"], setup.seconds["theirs", "evaluate"] = seconds
    setup.work["evaluation_tokens"], setup.work["evaluation_heads"] = sum(fed), sum(heads)
    theirs.set_attn_implementation("eager")
    alike, alike_softmax = (
        _agreement(setup, mine, plain.samples(lm_, context.tasks, limit))
        for lm_ in (
            plain.language_model(theirs, context.tokenizer),
            plain.language_model(theirs, context.tokenizer, softmax_dtype="float32"),
        )
    )
    exact_model, _ = _models(setup, float32=True)
    exact_lm = evaluate.SharedPrefixLM(exact_model, context.tokenizer, batch_tokens)
    exact = plain.samples(exact_lm, context.tasks, limit)
    shares = _agreement(setup, mine, exact), _agreement(setup, reference, exact)
    difference = _fp32_difference(setup, min(SUBSET, limit or SUBSET))
    return {
        "evaluation": more_is_better(items / seconds[0], items / seconds[1], "items/s", setup.options.repeats),
        "evaluation_same_choice": more_is_better(alike, SAME_CHOICE, "share of items", items, BAR),
        "evaluation_same_choice_softmax": more_is_better(alike_softmax, SAME_CHOICE, "share of items", items, BAR),
        "evaluation_fp32_choice": more_is_better(*shares, "share of items", items),
        "evaluation_fp32_difference": less_is_better(difference, FP32_DIFFERENCE, "nats, the largest", 1, BAR),
    }


def _models(setup: Setup, float32: bool) -> tuple[Any, Any]:
    made = [checkpoint.from_state(setup.context.config, setup.context.state).eval() for _ in range(2)]
    if float32:
        made = [model.float() for model in made]
    made[0].set_attn_implementation("eager")
    return made[0], made[1]


def _values(sample: Mapping[str, Any]) -> list[float]:
    return [response[0] for response in sample["filtered_resps"]]


def _agreement(setup: Setup, first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return the share of items on which two records choose the same answer."""
    pairs = [
        _choice(setup.context.tasks[name], one, name) == _choice(setup.context.tasks[name], other, name)
        for name, found in first.items()
        for one, other in zip(found, second[name], strict=True)
    ]
    return sum(pairs) / len(pairs)


def _choice(task: Any, sample: Mapping[str, Any], name: str) -> int:
    """Return the answer that the task's own metric takes as chosen."""
    values = _values(sample)
    if definitions.metric(name) == "acc_norm":
        choices = task.doc_to_choice(sample["doc"])
        values = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
    return max(range(len(values)), key=lambda index: values[index])


def _fp32_difference(setup: Setup, limit: int) -> float:
    context = setup.context
    ours, theirs = _models(setup, float32=True)
    own = evaluate.SharedPrefixLM(ours, context.tokenizer, context.settings.batch_tokens)
    mine = plain.samples(own, context.tasks, limit)
    reference = plain.samples(plain.language_model(theirs, context.tokenizer), context.tasks, limit)
    return max(
        abs(one - other)
        for name, found in mine.items()
        for pair in zip(found, reference[name], strict=True)
        for one, other in zip(_values(pair[0]), _values(pair[1]), strict=True)
    )


def recovery(setup: Setup) -> dict[str, Figure]:
    """Compare ``recover.run`` with transformers' Trainer and PEFT's defaults: rows a second.

    The same rows, steps, batches, learning rate, schedule and initialization over the same weights in bf16; both end
    with the loss of the held-out rows. The other side has fp32 adapters, torch's dropout, SDPA and rows padded to 256
    tokens; in ``recovery_padded_to_longest`` they are padded to the longest of each batch instead.
    ``recovery_validation_loss`` is the loss of a response token on held-out rows that each side ends with, computed
    alike; they should be within 1 %.
    """
    context = setup.context
    settings = replace(context.settings.recover, target="answers", answers_weight=0.0)  # as the paper has it
    padding, seed = context.tokenizer.pad_token_id, context.settings.seed
    rows = list(chain(*islice(recover.endless(context.train, settings.batch_size, seed), settings.steps)))
    losses: dict[str, float] = {}

    def ours() -> float:
        model = assemble(context, setup.low)

        def work() -> None:
            read = Rows(context.train, context.validation, padding)
            losses["ours"] = recover.run(model, read, settings, seed).validation_loss

        return timed(work)

    def theirs(padded: bool) -> float:
        model = plain.from_bank(context, setup.low)
        seconds = timed(lambda: plain.recover(context, model, rows, padded))
        name = "theirs" if padded else "longest"
        held_out = loss.row_losses(model, context.validation, settings.micro_batch_size, padding)
        losses[name], _ = loss.mean_loss(held_out)
        return seconds

    sides = (ours, lambda: theirs(True), lambda: theirs(False))
    interleaved(*sides, repeats=1)  # the first pass of each side generates its kernels
    repeats = setup.options.repeats
    seconds = interleaved(*sides, repeats=repeats)
    setup.seconds["ours", "recover"], setup.seconds["theirs", "recover"], _ = seconds
    for name, found in (("recovery", rows), ("validation", context.validation)):
        setup.work[f"{name}_tokens"] = sum(len(row.tokens) for row in found)
        setup.work[f"{name}_heads"] = sum(sum(end - max(start, 1) for start, end in row.responses) for row in found)
    rates = [len(rows) / value for value in seconds]
    return {
        "recovery": more_is_better(rates[0], rates[1], "rows/s", repeats),
        "recovery_padded_to_longest": more_is_better(rates[0], rates[2], "rows/s", repeats),
        "recovery_validation_loss": less_is_better(losses["ours"], losses["theirs"], "nats a token", 1),
    }


def assembly(setup: Setup) -> dict[str, Figure]:
    """Compare ``assemble`` from the bank with quantizing every linear and LoftQ by full SVDs: seconds."""
    repeats = setup.options.repeats
    ours, theirs = interleaved(
        lambda: timed(lambda: assemble(setup.context, setup.low)),
        lambda: timed(lambda: plain.assemble(setup.context, setup.low)),
        repeats=repeats,
    )
    setup.seconds["ours", "assemble"], setup.seconds["theirs", "assemble"] = ours, theirs
    return {"assembly": less_is_better(ours, theirs, "s", repeats)}


def loftq_svd(setup: Setup) -> dict[str, Figure]:
    """Compare ``quantize.low_rank`` with torch's full SVD on one residual of NF4, 4096 x 11008, rank 8: seconds.

    The matrix is normal. ``loftq_residual`` is the norm that the adapter leaves, against the least possible one; it
    should be within 0.1 %. The full SVD takes so long that it is made once.
    """
    settings = quantize.Settings("nearest", "nf4", double_quant=False, init="loftq", iterations=1, r=8, lora_alpha=16)
    weight = torch.randn(*setup.options.matrix, generator=torch.Generator().manual_seed(0)) / 50
    residual = weight - quantize.dequantize(quantize.quantize(weight, 4, settings), torch.float32)
    scale = settings.scale
    found: dict[str, quantize.Adapter] = {}

    def ours() -> None:
        found["ours"] = quantize.low_rank(residual, settings.r, scale)

    def theirs() -> None:
        found["theirs"] = plain.low_rank(residual, settings.r, scale)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        fast, full = interleaved(lambda: timed(ours), lambda: timed(theirs), repeats=1)
    norms = {side: (residual - scale * one.b @ one.a).norm().item() for side, one in found.items()}
    return {
        "loftq_svd": less_is_better(fast, full, "s", 1),
        "loftq_residual": less_is_better(norms["ours"], norms["theirs"], "norm; theirs is the optimum", 1),
    }


def trial(setup: Setup) -> dict[str, Figure]:
    """Compare ``trial.run`` with the plain way at equal settings: seconds, whole and by phase.

    Ours is a whole trial, run after one that is not counted (a search runs many). The plain way is the sum of its
    phases as ``assembly``, ``recovery`` and ``evaluation`` measured them in the same process; its evaluation had no
    adapters to compute, ours has. ``assembly_share`` is the assembly's share of the whole, each side of its own.
    """
    needed = {"assemble": assembly, "recover": recovery, "evaluate": evaluation}
    for phase, measure in needed.items():
        if ("theirs", phase) not in setup.seconds:
            measure(setup)
    phases: dict[str, list[float]] = {phase: [] for phase in needed}

    def ours() -> float:
        seconds = trials.run(setup.context, setup.low)[0].seconds
        for phase, value in seconds.items():
            phases[phase].append(value)
        return sum(seconds.values())

    ours()
    for values in phases.values():
        values.clear()
    repeats = setup.options.repeats
    (whole,) = interleaved(ours, repeats=repeats)
    plain_whole = sum(setup.seconds["theirs", phase] for phase in needed)
    setup.seconds["ours", "trial"] = whole
    found = {"trial": less_is_better(whole, plain_whole, "s", repeats)}
    for phase, values in phases.items():
        middle = sorted(values)[len(values) // 2]
        found[f"trial_{phase}"] = less_is_better(middle, setup.seconds["theirs", phase], "s", repeats)
    shares = sorted(phases["assemble"])[repeats // 2] / whole, setup.seconds["theirs", "assemble"] / plain_whole
    return found | {"assembly_share": less_is_better(*shares, "share of a trial", repeats)}


def trial_flops(setup: Setup) -> dict[str, Figure]:
    """Compare the rates of recovery and evaluation with bare bf16 matmuls of the same shapes: GFLOP/s.

    With P the parameters of the blocks' linears, A those of the adapters, V x H the head, T tokens without padding and
    n positions that reach the head, evaluation does ``T 2 P + n 2 V H`` operations, and recovery
    ``T (2 * 2 P + 3 * 2 A) + n (2 * 2 V H)``: forward and the gradient of the inputs, for adapters also that of the
    weights; then ``T (2 P + 2 A) + n 2 V H`` for the held-out rows at its end. The limit: all linears of the pruned
    model and its head once, 1,024 rows each, as bare ``F.linear``.
    """
    for phase, measure in {"recover": recovery, "evaluate": evaluation}.items():
        if ("theirs", phase) not in setup.seconds:
            measure(setup)
    config, work = setup.context.config, setup.work
    shapes = [
        architecture.linear_shape(config, shape, name)
        for shape in architecture.shapes(config)
        for name in architecture.linear_names(config)
    ]
    head = config.vocab_size * config.hidden_size
    linears = sum(outputs * inputs for outputs, inputs in shapes)
    adapters = setup.context.bank.settings.r * sum(outputs + inputs for outputs, inputs in shapes)
    forward = work["evaluation_tokens"] * 2 * linears + work["evaluation_heads"] * 2 * head
    training = work["recovery_tokens"] * (4 * linears + 6 * adapters) + work["recovery_heads"] * 4 * head
    training += work["validation_tokens"] * 2 * (linears + adapters) + work["validation_heads"] * 2 * head
    repeats = setup.options.repeats
    limit = matmul_rate([*shapes, (config.vocab_size, config.hidden_size)], repeats, setup.context.compute.dtype)
    found = {}
    for name, phase, operations in (("recovery", "recover", training), ("evaluation", "evaluate", forward)):
        rate = operations / setup.seconds["ours", phase]
        found[f"trial_flops_{name}"] = more_is_better(rate / 1e9, limit / 1e9, "GFLOP/s", repeats, LIMIT)
    return found


@torch.inference_mode()
def matmul_rate(shapes: list[tuple[int, int]], repeats: int, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of bare matmuls of these shapes, one after the other."""
    seconds = 0.0
    for outputs, inputs in set(shapes):
        rows = torch.randn(ROWS, inputs, dtype=dtype)
        weight = torch.randn(outputs, inputs, dtype=dtype)
        F.linear(rows, weight)  # generates the kernel
        (once,) = interleaved(partial(timed, partial(F.linear, rows, weight)), repeats=repeats)
        seconds += once * shapes.count((outputs, inputs))
    return sum(2 * ROWS * outputs * inputs for outputs, inputs in shapes) / seconds
