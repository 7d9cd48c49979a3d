"""The memory predictor against the allocations of real steps, on a CPU or on a GPU.

    python -m benchmarks.memory [cuda]

Random weights in bitsandbytes' own modules. Training: two optimizer steps of ``recover.run``, two micro-batches each.
Inference: one tree-masked batch of ``scoring.score``. On a CPU PyTorch's profiler records the allocations and the
prediction is the CPU's trace (``kernels.CPU``): two minutes; the last row has the shapes of ``artifacts/base``. On a
GPU the allocator itself says its peak, less what it held before (cuBLAS's workspaces), and the prediction is
``memory.predict``'s; it goes on with LLaMA-7B, pruned to equal blocks, with the batches of its preset.
"""

import gc
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from pipeline import architecture, checkpoint, checks
from pipeline.architecture import BlockShape
from pipeline.compress import bank_writer, layer_bank, quantize
from pipeline.data.alpaca import Example
from pipeline.device import Compute
from pipeline.results import plan
from pipeline.settings import settings_of
from pipeline.stages import trials
from pipeline.trial import even, kernels, memory, recover, scoring, traced
from pipeline.trial.assemble import assemble
from pipeline.trial.context import Context
from pipeline.trial.fast import Ways
from pipeline.trial.recover import Rows
from pipeline.trial.setting import Setting
from pipeline.trial.trees import Request, trees

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "head_dim": 32,
    "pad_token_id": 0,  # some families have one beyond this vocabulary
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 352}


@dataclass(frozen=True)
class Case:
    """One row: a model's shapes, its bits (``mixed``: random), batch shapes and adapter sizes.

    With a ``ratio`` the model is LLaMA-7B, pruned by it.
    """

    name: str
    bits: str = "mixed"
    family: str = "llama"
    shapes: tuple[tuple[int, int, int], ...] = ()
    rows: int = 4
    length: int = 128
    inference: tuple[int, int] = (4, 128)
    r: int = 8
    double_quant: bool = False
    gradient_checkpointing: bool = False
    ratio: float | None = None
    teacher: bool = False
    fast: bool = False

    @property
    def setting(self) -> Setting:
        """Return what the predictor takes."""
        return Setting(
            self.rows * self.length, self.r, self.double_quant, self.inference[0] * self.inference[1],
            self.rows, self.inference[0], gradient_checkpointing=self.gradient_checkpointing,
            teacher=self.teacher, fast=self.fast,
        )  # fmt: skip

    def config(self) -> Any:
        """Return the model's config, as a pruned one."""
        if self.ratio is not None:
            return even.pruned(plan.asked("llama-7b", "24").config, self.ratio, multiple_of=8)
        if self.name == "SmolLM2's shapes":
            config = checkpoint.load_config("artifacts/base")
        else:
            about = architecture.FAMILIES[self.family]
            config_class = getattr(transformers, about.config_class)
            sizes = SMALL | (EXPERTS if about.experts else {})
            config = config_class(**sizes, tie_word_embeddings=self.family != "llama")
        shapes = [BlockShape(*shape) for shape in self.shapes] or architecture.shapes(config)
        return checkpoint.pruned_config(config, shapes)


PRUNED = ((8, 4, 700), (4, 2, 332), (2, 1, 704), (6, 3, 512))  # int8 on a GPU needs multiples of 4
CASES = [
    Case("dense", "16"),
    Case("all 4", "4"),
    Case("all 8", "8"),
    Case("mixed"),
    Case("mixed, scales quantized", double_quant=True),
    Case("pruned, a shape a block", shapes=PRUNED),
    Case("pruned, 16-bit", "16", shapes=PRUNED),
    Case("mistral", family="mistral"),
    Case("qwen2, pruned", family="qwen2", shapes=PRUNED),
    Case("qwen3", family="qwen3"),
    Case("qwen3_moe, pruned", family="qwen3_moe", shapes=((8, 4, 352), (4, 2, 332), (2, 1, 352), (6, 3, 128))),
    Case("smollm3", family="smollm3"),
    Case("olmo2, pruned", family="olmo2", shapes=PRUNED),
    Case("gemma3", family="gemma3_text"),
    Case("gemma2, pruned", family="gemma2", shapes=PRUNED),
    Case("phi3, pruned", family="phi3", shapes=PRUNED),
    Case("rank 2", r=2),
    Case("rank 64", r=64),
    Case("one long row", rows=1, length=512, inference=(1, 512)),
    Case("many short rows", rows=16, length=32, inference=(32, 32)),
    Case("gradient checkpointing", gradient_checkpointing=True),
    Case("a teacher's targets", teacher=True),
    Case("fused adapters, all 4, pruned", "4", family="qwen2", shapes=PRUNED, fast=True),
    Case("fused adapters, all 8", "8", fast=True),
    Case("fused adapters, 16-bit", "16", fast=True),
    Case("fused adapters, mixed, pruned", family="qwen2", shapes=PRUNED, fast=True),
    Case("SmolLM2's shapes", rows=2, length=64, inference=(2, 128)),
]

LLAMA_7B = [
    replace(Case(name, bits, rows=4, length=256, inference=(64, 128)), ratio=ratio)
    for name, bits, ratio in (
        ("LLaMA-7B at 20 %, all 4", "4", 0.2),
        ("LLaMA-7B at 20 %, mixed", "mixed", 0.2),
        ("LLaMA-7B at 20 %, 16-bit", "16", 0.2),
        ("LLaMA-7B at 50 %, mixed", "mixed", 0.5),
    )
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def peak_of(work: Callable[[], Any]) -> int:
    """Return the most bytes that some work allocates and holds at once, by the profiler's record on a CPU.

    What was there before and ends meanwhile is not taken off: its record may be missing, or be that of what had the
    same address while an earlier record was made.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    live: dict[int, int] = {}
    now = most = 0
    for event in sorted(allocations(record.profiler.kineto_results.experimental_event_tree()), key=lambda one: one[0]):
        _, address, size = event
        if size > 0:
            live[address] = size
            now += size
            most = max(most, now)
        else:
            now -= live.pop(address, 0)
    return most


def allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Yield time, address and bytes of all allocations in a profiler's record; what ends has less than 0 bytes."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from allocations(event.children)


def context_of(case: Case, folder: Path, device: torch.device = CPU) -> Context:
    """Return what a trial needs: random weights and their layer bank."""
    raw = checks.load("params.yaml")
    sizes = {"r": case.r, "double_quant": case.double_quant}
    settings = settings_of(quantize.Settings, raw.quantize, method="nearest", init="gaussian", **sizes)
    torch.manual_seed(0)
    config = case.config()
    with device:
        state = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    state = {name: tensor.cpu() for name, tensor in state.items()}
    bank_writer.write(state, layer_bank.groups_of(config), settings, 0, folder, device)
    target = "teacher" if case.teacher else "answers"
    batch = {"target": target, "batch_size": 2 * case.rows, "micro_batch_size": case.rows, "max_length": case.length}
    chosen = trials.settings(raw.model_copy(update={"recover": raw.recover.model_copy(update=batch)}))
    units = architecture.units(config, "group")
    bank = layer_bank.Bank(folder)
    tokenizer: Any = None  # the steps begin with tokens
    return Context(config, state, bank, tokenizer, units, {}, [], [], chosen, Compute(device, torch.bfloat16))


def bytes_of(model: Any) -> int:
    """Return the bytes of a real model's storages."""
    held = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in every(model)}
    return sum(held.values())


def every(model: Any) -> list[torch.Tensor]:
    """Return all tensors of a real model, the scales that 8-bit modules keep aside included."""
    aside = [getattr(module, "state", None) for module in model.modules()]
    kept = [getattr(state, name, None) for state in aside for name in ("CB", "SCB")]
    return [one for one in [*traced.tensors(model), *kept] if isinstance(one, torch.Tensor)]


def real(case: Case, context: Context, bits: tuple[int, ...]) -> tuple[int, int]:
    """Return the peaks of real training and real inference."""
    if context.device == CUDA:
        for dtype in (torch.float32, torch.bfloat16):  # cuBLAS takes its workspaces
            ones = torch.ones(64, 64, device=CUDA, dtype=dtype, requires_grad=True)
            torch.nn.functional.linear(ones, ones, ones[0]).sum().backward()
        del ones
        gc.collect()
        before = torch.cuda.memory_allocated()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (4 * case.rows, case.length), generator=generator).tolist()
    examples = [Example(tuple(row), 1) for row in ids]
    model = assemble(context, bits, real=True)
    if case.gradient_checkpointing:
        base_model: Any = model.get_base_model()
        base_model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = replace(context.settings.recover, steps=2)

    # All that a training needs of a teacher: a vector a response token.
    targets = {row: torch.randn(len(row.tokens) - 1, context.config.hidden_size).bfloat16() for row in examples}

    def trained() -> None:
        ways = Ways(flat=case.fast, fused=case.fast)
        recover.run(model, Rows(examples, examples[: case.rows], 0, targets), settings, 0, ways=ways)

    if context.device == CUDA:
        training = (memory.measured(trained, CUDA)[1] or 0) - before
        del model
        gc.collect()
    else:
        base = bytes_of(model)
        # The one vector takes the adapters' place; a record does not show the end of what was there before it.
        gone = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad) if case.fast else 0
        training = base - gone + peak_of(trained)

    fresh = assemble(context, bits, real=True).eval()
    rows, length = case.inference
    half = length // 2  # a shared half and two branches of a quarter each
    requests = []
    for row in torch.randint(2, 1000, (rows, length + 2), generator=generator).tolist():
        shared, rest = row[:half], row[half:]
        middle = len(rest) // 2
        requests += [Request((*shared, *part), 1) for part in (rest[:middle], rest[middle:])]
    batch = trees(requests)
    assert {tree.size for tree in batch} == {length}

    @torch.inference_mode()
    def scored() -> None:
        list(scoring.score(fresh, requests, length, [[tree] for tree in batch]).read())

    if context.device == CUDA:
        return training, (memory.measured(scored, CUDA)[1] or 0) - before
    return training, base + peak_of(scored)


def predicted(case: Case, config: Any, widths: dict[str, int]) -> tuple[int, int]:
    """Return the peaks that the trace gives for a CPU."""

    def trace(step: Callable[..., tuple[int, int]]) -> int:
        return step(traced.model_of(config, widths, case.setting, kernels.CPU), case.setting, kernels.CPU)[1]

    return trace(traced.training), trace(traced.inference)


def compare(case: Case, device: torch.device = CPU) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (real, predicted) peaks of training and inference."""
    with tempfile.TemporaryDirectory() as folder:
        context = context_of(case, Path(folder), device)
        draw = random.Random(1)
        bits = tuple(draw.choice((4, 8)) if case.bits == "mixed" else int(case.bits) for _ in context.units)
        widths = context.widths(bits)
        if device == CPU:
            guess = predicted(case, context.config, widths)
        else:
            peak = memory.predict(context.config, widths, case.setting)
            guess = peak.training, peak.inference
        return real(case, context, bits), guess


def main(device: torch.device) -> None:
    """Print predicted and real peaks of all cases as a Markdown table."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    checkpoint.quiet()
    print("| case | training, MB | predicted | error | inference, MB | predicted | error |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES if device == CPU else [*CASES[:-1], *LLAMA_7B]:
        cells = [
            f"{found / 1e6:.2f} | {guess / 1e6:.2f} | {100 * (guess / found - 1):+.3f} %"
            for found, guess in zip(*compare(case, device), strict=True)
        ]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(CUDA if sys.argv[1:] == ["cuda"] else CPU)
