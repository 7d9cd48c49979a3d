"""What codes, starts and targets give: models of one bit-width, before and after recovery, on text that none saw.

    python -m benchmarks.recovery FOLDER text=FILE [steps=32] [limit=200] [bits=4] NAME:KEY=VALUE,... [...]

In a folder with ``artifacts/base``, ``data/`` and ``params.yaml``. An arm is a name and what it changes of the params,
such as ``plain:prune.ratios=0.2,quantize.method=nearest``; of several ratios the first counts. ``bits=16`` and
``steps=0`` may stand among these. Models and banks are kept in ``artifacts/table``, results in
``reports/recovery.json``, so that a killed run goes on.

A line for each arm: perplexity of 20 windows of 256 tokens of the text, loss of held-out responses and divergence from
the dense model there, before and after recovery; then the gold answers of ``limit`` items a task from
``evaluate.limit`` on, and seconds. Then what it gains over the first arm, with paired standard errors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.perplexity import losses
from pipeline import checkpoint, checks, overrides, storage
from pipeline.compress.modules import head_of, last_states
from pipeline.data.alpaca import IGNORED, Example, batches
from pipeline.identity import TRIAL, code
from pipeline.params import Params
from pipeline.paths import BASE
from pipeline.search import paired
from pipeline.stages.supplies import Supplies
from pipeline.trial import loss, teacher, trial
from pipeline.trial.assemble import assemble
from pipeline.trial.context import Context

RESULTS = Path("reports/recovery.json")


@dataclass(frozen=True)
class Arm:
    """A model to recover.

    Attributes:
        name: What it is called.
        changes: Dotted key -> value as text.
        steps: Optimizer steps.
        bits: Of all units.
        limit: Items of a task.
    """

    name: str
    changes: dict[str, str]
    steps: int
    bits: int
    limit: int


@dataclass(frozen=True)
class Text:
    """What models are read with.

    Attributes:
        windows: Loss of each window of the text.
        rows: Of each held-out row the sum of its response tokens' losses and their number.
        divergence: Mean divergence from the dense model at these tokens, in nats.
    """

    windows: list[float]
    rows: list[tuple[float, int]]
    divergence: float


class Judge:
    """Reads models with text and rows that none of them saw.

    Args:
        context: Of any arm; its held-out rows and its tokenizer are the same for all.
        text: Other text than Alpaca's.
    """

    def __init__(self, context: Context, text: str):
        self.context, self.text = context, text
        dense = checkpoint.load_base(BASE, context.compute.device, context.compute.dtype)
        self.wanted = teacher.ask(dense, context.validation, context.tokenizer.pad_token_id)
        self.entropy = self.cross_entropy(dense)

    @torch.no_grad()
    def cross_entropy(self, model: Any) -> float:
        """Return a model's mean cross-entropy with the dense model's predictions at the response tokens."""
        causal, total, count = loss.unwrapped(model).eval(), 0.0, 0
        for row in self.context.validation:
            total, count = total + self._row(causal, row), count + len(self.wanted[row])
        return total / count

    def _row(self, causal: Any, row: Example) -> float:
        (part,) = batches([row], 1, self.context.tokenizer.pad_token_id, False)
        states = last_states(causal, part.tokens)[:, :-1][part.labels[:, 1:] != IGNORED]
        likeliest = (states @ head_of(causal).weight.T).float().logsumexp(-1)
        return float((likeliest - (states.float() * self.wanted[row].float()).sum(-1)).sum())

    def read(self, model: Any) -> Text:
        """Return what a model makes of them."""
        model.eval()
        rows = loss.row_losses(model, self.context.validation, 8, self.context.tokenizer.pad_token_id)
        windows = losses(loss.unwrapped(model), self.context.tokenizer, self.text).double().tolist()
        return Text(windows, list(rows), self.cross_entropy(model) - self.entropy)


def parse(name: str, settings: dict[str, int]) -> Arm:
    """Return the arm that a word such as ``plain:quantize.method=nearest`` stands for."""
    name, _, rest = name.partition(":")
    changes = dict(part.split("=", 1) for part in rest.split(",") if part)
    numbers = settings | {key: int(changes.pop(key)) for key in ("steps", "bits", "limit") if key in changes}
    return Arm(name, changes, numbers["steps"], numbers["bits"], numbers["limit"])


def prepare(arm: Arm, ratios: Sequence[float] = ()) -> tuple[Params, Context, float]:
    """Return an arm's params, what its models come from, and the seconds that making it took.

    Args:
        arm: The arm.
        ratios: Pruning ratios of other arms, whose models are made with this one's where they are missing.
    """
    params, made = supplies(arm, ratios)
    start = time.perf_counter()
    context = made.context
    return params, context, time.perf_counter() - start


def supplies(arm: Arm, ratios: Sequence[float] = ()) -> tuple[Params, Supplies]:
    """Return an arm's params and what its models come from, which is made when it is first asked for."""
    named = {key: (key, value) for key, value in arm.changes.items()}
    params = checks.load(more=overrides.adopt(overrides.DEFAULT, "", named))
    return params, Supplies(params, ratios)


def measure(arm: Arm, params: Params, context: Context, judge: Judge) -> dict[str, Any]:
    """Return an arm's figures before and after its recovery."""
    vector = (arm.bits,) * len(context.units)
    model = assemble(context, vector)
    before = judge.read(model)
    del model
    work = trial.Work(steps=arm.steps, limit=arm.limit, skip=params.evaluate.limit)
    result, model = trial.run(context, vector, work)
    after = judge.read(model)
    return {
        "before": asdict(before),
        "after": asdict(after),
        "by_item": result.scores.by_item,
        "gold_logprob": result.scores.gold_logprob,
        "accuracy": result.scores.mean,
        "accuracy_stderr": result.scores.mean_stderr,
        "seconds": result.seconds,
    }


def whole(arm: Arm, text: str) -> dict[str, Any]:
    """Return an arm's figures and what its bank took."""
    params, context, made = prepare(arm)
    found = measure(arm, params, context, Judge(context, text))
    return found | {"seconds": found["seconds"] | {"bank": made}}


def kept(file: Path, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that a file has under a key; without them the work is done and they are written."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if key not in known:
        known[key] = work()
        storage.write_text(file, json.dumps(known))
    return known[key]


def perplexity(read: dict[str, Any]) -> float:
    """Return exp of the mean loss of the windows."""
    return float(np.exp(np.mean(read["windows"])))


def response(read: dict[str, Any]) -> float:
    """Return the mean loss of a response token."""
    return loss.mean_loss(read["rows"])[0]


def shown(read: dict[str, Any]) -> str:
    """Return perplexity, response loss and divergence as text."""
    return f"{perplexity(read):.2f}, {response(read):.4f}, {read['divergence']:.4f}"


def line(name: str, found: dict[str, Any]) -> str:
    """Return an arm's figures as text."""
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in found["seconds"].items())
    return (
        f"{name}: perplexity, response, divergence {shown(found['before'])} -> {shown(found['after'])}; "
        f"gold {found['gold_logprob']:.4f}; accuracy {100 * found['accuracy']:.1f} ± "
        f"{100 * found['accuracy_stderr']:.1f}; {spent}"
    )


def gains(found: dict[str, Any], other: dict[str, Any]) -> str:
    """Return what an arm gains over another one, with paired standard errors; positive is better."""
    windows = np.array(other["after"]["windows"]) - np.array(found["after"]["windows"])
    text = windows.mean(), windows.std(ddof=1) / len(windows) ** 0.5
    pairs = {"text": text}
    for what, objective in (("response", "response_logprob"), ("gold", "gold_logprob"), ("accuracy", "accuracy")):
        strata = [paired.strata({"by_row": each["after"]["rows"]} | each, objective) for each in (found, other)]
        pairs[what] = paired.difference(*strata)
    return ", ".join(f"{what} {gain:+.4f} ± {error:.4f}" for what, (gain, error) in pairs.items())


def main(folder: Path, words: list[str]) -> None:
    """Print a line for each arm."""
    os.chdir(folder)
    given = dict(word.split("=", 1) for word in words if ":" not in word and "=" in word)
    text = Path(given.pop("text")).read_text(encoding="utf-8")
    settings = {"steps": 32, "limit": 200, "bits": 4} | {key: int(value) for key, value in given.items()}
    first = None
    for word in [word for word in words if ":" in word]:
        arm = parse(word, settings)
        key = f"{json.dumps(asdict(arm), sort_keys=True)} {code(*TRIAL, 'pipeline.stages.quantize')}"
        found = kept(RESULTS, key, partial(whole, arm, text))
        print(line(arm.name, found), flush=True)
        if first is None:
            first = found
        else:
            print(f"    gains {gains(found, first)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
