"""Record a landscape for ``benchmarks.samplers``: the quality of many vectors of all pruning ratios.

    python -m benchmarks.record vectors=400 recovered=80 [folder=benchmarks/landscape]

Needs the stages up to ``importance`` (``dvc repro importance``). Measures, at each ratio of ``prune.ratios`` in turn,
the vectors without recovery, then the first ``recovered`` of them once more with the params' own recovery
(``recover.steps``), on twice the items. Limits of section ``search`` do not count here. Writes into the folder:

- ``table.csv``: a row a vector and recipe: ratio, bits, steps, every objective with its standard error, both peaks. It
  holds the means of the first ``evaluate.limit`` items of each task in both recipes.
- ``items.parquet``: each item's scores.
- ``landscape.json``: what a replay needs besides: of each ratio the memory of units and what ``importance`` measured.

A row is kept as soon as it is measured, and the same command goes on where it was, with more vectors if they are asked
for: ``nohup nice python -m benchmarks.record ... &`` may be killed at any moment. Which vectors are measured, and every
draw, follows from the params' ``seed``. At the end it prints how well the cheap recipe ranks vectors.
"""

from __future__ import annotations

import io
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import setup
from pipeline import bits as bit_text
from pipeline import checks, console, params, storage
from pipeline.bits import Bits, Vector
from pipeline.compress.priors import Priors
from pipeline.results.cells import changed
from pipeline.search.allocate import Space, Spaces
from pipeline.stages import priors as kept
from pipeline.stages import trials
from pipeline.stages.trials import Contexts
from pipeline.trial import evaluate, trial
from pipeline.trial.context import Context
from pipeline.trial.result import Result

FOLDER = Path("benchmarks/landscape")
MEMORIES = ("training", "inference")
TOGETHER = 8  # vectors of a ratio that are measured in a row, as its model has to be loaded
Items = dict[str, list[tuple[float, float]]]  # task -> of each item (its metric, its gold choice's log-probability)


def vectors(spaces: Spaces, priors: Mapping[float, Priors], count: int, seed: int) -> list[Vector]:
    """Return distinct feasible vectors, spread over ratios and sizes at every length of the list.

    The ratios in turn. Of each the lowest bits, every higher width everywhere, then in turn: a greedy vector of some
    size by sensitivity per byte, a random one, a neighbour of a greedy one, a random one.
    """
    sources = [
        _of_ratio(ratio, space, priors[ratio], random.Random(f"{seed} {ratio:g}")) for ratio, space in spaces.at.items()
    ]
    chosen: list[Vector] = []
    while sources and len(chosen) < count:
        for source in list(sources):
            vector = next(source, None)
            if vector is None:
                sources.remove(source)
            elif len(chosen) < count:
                chosen.append(vector)
    return chosen


def _of_ratio(ratio: float, space: Space, priors: Priors, generator: random.Random) -> Iterator[Vector]:
    """Yield distinct feasible vectors of a ratio until there are hardly any left."""
    importance = space.per_byte(priors.sensitivity)
    greedy = _greedy(space, importance)
    generator.shuffle(greedy)
    near, anywhere = _neighbours(space, greedy, generator), _random(space, generator)
    seen: set[Bits] = set()

    def fresh(source: Iterator[Bits]) -> Iterator[Vector]:
        for bits in source:
            if bits not in seen and bits in space:
                seen.add(bits)
                yield Vector(ratio, bits)

    yield from fresh((width,) * space.units for width in space.widths)
    sources = [fresh(source) for source in (iter(greedy), anywhere, near)]
    order = [sources[0], sources[1], sources[2], sources[1]]
    while True:
        several = [vector for source in order if (vector := next(source, None)) is not None]
        if not several:
            return
        yield from several


def _greedy(space: Space, importance: Sequence[float]) -> list[Bits]:
    """Return a vector of each size and higher width: the most important units are raised."""
    order = sorted(range(space.units), key=lambda unit: -importance[unit])
    return [
        tuple(width if unit in order[:size] else space.widths[0] for unit in range(space.units))
        for size in range(1, min(space.max_raised, space.units - 1) + 1)
        for width in space.widths[1:]
    ]


def _neighbours(space: Space, bases: Sequence[Bits], generator: random.Random) -> Iterator[Bits]:
    """Yield vectors with one to three units of a greedy one at another width."""
    for _ in range(10_000 if bases else 0):
        bits = list(generator.choice(bases))
        for unit in generator.sample(range(space.units), min(generator.choice((1, 2, 2, 3)), space.units)):
            bits[unit] = generator.choice([width for width in space.widths if width != bits[unit]])
        yield tuple(bits)


def _random(space: Space, generator: random.Random) -> Iterator[Bits]:
    for _ in range(10_000):
        yield space.draw(generator)


def jobs(chosen: Sequence[Vector], recovered: int, steps: int) -> list[tuple[Vector, int]]:
    """Return (vector, steps) in the order in which they are measured.

    First all without recovery. Some of a ratio follow each other, in blocks of the list: its beginning stays spread.
    """
    ratios = len({vector.ratio for vector in chosen})
    order: list[tuple[Vector, int]] = []
    for part, trained in ((chosen, 0), (chosen[:recovered], steps)):
        for start in range(0, len(part), TOGETHER * ratios):
            block = sorted(part[start : start + TOGETHER * ratios], key=lambda vector: vector.ratio)
            order += [(vector, trained) for vector in block]
    return order


def row(result: Result, limit: int, steps: int) -> dict[str, Any]:
    """Return a result as a row of the table, with the means of each task's first items (0: all)."""
    first = {task: list(zip(*values[: limit or None], strict=True)) for task, values in result.by_item.items()}
    cells: dict[str, Any] = {"ratio": result.ratio, "bits": result.bits, "steps": steps}
    for place, name in enumerate(("accuracy", "gold_logprob")):
        values = [columns[place] for columns in first.values()]
        cells[name] = fmean(map(fmean, values))
        cells[f"{name}_stderr"] = math.sqrt(sum(map(evaluate.squared_error, values))) / len(values)
    cells |= {
        "response_logprob": result.response_logprob,
        "response_logprob_stderr": result.response_logprob_stderr,
        "validation_loss": result.validation_loss,
        "peak_memory_bytes": result.peak_memory_bytes,
        "inference_memory_bytes": result.inference_memory_bytes,
    }
    return cells | {task: fmean(columns[0]) for task, columns in first.items()}


def long(vector: Vector, steps: int, items: Items) -> list[dict[str, Any]]:
    """Return a row for each item."""
    named = {"ratio": vector.ratio, "bits": bit_text.write(vector.bits), "steps": steps}
    return [
        {**named, "task": task, "item": index, "metric": metric, "gold_logprob": logprob}
        for task, values in items.items()
        for index, (metric, logprob) in enumerate(values)
    ]


def facts(settings: params.Params, spaces: Mapping[str, Spaces], priors: Mapping[float, Priors]) -> dict[str, Any]:
    """Return what ``landscape.json`` holds: what the rows are of, and what a replay needs besides them.

    Args:
        settings: The params.
        spaces: Peak that counts -> the vectors.
        priors: Ratio -> importance of the units.
    """
    of_ratios = {}
    for ratio in next(iter(spaces.values())).at:
        measured = {name: spaces[name].at[ratio] for name in MEMORIES}
        memory = {name: {"base": space.base, "deltas": space.deltas} for name, space in measured.items()}
        of_ratios[f"{ratio:g}"] = {**memory, "priors": asdict(priors[ratio])}
    made_by = (settings.evaluate, settings.recover, settings.prune, settings.quantize, settings.data, settings.seed)
    about = {
        "settings": params.digest(*made_by),
        "model": settings.model.source,
        "granularity": settings.search.granularity,
        "widths": settings.search.bits,
        "ratios": of_ratios,
    }
    return json.loads(json.dumps(about))


def record(
    settings: params.Params,
    context_at: Callable[[float], Context],
    spaces: Mapping[str, Spaces],
    priors: Mapping[float, Priors],
    counts: tuple[int, int],
    folder: Path,
) -> pd.DataFrame:
    """Measure what the table lacks; return the table.

    Args:
        settings: The params that the contexts were made of.
        context_at: Ratio -> what its trials share.
        spaces: Peak that counts -> the vectors (``unlimited``).
        priors: Ratio -> importance of the units.
        counts: Vectors without recovery, and how many of them with it, too.
        folder: Where the landscape is kept.

    Raises:
        ValueError: The folder holds a landscape of other settings.
    """
    about, path, scratch = folder / "landscape.json", folder / "table.csv", folder / "items.partial"
    folder.mkdir(parents=True, exist_ok=True)
    known = facts(settings, spaces, priors)
    if about.exists() and json.loads(about.read_text()) != known:
        raise ValueError(f"{folder} holds a landscape of another model or other settings; move it away")
    storage.write_text(about, json.dumps(known, indent=1))
    rows, every = [], []
    if path.exists():
        rows = pd.read_csv(path, dtype={"bits": str}).to_dict("records")
        every = pd.read_parquet(folder / "items.parquet").to_dict("records")
    measured = {(cells["ratio"], cells["bits"], cells["steps"]) for cells in rows}
    every = [cells for cells in every if (cells["ratio"], cells["bits"], cells["steps"]) in measured]
    chosen = vectors(spaces["training"], priors, counts[0], settings.seed)
    left = [
        (vector, steps)
        for vector, steps in jobs(chosen, counts[1], settings.recover.steps)
        if (vector.ratio, bit_text.write(vector.bits), steps) not in measured
    ]
    start, limit = time.monotonic(), settings.evaluate.limit
    for index, (vector, steps) in enumerate(left, 1):
        result, _ = trial.run(context_at(vector.ratio), vector.bits, trial.Work(steps, 2 * limit if steps else limit))
        every += long(vector, steps, result.by_item)
        rows.append(row(result, limit, steps))
        pd.DataFrame(every).to_parquet(scratch, index=False)
        scratch.replace(folder / "items.parquet")  # before the row, which says that it is there
        text = io.StringIO()
        pd.DataFrame(rows).to_csv(text, index=False)
        storage.write_text(path, text.getvalue())
        minutes = (time.monotonic() - start) / index * (len(left) - index) / 60
        console.note(
            f"{index}/{len(left)}: {vector.ratio:g} pruned, {bit_text.summary(result.bits)}, {steps} steps, "
            f"response {rows[-1]['response_logprob']:.4f}; {minutes:.0f} min left"
        )
    return pd.DataFrame(rows)


def agreement(table: pd.DataFrame) -> str:
    """Return how well the recipe without recovery ranks the vectors that were recovered too, over all and by ratio."""
    both = table.pivot_table(index=["ratio", "bits"], columns="steps", values="response_logprob").dropna()
    if both.shape[1] < 2 or len(both) < 3:
        return "too few vectors with recovery to compare the recipes"
    within = [part.corr("spearman").iloc[0, 1] for _, part in both.groupby("ratio") if len(part) > 2]
    by_ratio = f", {np.mean(within):.2f} within ratios on average" if within else ""
    return f"rank correlation of the recipes on {len(both)} vectors: {both.corr('spearman').iloc[0, 1]:.2f}{by_ratio}"


def unlimited(settings: params.Params, contexts: Contexts) -> dict[str, Spaces]:
    """Return all vectors of all ratios for either peak, without a limit."""
    free = {"max_8bit_fraction": 1.0, "memory_budget_gib": None, "average_bits": None, "seed_bits": ()}
    return {memory: trials.spaces(changed(settings, "search", memory=memory, **free), contexts) for memory in MEMORIES}


def main(count: int, recovered: int, folder: Path) -> None:
    """Record with ``params.yaml`` and the artifacts."""
    settings = checks.load()
    contexts = setup.contexts(settings)
    spaces = unlimited(settings, contexts)
    table = record(settings, contexts.at, spaces, kept.read(settings), (count, recovered), folder)
    console.note(f"{len(table)} rows in {folder / 'table.csv'}; {agreement(table)}")


if __name__ == "__main__":
    given = dict(item.split("=") for item in sys.argv[1:])
    main(int(given.get("vectors", 400)), int(given.get("recovered", 80)), Path(given.get("folder", FOLDER)))
