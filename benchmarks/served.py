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
from types import SimpleNamespace
from typing import Any

import torch

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
    model = served.Compressed()
    model.load_context(SimpleNamespace(artifacts={"checkpoint": str(folder)}))  # type: ignore[arg-type]
    asked = [ASKED[number % len(ASKED)] for number in range(prompts)]
    params: dict[str, object] = {"max_new_tokens": tokens}
    model.predict(None, asked[:1], {"max_new_tokens": 2})
    rounds = []
    for _ in range(repeats):
        *batch, together = timed(lambda: model.predict(None, asked, params))
        *single, alone = timed(lambda: [model.predict(None, [one], params)[0] for one in asked])
        rounds.append((batch, single, sum(map(str.__eq__, together, alone))))
    for name, place in (("clock", 0), ("processor", 1)):
        ours, theirs = (median(one[side][place] for one in rounds) for side in (0, 1))
        print(f"{name}: batch {ours:.2f} s, {prompts} calls {theirs:.2f} s, ratio {theirs / ours:.2f}")
    print(f"equal answers: {rounds[-1][2]} of {prompts}; {torch.get_num_threads()} threads, {model.model.dtype}")


if __name__ == "__main__":
    base, *rest = sys.argv[1:]
    given = {"prompts": 8, "tokens": 32, "repeats": 3, "threads": 2}
    given |= {key: int(value) for key, value in (item.split("=", 1) for item in rest)}
    torch.set_num_threads(given.pop("threads"))
    main(Path(base), **given)
