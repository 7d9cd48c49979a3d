"""What a built model costs to run: bytes, memory and tokens a second in llama.cpp, and what follows from its shapes."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline import architecture
from pipeline.architecture import Config
from pipeline.export import llama
from pipeline.export.llama import Speed

PROMPT, GENERATED = 128, 32  # tokens of a round
_CACHE_BYTES = 2  # llama.cpp keeps keys and values in 16 bits


@dataclass(frozen=True)
class Timed:
    """What one file did, round by round.

    Attributes:
        rounds: Speed of each round.
        resident_bytes: Memory of the process beyond what it held before the file was loaded, after the rounds.
    """

    rounds: Sequence[Speed]
    resident_bytes: int

    @property
    def prompt(self) -> float:
        """Return the median of the prompt's tokens a second."""
        return median(speed.prompt for speed in self.rounds)

    @property
    def generated(self) -> float:
        """Return the median of the generated tokens a second."""
        return median(speed.generated for speed in self.rounds)


def interleaved(
    files: Mapping[str, Path], rounds: int, threads: int, vocabulary: int, adapters: Mapping[str, Path] | None = None
) -> dict[str, Timed]:
    """Time files against each other in llama.cpp, one after the other in every round, so that they meet the same load.

    Args:
        files: Name -> GGUF file.
        rounds: How often each is timed, after a round that does not count.
        threads: Threads of llama.cpp.
        vocabulary: Tokens to draw prompts from.
        adapters: Name -> GGUF file of adapters to add.
    """
    generator = random.Random(0)
    speeds: dict[str, list[Speed]] = {name: [] for name in files}
    with ExitStack() as stack:
        loaded = {
            name: stack.enter_context(
                llama.running(file, threads, PROMPT + GENERATED, adapters=(adapters or {}).get(name))
            )
            for name, file in files.items()
        }
        for number in range(rounds + 1):
            prompt = [generator.randrange(vocabulary) for _ in range(PROMPT)]
            for name, model in loaded.items():
                speed = model.speed(prompt, GENERATED)
                if number:
                    speeds[name].append(speed)
        return {name: Timed(speeds[name], model.resident_bytes()) for name, model in loaded.items()}


@torch.inference_mode()
def in_transformers(model: Any, rounds: int) -> Timed:
    """Time a model in transformers, with bitsandbytes' modules where it has them.

    Args:
        model: A causal language model, plain or wrapped by PEFT.
        rounds: How often, after a round that does not count.
    """
    device, generator = model.device, torch.Generator().manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    speeds = []
    for number in range(rounds + 1):
        prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=generator).to(device)
        start = _now(device)
        model(input_ids=prompt)
        read = _now(device) - start
        length = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED}
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
        written = _now(device) - start - 2 * read  # the prompt was read once more
        if number:
            speeds.append(Speed(PROMPT / read, GENERATED / max(written, 1e-9)))
    return Timed(speeds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how many times as fast one is as the other: the median over the rounds, each round's own ratio."""
    return median(a / b for a, b in zip(one, other, strict=True))


def analytic(config: Config) -> dict[str, float]:
    """Return what follows from the shapes: parameters, multiply-adds of a token, bytes of keys and values a token.

    Multiply-adds are those of the linears and the head; attention over earlier tokens comes on top.
    """
    shapes, size = architecture.shapes(config), architecture.head_dim(config)
    linear = sum(
        outputs * inputs
        for shape in shapes
        for outputs, inputs in (
            architecture.linear_shape(config, shape, name) for name in architecture.linear_names(config)
        )
    )
    return {
        "parameters": architecture.parameters(config),
        "multiply_adds": linear + config.vocab_size * config.hidden_size,
        "cache_bytes": sum(2 * shape.kv_heads * size * _CACHE_BYTES for shape in shapes),
    }
