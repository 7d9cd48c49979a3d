"""What the ways of a GPU are worth, each beside the plain path in the same run: for a session of 15 minutes on an H100.

    python -m benchmarks.h100 TOKENIZER [preset] [ratio] [--steps N] [--limit N] [--out FILE] [--search]
    python -m benchmarks.h100 TOKENIZER --tiny

A random model of a preset's shapes (llama-7b), pruned to equal blocks by the ratio (0.2), a quarter of the blocks at 8
bits, with the sample rows and items, read by the tokenizer in a folder. First a profile of two steps of the plain path
and of the fast one: the share of the time in which the GPU computes, and the kernels that take the most of it. Then
recovery, one way more a line (``trial/fast.py``), on the sample rows and on rows of full length; evaluation with the
user's passes and with those that fill the GPU; a search of 50 trials on paper; ``tests/test_cuda.py``; and with
``--search`` the default search, for which this must be a clone that has none of its results. Operations are counted as
everywhere here: 4 for a weight of the linears and a token without padding. Prints one table, writes the same as JSON,
and says which of the aims are met. A part that fails is shown as failed, and the others still run. ``--tiny`` runs all
of it but the last two on a tiny model on a CPU, to see that it runs: its figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import DEVICE, a_quarter_at_8, command_line, context_of, random_context, seconds
from benchmarks.harness import markdown
from pipeline import GIB
from pipeline.compress import layer_bank
from pipeline.data.alpaca import Example
from pipeline.results import plan
from pipeline.trial import evaluate, memory, recover
from pipeline.trial.assemble import assemble
from pipeline.trial.context import Context, Passes, memory_setting
from pipeline.trial.fast import PLAIN, Ways
from pipeline.trial.recover import Rows

FAST = Ways(flat=True, packed=True, fused=True)
TRIALS, STEPS = 50, 1000  # of the search on paper
ROW_TOKENS = 183  # of its rows: what 11.3 hours at 37 TFLOP/s come to
SEARCH = "default search, minutes"
TESTS = ("tests/test_cuda.py, minutes", "pytest", "tests/test_cuda.py", "-q", "-p", "no:cacheprovider")
_LONGEST = 300  # seconds of a command
COLUMNS = ["what", "rows/s", "TFLOP/s", "peak, GiB", "predicted", "loss", "times"]
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 2048,
}  # fmt: skip
Line = dict[str, Any]


def variants(context: Context) -> list[tuple[str, int, Ways]]:
    """Return what is compared: a name, rows of full length a pass, and the ways; each adds to the one before it."""
    recovery = context.settings.recover
    found = [
        ("plain", recovery.micro_batch_size, PLAIN),
        ("+ full passes", recovery.batch_size, PLAIN),
        ("+ one vector, losses read later", recovery.batch_size, Ways(flat=True)),
        ("+ packed rows", recovery.batch_size, Ways(flat=True, packed=True)),
        ("+ fused adapters", recovery.batch_size, FAST),
    ]
    if context.device.type == "cuda":
        return [*found, ("+ graphs", recovery.batch_size, replace(FAST, graphs=True))]
    return found


def full_rows(context: Context) -> list[Example]:
    """Return rows of random tokens that are as long as rows may be, all but the first predicted."""
    settings = context.settings.recover
    generator = torch.Generator().manual_seed(0)
    shape = settings.batch_size * settings.steps, settings.max_length
    rows = torch.randint(2, context.config.vocab_size, shape, generator=generator)
    return [Example(tuple(row), 1) for row in rows.tolist()]


def allocated(context: Context) -> int:
    """Return the bytes that are allocated on the GPU between two measurements, such as cuBLAS's workspaces."""
    gc.collect()
    return torch.cuda.memory_allocated() if context.device == DEVICE else 0


def recovered(context: Context, bits: Sequence[int], rows: Sequence[Example], micro: int, ways: Ways) -> Line:
    """Recover a fresh model and return rows a second, TFLOP/s, peaks and the loss of held-out rows."""
    settings, seed = replace(context.settings.recover, micro_batch_size=micro), context.settings.seed
    read = Rows(rows, context.validation[:8], context.tokenizer.pad_token_id)
    spent: list[float] = []

    def work(steps: int) -> recover.Recovered:
        model = assemble(context, bits)
        results: list[recover.Recovered] = []
        done = replace(settings, steps=steps)
        spent.append(seconds(lambda: results.append(recover.run(model, read, done, seed, ways=ways))))
        return results[0]

    work(1)  # kernels are loaded, cuBLAS takes its workspaces
    held = allocated(context)
    result, peak = memory.measured(lambda: work(settings.steps), context.device)
    taken = list(chain(*islice(recover.endless(rows, settings.batch_size, seed), settings.steps)))
    linears = sum(context.state[f"{name}.weight"].numel() for name in layer_bank.names_of(context.config))
    setting = memory_setting(replace(settings, fast=ways.fused), context.settings.batch_tokens, context.bank.settings)
    predicted = memory.predict(context.config, context.widths(bits), setting).training
    return {
        "rows/s": len(taken) / spent[-1],
        "TFLOP/s": 4 * linears * sum(len(row.tokens) for row in taken) / spent[-1] / 1e12,
        "peak, GiB": None if peak is None else (peak - held) / GIB,
        "predicted": predicted / GIB,
        "loss": result.validation_loss,
    }


def recoveries(context: Context, bits: Sequence[int]) -> Iterator[Line]:
    """Yield a line for each variant, on the sample rows and on full ones; ``times`` is against the plain path."""
    for kind, rows in (("sample rows", context.train), ("full rows", full_rows(context))):
        first = None
        for name, micro, ways in variants(context):
            try:
                line = recovered(context, bits, rows, micro, ways)
            except Exception:  # the other variants are still to be measured; the traceback is in the output
                traceback.print_exc()
                yield {"what": f"{kind}: {name}", "failed": True}
                continue
            first = first or line["rows/s"]
            yield {"what": f"{kind}: {name}", **line, "times": line["rows/s"] / first}
            gc.collect()


def profiled(context: Context, bits: Sequence[int]) -> Iterator[Line]:
    """Yield the share of two steps' time in which the GPU computes; print the kernels that take the most of it."""
    on_gpu = context.device.type == "cuda"
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    for name, micro, ways in (variants(context)[0], ("fast", context.settings.recover.batch_size, FAST)):
        model = assemble(context, bits)
        settings = replace(context.settings.recover, steps=2, micro_batch_size=micro)
        read = Rows(context.train, context.validation[:1], context.tokenizer.pad_token_id)

        def work(model: Any = model, read: Rows = read, settings: Any = settings, ways: Ways = ways) -> None:
            recover.run(model, read, settings, context.settings.seed, ways=ways)

        work()
        with profile(activities=[kind]) as record:
            spent = seconds(work)
        column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        print(f"\n{name}\n{record.key_averages().table(sort_by=column, row_limit=12)}", flush=True)
        busy = sum(getattr(event, column) for event in record.key_averages()) / 1e6
        yield {"what": f"profile: {name}, share of the time computing", "times": busy / spent}
        gc.collect()


def evaluations(context: Context, bits: Sequence[int]) -> Iterator[Line]:
    """Yield items a second with the user's passes and with those that fill the GPU."""
    held = allocated(context)
    model, users = assemble(context, bits).eval(), context.settings.batch_tokens
    room = memory.room(context.device)
    largest = Passes(1, 2 * users) if room is None else context.passes(bits, room)
    first = 0.0
    for tokens in (users, largest.tokens):
        results: list[Any] = []

        def work(tokens: int = tokens, results: list[Any] = results) -> None:
            found = evaluate.run(model, context.tokenizer, context.tasks, context.settings.limit, tokens)
            results.append(found)

        work()
        spent, peak = memory.measured(partial(seconds, work), context.device)
        rate = results[0].items / spent
        first = first or rate
        predicted = context.predict_run(bits, Passes(context.settings.recover.micro_batch_size, tokens)).inference
        yield {
            "what": f"evaluation, items/s; {tokens} tokens a pass",
            "rows/s": rate,
            "peak, GiB": None if peak is None else (peak - held) / GIB,
            "predicted": predicted / GIB,
            "loss": -results[0].gold_logprob,
            "times": rate / first,
        }


def on_paper(context: Context, lines: Sequence[Line]) -> Iterator[Line]:
    """Yield the hours of a search of 50 trials of 1,000 steps from what was measured, before and after."""
    by_name = {line["what"]: line for line in lines if "rows/s" in line}
    rates = [line["rows/s"] for name, line in by_name.items() if name.startswith("evaluation")]
    linears = sum(context.state[f"{name}.weight"].numel() for name in layer_bank.names_of(context.config))
    operations = 4 * linears * ROW_TOKENS * context.settings.recover.batch_size * STEPS
    for name, rate in zip(("plain", "+ fused adapters"), (rates[0], rates[-1]), strict=True):
        line = by_name.get(f"sample rows: {name}")
        if line is None:
            continue
        hours = TRIALS * (operations / line["TFLOP/s"] / 1e12 + 7 * 200 / rate) / 3600
        yield {"what": f"hours of a search on paper: {name}", "times": hours}


def command(what: str, *arguments: str) -> Iterator[Line]:
    """Run a module of Python with the GPU's memory free; yield its minutes and whether it failed."""
    gc.collect()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *arguments], timeout=_LONGEST)
    yield {"what": what, "times": (time.perf_counter() - start) / 60, "failed": done.returncode != 0}


def aims(lines: Sequence[Line]) -> list[list[str]]:
    """Return what is aimed at, as rows of a table: what, the figure, the bar, and whether it is met."""
    by_name = {line["what"]: line for line in lines if not line.get("failed")}
    evaluated = [line for name, line in by_name.items() if name.startswith("evaluation")]
    whole = [by_name[name] for name in ("full rows: plain", "full rows: + fused adapters") if name in by_name]
    off = [abs(line["predicted"] / line["peak, GiB"] - 1) for line in [*whole, *evaluated] if line.get("peak, GiB")]

    def figure(name: str, column: str = "times") -> Any:
        return by_name.get(name, {}).get(column)

    losses = [figure(f"sample rows: {name}", "loss") for name in ("plain", "+ fused adapters")]
    apart = None if None in losses else abs(losses[1] - losses[0])
    fullest = evaluated[-1]["times"] if evaluated else None
    asked: list[tuple[str, float | None, str, float]] = [
        ("recovery of the sample rows, times the plain rows/s", figure("sample rows: + fused adapters"), ">=", 5),
        ("recovery of full rows, TFLOP/s", figure("full rows: + fused adapters", "TFLOP/s"), ">=", 200),
        ("loss of held-out rows off the plain path's, nats", apart, "<=", 0.03),
        ("evaluation, times the items/s with the user's passes", fullest, ">=", 2),
        ("search on paper, hours", figure("hours of a search on paper: + fused adapters"), "<=", 2.5),
        ("default search, minutes", figure(SEARCH), "<=", 4),
        ("prediction off the peak at most, %; full rows and evaluation", 100 * max(off) if off else None, "<=", 1),
    ]
    return [
        [what, "-" if value is None else f"{value:.3g}", f"{sign} {bar:g}", _verdict(value, sign, bar)]
        for what, value, sign, bar in asked
    ]


def _verdict(value: float | None, sign: str, bar: float) -> str:
    if value is None:
        return "not measured"
    return "yes" if (value >= bar if sign == ">=" else value <= bar) else "no"


def table(lines: Sequence[Line]) -> str:
    """Return all lines as one Markdown table."""

    def cell(line: Line, column: str) -> str:
        if column == "what":
            return line["what"] + (" FAILED" if line.get("failed") else "")
        value = line.get(column)
        return "-" if value is None else f"{value:.4g}"

    return markdown(COLUMNS, [[cell(line, column) for column in COLUMNS] for line in lines])


def measure(context: Context, out: Path | None, commands: Sequence[Sequence[str]] = ()) -> list[Line]:
    """Run all parts; what was measured is kept should one of them fail.

    Args:
        context: What trials share.
        out: Where the lines are written to as JSON.
        commands: What is run at last: a name, a module and its arguments.
    """
    bits = a_quarter_at_8(context)
    lines: list[Line] = []
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "profile": lambda: profiled(context, bits),
        "recovery": lambda: recoveries(context, bits),
        "evaluation": lambda: evaluations(context, bits),
        "on paper": lambda: on_paper(context, lines),
        **{given[0]: partial(command, *given) for given in commands},
    }
    for name, part in parts.items():
        try:
            for line in part():
                print(line, flush=True)
                lines.append(line)
        except Exception:  # the other parts are still to be measured; the traceback is in the output
            traceback.print_exc()
            lines.append({"what": name, "failed": True})
        if out is not None:
            out.write_text(json.dumps(lines, indent=1), encoding="utf-8")
    print(f"\n{table(lines)}\n{markdown(['aim', 'measured', 'bar', 'met'], aims(lines))}", flush=True)
    return lines


def tiny_context(tokenizer: Any, folder: Path) -> Context:
    """Return a context of a tiny model on a CPU."""
    asked = plan.asked("llama-7b", "24")
    config = type(asked.config)(**TINY)
    context = random_context(replace(asked, config=config), 0.2, tokenizer, 2, 1, folder, torch.device("cpu"))
    recovery = replace(context.settings.recover, max_length=160, warmup_steps=0, batch_size=4, micro_batch_size=2)
    rows = [row for row in context.train if len(row.tokens) <= 160][:8]
    settings = replace(context.settings, recover=recovery, batch_tokens=512)
    loaded = {name: context.tasks[name] for name in ("winogrande", "piqa")}
    return replace(context, settings=settings, train=rows, validation=rows[:2], tasks=loaded)


def main() -> None:
    """Run the command line."""
    parser = command_line("h100", __doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--search", action="store_true")
    asked = parser.parse_args()
    commands = [] if asked.tiny else [TESTS, *([(SEARCH, "pipeline", "run", "search")] if asked.search else [])]
    with context_of(asked, tiny_context if asked.tiny else None) as context:
        lines = measure(context, asked.out, commands)
    if any(line.get("failed") for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
