"""How fast the registered model's code answers: a batch of prompts against one call for each.

    python -m benchmarks.served artifacts/final [prompts=8] [tokens=32] [repeats=3] [threads=2]

Greedy answers, in turn, medians of the repeats. The prompts ask for stories, so that the answers are about alike in
length: a batch lasts as long as its longest answer. Beside seconds of the clock stand those of the processor, which
other work on the machine disturbs less; and how many answers are the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mlflow.pyfunc.model import PythonModelContext

from pipeline.stages import served

ASKED = tuple(
    f"Write a long story about a {what}."
    for what in ("sailor", "farmer who finds gold", "city under the sea", "lost dog", "teacher", "journey to the moon",
                 "winter night in the mountains", "bridge")
)  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (seconds of the clock, seconds of the processor, the result)."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - processor, result


def main(folder: Path, prompts: int, tokens: int, repeats: int) -> None:
    """Print both sides' seconds, their ratio, and how many answers are equal."""
    model, context = served.Compressed(), PythonModelContext({"checkpoint": str(folder)}, None)
    model.load_context(context)
    asked = [ASKED[number % len(ASKED)] for number in range(prompts)]

    def answers(questions: list[str], count: int = tokens) -> list[str]:
        given = model.predict(context, questions, {"max_new_tokens": count})
        assert isinstance(given, list)  # a chat's answer is a dictionary
        return given

    answers(asked[:1], 2)
    batches, singles = [], []
    for _ in range(repeats):
        *seconds, together = timed(lambda: answers(asked))
        batches.append(seconds)
        *seconds, alone = timed(lambda: [answers([one])[0] for one in asked])
        singles.append(seconds)
    for place, name in enumerate(("clock", "processor")):
        ours, theirs = (median(one[place] for one in side) for side in (batches, singles))
        print(f"{name}: batch {ours:.2f} s, {prompts} calls {theirs:.2f} s, ratio {theirs / ours:.2f}")
    equal = sum(map(str.__eq__, together, alone))
    print(f"equal answers: {equal} of {prompts}; {torch.get_num_threads()} threads, {model.model.dtype}")


if __name__ == "__main__":
    base, *rest = sys.argv[1:]
    given = {"prompts": 8, "tokens": 32, "repeats": 3, "threads": 2}
    given |= {key: int(value) for key, value in (item.split("=", 1) for item in rest)}
    torch.set_num_threads(given.pop("threads"))
    main(Path(base), **given)
