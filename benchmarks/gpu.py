"""What a trial of a large model costs on a GPU, beside the plain way; needs a GPU, and no weights.

    python -m benchmarks.gpu TOKENIZER [preset] [ratio] [--steps N] [--limit N]

A random model of a preset's shapes (llama-7b), pruned to equal blocks by the ratio (0.2), a quarter of the blocks at 8
bits and the rest at 4 in bitsandbytes' modules, with the sample rows and items, read by the tokenizer in a folder. The
plain way: transformers' Trainer over the same modules with rows padded to 256 tokens, and lm-eval's own model with 16
and with 64 requests a batch. Each side runs once before it is timed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import plain
from benchmarks.harness import markdown, timed
from pipeline import GIB, architecture, checkpoint
from pipeline.compress import bank_writer, layer_bank, quantize
from pipeline.data import alpaca, tasks
from pipeline.device import Compute
from pipeline.results import plan
from pipeline.settings import settings_of
from pipeline.stages import trials
from pipeline.trial import evaluate, even, loss, recover, trial
from pipeline.trial.assemble import assemble
from pipeline.trial.context import Context, Passes
from pipeline.trial.recover import Rows

DEVICE = torch.device("cuda")


def random_context(
    asked: plan.Asked,
    ratio: float,
    tokenizer: Any,
    steps: int,
    limit: int,
    folder: Path,
    device: torch.device = DEVICE,
) -> Any:
    """Return a trial's context of a random model, its bank made on the device; print how long the bank took."""
    params = asked.params
    config = even.pruned(asked.config, ratio, multiple_of=8)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.max_position_embeddings = max(config.max_position_embeddings, 2048)
    torch.manual_seed(0)
    with device:
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    state = {name: tensor.cpu() for name, tensor in state.items()}
    groups, adapters = (
        layer_bank.groups_of(config),
        settings_of(quantize.Settings, params.quantize, method="nearest", init="loftq"),
    )
    spent = seconds(lambda: bank_writer.write(state, groups, adapters, 0, folder, device))
    size = sum(state[f"{name}.weight"].numel() for name in layer_bank.names_of(config))
    print(f"layer bank of {size / 1e9:.2f}e9 parameters: {spent:.1f} s\n", flush=True)
    settings = params.recover.model_copy(update={"steps": steps, "warmup_steps": 1, "save_every": 0})
    scored = params.evaluate.model_copy(update={"limit": limit})
    params = params.model_copy(update={"recover": settings, "evaluate": scored})
    train, held_out = alpaca.split(alpaca.read("data/sample/alpaca.jsonl"), 16, params.seed)
    rows, validation = (alpaca.encode(part, tokenizer, settings.max_length) for part in (train, held_out))
    loaded = tasks.load(params.evaluate.tasks, Path("data/sample/benchmarks"))
    units = architecture.units(config, "block")
    compute = Compute(device, torch.bfloat16 if device == DEVICE else torch.float32)
    state = {name: tensor.to(compute.dtype) for name, tensor in state.items()}
    bank, how = layer_bank.Bank(folder), trials.settings(params)
    return Context(config, state, bank, tokenizer, units, loaded, rows, validation, how, compute)


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds of some work on the GPU."""
    if not torch.cuda.is_available():
        return timed(work)

    def finished() -> None:
        work()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return timed(finished)


Lines = list[list[str]]
Make = Callable[[Any, Path], Any]  # of a tokenizer and a folder a context


def a_trial(context: Any, bits: list[int]) -> Lines:
    """Return the phases of a trial, and its peaks beside the predicted ones, after a short one that is not counted."""
    trial.run(context, bits, trial.Work(steps=2, limit=2))
    gc.collect()
    held = torch.cuda.memory_allocated()
    result, _ = trial.run(context, bits)
    found = [[f"trial: {phase}, s", f"{value:.1f}", "-", "-"] for phase, value in result.seconds.items()]
    of_run = result.memory.of_run
    passes = Passes(of_run["run_micro_batch_size"], of_run["run_batch_tokens"])
    found.append(["passes: rows in recovery, tokens in evaluation", f"{passes.rows}, {passes.tokens}", "-", "-"])
    predicted = context.predict_run(bits, passes)
    peaks = {
        "training": (of_run["run_peak_memory_bytes"] - held, predicted.training),
        "inference": (of_run["run_inference_memory_bytes"] - held, predicted.inference),
    }
    for step, (real, guess) in peaks.items():
        error = f"{100 * (guess / real - 1):+.2f} %"
        found.append([f"peak of {step}, GiB: measured, predicted", f"{real / GIB:.3f}", f"{guess / GIB:.3f}", error])
    return found


def evaluation(context: Any, bits: list[int]) -> Lines:
    """Return items a second."""
    model, limit = assemble(context, bits).eval(), context.settings.limit
    count: list[int] = []

    def own() -> None:
        found = evaluate.run(model, context.tokenizer, context.tasks, limit, context.settings.batch_tokens)
        count.append(found.items)

    own()
    ours, found = seconds(own), []
    for size in (16, 64):
        lm = plain.language_model(model, context.tokenizer, batch_size=size)
        theirs = seconds(partial(plain.samples, lm, context.tasks, limit))
        rates = (f"{count[0] / one:.1f}" for one in (ours, theirs))
        found.append([f"evaluation, items/s; theirs {size} a batch", *rates, f"{theirs / ours:.2f}"])
    return found


def recovery(context: Any, bits: list[int]) -> Lines:
    """Return rows a second, the loss after it, and the rate of operations."""
    settings, padding, seed = context.settings.recover, context.tokenizer.pad_token_id, context.settings.seed
    taken = list(chain(*islice(recover.endless(context.train, settings.batch_size, seed), settings.steps)))
    losses: list[float] = []

    def own() -> float:
        model = assemble(context, bits)
        rows = Rows(context.train, context.validation, padding)
        spent = seconds(lambda: recover.run(model, rows, settings, seed))
        held_out = loss.row_losses(model, context.validation, settings.micro_batch_size, padding)
        losses.append(loss.mean_loss(held_out)[0])
        return spent

    def other() -> float:
        model = plain.from_bank(context, bits)
        spent = seconds(lambda: plain.recover(context, model, taken, True))
        held_out = loss.row_losses(model, context.validation, settings.micro_batch_size, padding)
        losses.append(loss.mean_loss(held_out)[0])
        return spent

    ours, theirs = own(), other()
    rates = (f"{len(taken) / one:.1f}" for one in (ours, theirs))
    linears = sum(context.state[f"{name}.weight"].numel() for name in layer_bank.names_of(context.config))
    done = 4 * linears * sum(len(one.tokens) for one in taken)
    return [
        ["recovery, rows/s", *rates, f"{theirs / ours:.2f}"],
        ["loss of held-out rows after it, nats", *(f"{loss:.3f}" for loss in losses), "-"],
        [
            "recovery, TFLOP/s; theirs a bare bf16 matmul",
            f"{done / ours / 1e12:.0f}",
            f"{matmul_rate() / 1e12:.0f}",
            "-",
        ],
    ]


def matmul_rate() -> float:
    """Return the operations a second of a large matrix product."""
    a, b = (torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((4096, 8192), (8192, 8192)))
    a @ b
    return 20 * 2 * 4096 * 8192 * 8192 / seconds(lambda: [a @ b for _ in range(20)])


def a_quarter_at_8(context: Any) -> list[int]:
    """Return the bit vector that is measured: every fourth unit at 8 bits, the others at 4."""
    return [4 if index % 4 else 8 for index in range(len(context.units))]


def command_line(name: str, about: str | None) -> argparse.ArgumentParser:
    """Return what a random model's benchmark is asked for: a tokenizer, its shapes, steps and items."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("preset", nargs="?", default="llama-7b")
    parser.add_argument("ratio", nargs="?", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--limit", type=int, default=24)
    return parser


@contextmanager
def context_of(asked: argparse.Namespace, make: Make | None = None) -> Iterator[Any]:
    """Yield the context that a command line asks for, with libraries that say little.

    Args:
        asked: As ``command_line`` reads it.
        make: Makes it otherwise, of the tokenizer and a folder for the bank.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    checkpoint.quiet()
    tokenizer = checkpoint.load_tokenizer(asked.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if make is not None:
            yield make(tokenizer, folder)
            return
        wanted = plan.asked(asked.preset, "24")
        yield random_context(wanted, asked.ratio, tokenizer, asked.steps, asked.limit, folder)


def main() -> None:
    """Run the command line."""
    asked = command_line("gpu", __doc__).parse_args()
    with context_of(asked) as context:
        bits = a_quarter_at_8(context)
        rows: Lines = []
        for measure in (a_trial, evaluation, recovery):
            rows += measure(context, bits)
            print(rows, flush=True)  # all that is measured stays known if a later part fails
    name = torch.cuda.get_device_name()
    print(f"\n{asked.preset}, {100 * asked.ratio:.0f} % pruned, random weights, on one {name}\n")
    print(markdown(["what", "ours", "theirs", "ratio"], rows))


if __name__ == "__main__":
    main()
