"""Record a landscape for ``benchmarks.samplers``: the quality of many bit vectors, without recovery.

    python -m benchmarks.record 400 [with_recovery 40]

Needs the stages up to ``quantize`` (``mlflow run . -e quantize``) and ``importance``. Writes
``benchmarks/landscape/table.csv``, a row a vector and recipe, ``items.parquet``, each item's scores, and
``landscape.json``. A row is kept as soon as it is measured; the same command goes on where it was. ``with_recovery``
measures the first vectors once more with the params' own recovery, on twice the items, and prints how well the
cheap recipe ranks them. The table holds the means of the first ``evaluate.limit`` items of each task in both recipes.
"""

from __future__ import annotations

import io
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from pipeline import bits as bit_text
from pipeline import checks, console, params, storage
from pipeline.compress.importance import Priors
from pipeline.paths import REPORTS
from pipeline.search.allocate import Bits, Space
from pipeline.stages import trials
from pipeline.trial import evaluate, trial
from pipeline.trial.context import Context
from pipeline.trial.result import Result

FOLDER = Path("benchmarks/landscape")
Items = dict[str, list[tuple[float, float]]]  # task -> of each item (its metric, its gold choice's log-probability)


def vectors(space: Space, priors: Priors, count: int, seed: int) -> list[Bits]:
    """Return distinct feasible vectors, spread at every length of the list.

    In turn: a single raised unit, a greedy vector of some size by sensitivity per byte, a neighbour of one, a random
    vector.
    """
    generator = random.Random(seed)
    importance = space.per_byte(priors.sensitivity)
    seen = {(4,) * space.units}
    found = list(seen)
    sources = [
        _singles(space, generator),
        _greedy(space, importance, generator),
        _neighbours(space, importance, generator),
        _random(space, generator),
    ]
    while sources and len(found) < count:
        for source in list(sources):
            bits = next((one for one in source if one not in seen and one in space), None)
            if bits is None:
                sources.remove(source)
            elif len(found) < count:
                seen.add(bits)
                found.append(bits)
    return found


def _singles(space: Space, generator: random.Random) -> Iterator[Bits]:
    units = list(range(space.units))
    generator.shuffle(units)
    for unit in units:
        yield tuple(8 if index == unit else 4 for index in range(space.units))


def _greedy(space: Space, importance: Sequence[float], generator: random.Random) -> Iterator[Bits]:
    order = sorted(range(space.units), key=lambda unit: -importance[unit])
    sizes = list(range(2, space.max_eights + 1))
    generator.shuffle(sizes)
    for size in sizes:
        yield tuple(8 if unit in order[:size] else 4 for unit in range(space.units))


def _neighbours(space: Space, importance: Sequence[float], generator: random.Random) -> Iterator[Bits]:
    bases = list(_greedy(space, importance, generator)) or [(4,) * space.units]
    for _ in range(10_000):
        bits = list(generator.choice(bases))
        for unit in generator.sample(range(space.units), generator.choice((1, 2, 2, 3))):
            bits[unit] = 12 - bits[unit]
        yield tuple(bits)


def _random(space: Space, generator: random.Random) -> Iterator[Bits]:
    for _ in range(10_000):
        yield space.draw(generator)


def row(result: Result, limit: int, steps: int) -> dict[str, Any]:
    """Return a result as a row of the table, with the means of each task's first items (0: all)."""
    first = {task: list(zip(*values[: limit or None], strict=True)) for task, values in result.by_item.items()}
    found: dict[str, Any] = {"bits": result.bits, "steps": steps}
    for place, name in enumerate(("accuracy", "gold_logprob")):
        values = [columns[place] for columns in first.values()]
        found[name] = fmean(map(fmean, values))
        found[f"{name}_stderr"] = math.sqrt(sum(map(evaluate.squared_error, values))) / len(values)
    found |= {"validation_loss": result.validation_loss, "peak_memory_bytes": result.peak_memory_bytes}
    return found | {task: fmean(columns[0]) for task, columns in first.items()}


def long(bits: str, steps: int, items: Items) -> list[dict[str, Any]]:
    """Return a row for each item."""
    return [
        {"bits": bits, "steps": steps, "task": task, "item": index, "metric": metric, "gold_logprob": logprob}
        for task, values in items.items()
        for index, (metric, logprob) in enumerate(values)
    ]


def record(
    settings: params.Params,
    context: Context,
    space: Space,
    priors: Priors,
    counts: tuple[int, int],
    folder: Path,
) -> pd.DataFrame:
    """Measure what the table lacks; return the table.

    Args:
        settings: The params that the context was made of.
        context: What trials share.
        space: The feasible vectors.
        priors: Of the units.
        counts: Vectors without recovery, and how many of them with it, too.
        folder: Where the landscape is kept.

    Raises:
        ValueError: The folder holds a landscape of other settings.
    """
    count, recovered = counts
    facts = {
        "settings": params.digest(
            settings.evaluate, settings.recover, settings.prune, settings.quantize, settings.seed
        ),
        "model": settings.model.source,
        "base": space.base,
        "deltas": list(space.deltas),
        "sensitivity": list(priors.sensitivity),
    }
    about, path, scratch = folder / "landscape.json", folder / "table.csv", folder / "items.partial"
    folder.mkdir(parents=True, exist_ok=True)
    if about.exists() and json.loads(about.read_text()) != facts:
        raise ValueError(f"{folder} holds a landscape of another model or other settings; move it away")
    storage.write_text(about, json.dumps(facts, indent=1))
    rows = pd.read_csv(path, dtype={"bits": str}).to_dict("records") if path.exists() else []
    every = pd.read_parquet(folder / "items.parquet").to_dict("records") if path.exists() else []
    done = {(one["bits"], one["steps"]) for one in rows}
    chosen = vectors(space, priors, count, settings.seed)
    jobs = [(bits, 0) for bits in chosen] + [(bits, settings.recover.steps) for bits in chosen[:recovered]]
    jobs = [(bits, steps) for bits, steps in jobs if (bit_text.write(bits), steps) not in done]
    start = time.monotonic()
    for index, (bits, steps) in enumerate(jobs, 1):
        limit = settings.evaluate.limit
        result, _ = trial.run(context, bits, trial.Work(steps, 2 * limit if steps else limit))
        every += long(result.bits, steps, result.by_item)
        rows.append(row(result, limit, steps))
        pd.DataFrame(every).to_parquet(scratch, index=False)
        scratch.replace(folder / "items.parquet")  # before the row, which says that it is there
        text = io.StringIO()
        pd.DataFrame(rows).to_csv(text, index=False)
        storage.write_text(path, text.getvalue())
        left = (time.monotonic() - start) / index * (len(jobs) - index)
        console.note(
            f"{index}/{len(jobs)}: {steps} steps, gold answer {rows[-1]['gold_logprob']:.4f}; {left / 60:.0f} min left"
        )
    return pd.DataFrame(rows)


def agreement(table: pd.DataFrame) -> str:
    """Return how well the recipe without recovery ranks the vectors that were recovered too."""
    both = table.pivot_table(index="bits", columns="steps", values="gold_logprob").dropna()
    if both.shape[1] < 2 or len(both) < 3:
        return "too few vectors with recovery to compare the recipes"
    return f"rank correlation of the recipes on {len(both)} vectors: {both.corr('spearman').iloc[0, 1]:.2f}"


def main(count: int, recovered: int) -> None:
    """Record with ``params.yaml`` and the artifacts."""
    settings = checks.load()
    context = trials.load(settings)
    priors = Priors.from_json(json.loads((REPORTS / "importance.json").read_text()))
    space = trials.space(settings, context)
    table = record(settings, context, space, priors, (count, recovered), FOLDER)
    console.note(f"{len(table)} rows in {FOLDER / 'table.csv'}; {agreement(table)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[3]) if sys.argv[2:3] == ["with_recovery"] else 0)
