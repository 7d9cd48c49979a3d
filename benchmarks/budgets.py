"""At equal memory: what the search over ratios and bits chooses, against what a user would take instead.

    python -m benchmarks.budgets FOLDER unseen=ROWS text=FILE [trials=16] [more=2] [steps=32] [limit=200] [budgets=5]
        [memory=training,inference]

In a folder with the artifacts up to ``importance`` and ``params.yaml``; unseen rows are Alpaca's that are not among the
params'. For either peak it searches twice with as many trials: all of ``prune.ratios``, and the ratio next to the
paper's alone. Then each search gets some more trials at each of the budgets, which lie evenly between the smallest
model and the unpruned one at 8 bits. A choice is the tried vector that fits and that the search's model expects most
of. Against the joint choice stand, where they fit: the choice at the paper's ratio, LLM-Pruner's row (16 bits), the
unpruned model at 4 and at 8 bits, QPruner1 and QPruner2.

Each of these is recovered anew and judged on what no choice saw: the unseen rows, ``limit`` items a task from
``evaluate.limit`` on, and 20 windows of 256 tokens of the text. Trials and recoveries are kept in
``reports/budgets.json``, so that a killed run goes on. It prints a table of the models, and for each budget what the
joint choice gains over the others, with paired standard errors.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import recovery, setup
from benchmarks.recovery import Judge
from pipeline import GIB, checks, console
from pipeline.bits import DENSE, Vector
from pipeline.compress.priors import Priors
from pipeline.data import alpaca
from pipeline.identity import TRIAL, code
from pipeline.params import Params
from pipeline.results.cells import changed
from pipeline.search import search, surrogate
from pipeline.search.allocate import Spaces
from pipeline.search.history import PAPER_SHARE, paper_ratio, seeds
from pipeline.search.surrogate import Observation
from pipeline.stages import priors as kept_priors
from pipeline.stages import trials
from pipeline.stages.trials import Contexts
from pipeline.trial import trial

RESULTS = Path("reports/budgets.json")
UNPRUNED = {4: "unpruned, all 4", 8: "unpruned, all 8"}
HEAD = "pruned, % | bits | training, GiB | inference, GiB | response | perplexity | divergence | gold | accuracy, %"
Try = Callable[[Vector], Observation]


@dataclass(frozen=True)
class Options:
    """What the command line may change.

    Attributes:
        trials: Of each search before it is told a budget.
        more: Further trials at each budget.
        steps: Optimizer steps of a recovery.
        limit: Items of a task that it is judged on.
        budgets: Number of budgets.
    """

    trials: int = 16
    more: int = 2
    steps: int = 32
    limit: int = 200
    budgets: int = 5


def only(spaces: Spaces, ratio: float) -> Spaces:
    """Return the vectors of one ratio."""
    return Spaces({ratio: spaces.at[ratio]}, {})


def within(spaces: Spaces, budget: int) -> Spaces | None:
    """Return the vectors that meet a budget; None if there are none."""
    return None if budget < spaces.base else Spaces.within(spaces.at, budget)


def searched(
    spaces: Spaces, priors: Mapping[float, Priors], budgets: Sequence[int], attempt: Try, options: Options, seed: int
) -> list[Vector | None]:
    """Search, then search on below each budget; return its choice at each.

    Args:
        spaces: What is searched.
        priors: Ratio -> importance of the units.
        budgets: Peak bytes.
        attempt: Runs a trial.
        options: How many.
        seed: Of the sampler.
    """
    priors = {ratio: priors[ratio] for ratio in spaces.at}
    beliefs = search.beliefs(priors, next(iter(spaces.at.values())).widths)
    seen: dict[Vector, Observation] = {}

    def further(among: Spaces, count: int, queue: list[Vector]) -> None:
        for _ in range(count):
            queue = [vector for vector in queue if vector not in seen]
            generator = random.Random(seed + len(seen))
            vector = (
                queue.pop(0)
                if queue
                else search.acquire.propose(list(seen.values()), among, beliefs, set(seen), generator)
            )
            if vector is None:
                return
            seen[vector] = attempt(vector)

    starts = [candidate.vector for candidate in seeds(spaces, priors, (), 0, random.Random(seed))]
    further(spaces, options.trials, starts)
    for budget in budgets:
        if among := within(spaces, budget):
            further(among, options.more, [])
    model = surrogate.Model(list(seen.values()), beliefs)
    expected = dict(zip(seen, model.predict(list(seen))[0].tolist(), strict=True))
    fitting = [[vector for vector in seen if spaces.memory(vector) <= budget] for budget in budgets]
    return [max(vectors, key=expected.__getitem__) if vectors else None for vectors in fitting]


def named(spaces: Spaces, priors: Mapping[float, Priors]) -> dict[str, Vector]:
    """Return the models that a user would take without a search."""
    ratio = paper_ratio(spaces.ratios)
    space = spaces.at[ratio]
    few = replace(space, max_raised=int(space.units * PAPER_SHARE))
    others = {
        "LLM-Pruner (16-bit)": Vector(ratio, (DENSE,) * spaces.units),
        "QPruner1": Vector(ratio, (space.widths[0],) * spaces.units),
        "QPruner2": Vector(ratio, few.allocate(priors[ratio].mutual_information)),
    }
    if 0.0 in spaces.at:
        others |= {label: Vector(0.0, (width,) * spaces.units) for width, label in UNPRUNED.items()}
    return others


def levels(spaces: Spaces, count: int) -> list[int]:
    """Return budgets, evenly from the smallest model to the unpruned one at 8 bits, both ends left out."""
    top = spaces.memory(Vector(spaces.ratios[0], (8,) * spaces.units))
    return [int(spaces.base + (top - spaces.base) * (2 * step + 1) / (2 * count)) for step in range(count)]


class Bench:
    """Runs trials and recoveries, each once.

    Args:
        settings: The params.
        unseen: File of rows that no choice sees.
        text: Other text.
        options: How much is done.
    """

    def __init__(self, settings: Params, unseen: Path, text: str, options: Options):
        self.settings, self.text, self.options = settings, text, options
        self.contexts: Contexts = setup.contexts(settings)
        context = self.contexts.any
        rows = alpaca.read(unseen)
        self.rows = alpaca.encode(rows, context.tokenizer, settings.recover.max_length)
        self.judge = Judge(replace(context, validation=self.rows), text)
        self.code = code(*TRIAL)

    def kept(self, what: str, vector: Vector, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is known of a vector, measured now if it is not."""
        return recovery.kept(RESULTS, f"{what} {vector} {self.settings.recover} {self.code}", work)

    def attempt(self, vector: Vector) -> Observation:
        """Run a trial of the search."""

        def work() -> dict[str, Any]:
            result, _ = trial.run(self.contexts.at(vector.ratio), vector.bits)
            score, stderr = result.score(self.settings.search.objective)
            console.note(f"trial {vector.ratio:g} pruned: {score:.4f}")
            return {"score": score, "stderr": stderr}

        return Observation(vector, **self.kept("trial", vector, work))

    def recovered(self, vector: Vector) -> dict[str, Any]:
        """Recover a model and judge it."""
        return self.kept(f"recovered {self.options.steps} {self.options.limit}", vector, partial(self._recover, vector))

    def _recover(self, vector: Vector) -> dict[str, Any]:
        context = self.contexts.at(vector.ratio)
        work = trial.Work(self.options.steps, self.options.limit, skip=self.settings.evaluate.limit)
        result, model = trial.run(context, vector.bits, work)
        console.note(f"recovered {vector.ratio:g} pruned in {sum(result.seconds.values()):.0f} s")
        return {
            "after": asdict(self.judge.read(model)),
            "by_item": result.by_item,
            "gold_logprob": result.gold_logprob,
            "accuracy": result.accuracy,
            "accuracy_stderr": result.accuracy_stderr,
            "training": result.peak_memory_bytes,
            "inference": result.inference_memory_bytes,
        }


def line(found: Mapping[str, Any], vector: Vector) -> str:
    """Return a model as a row of the table."""
    high = sum(width > 4 for width in vector.bits)
    bits = "all 16" if set(vector.bits) == {DENSE} else f"{high} of {len(vector.bits)} at 8"
    after = found["after"]
    return (
        f"{100 * vector.ratio:.0f} | {bits} | {found['training'] / GIB:.3f} | {found['inference'] / GIB:.3f} | "
        f"{recovery.response(after):.3f} | {recovery.perplexity(after):.2f} | {after['divergence']:.3f} | "
        f"{found['gold_logprob']:.3f} | {100 * found['accuracy']:.1f} ± {100 * found['accuracy_stderr']:.1f}"
    )


def main(folder: Path, given: dict[str, str]) -> None:
    """Print both tables, of either peak."""
    os.chdir(folder)
    unseen, text = Path(given.pop("unseen")), Path(given.pop("text")).read_text(encoding="utf-8")
    memories = given.pop("memory", "training,inference").split(",")
    options = Options(**{key: int(value) for key, value in given.items()})
    settings = checks.load()
    bench, priors = Bench(settings, unseen, text, options), kept_priors.read(settings)
    ratio = paper_ratio(settings.prune.ratios)
    for memory in memories:
        spaces = trials.spaces(changed(settings, "search", memory=memory), bench.contexts)
        budgets = levels(spaces, options.budgets)
        search_ = partial(searched, priors=priors, budgets=budgets, attempt=bench.attempt, options=options)
        joint = search_(spaces, seed=settings.seed)
        alone = search_(only(spaces, ratio), seed=settings.seed)
        others = named(spaces, priors)
        print(f"\n{memory} | model | {HEAD}")
        for budget, chosen, narrow in zip(budgets, joint, alone, strict=True):
            if chosen is None:
                continue
            first = bench.recovered(chosen)
            print(f"{budget / GIB:.3f} GiB | joint | {line(first, chosen)}", flush=True)
            rivals = ({f"best at {ratio:g}": narrow} if narrow else {}) | others
            for name, vector in rivals.items():
                found = bench.recovered(vector)
                if found[memory] <= budget and vector != chosen:
                    print(f"  | {name} | {line(found, vector)}")
                    print(f"  joint gains {recovery.gains(first, found)}", flush=True)


if __name__ == "__main__":
    words = dict(word.split("=", 1) for word in sys.argv[2:])
    if not {"unseen", "text"} <= set(words):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), words)
