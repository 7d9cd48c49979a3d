"""Blocks or finer units: models of equal memory, recovered and judged on items that no search sees.

    python -m benchmarks.granularity [granularities=block,group] [text=FILE] [limit=0] [budgets=0.05,0.1,...]
        [fronts=FOLDER,FOLDER]

For each granularity and each of some memory budgets (shares of what raising every unit would take): the greedy
allocation by sensitivity per byte, which every search starts from, as a whole trial. Finer units could fill a budget
better; the first granularity's own peak is therefore the budget of the others. Or, with ``fronts``, for each budget the
best of a finished search's front (folders of projects, one for each granularity, of the same pruned model): what a user
with that much memory would get. Needs the stages up to ``quantize``. Writes ``reports/granularity.csv``; a line a
budget, then the mean paired differences to the first granularity, over items and over windows of 256 tokens of
``text``, the budgets averaged first, each with its standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd

from benchmarks import setup
from benchmarks.perplexity import losses
from pipeline import bits as bit_text
from pipeline import checks, console, params
from pipeline.bits import Bits
from pipeline.paths import REPORTS
from pipeline.search.allocate import Space
from pipeline.stages import importance, trials
from pipeline.trial import evaluate, trial

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25)
FRONT_BUDGETS = tuple(hundredths / 100 for hundredths in range(2, 26))
WINDOWS = 60  # of the text
Values = dict[float, np.ndarray]  # budget -> a figure of each item or window


def measure(
    settings: params.Params,
    text: str,
    limit: int,
    shares: Sequence[float],
    budgets: dict[float, int],
    front: Path | None,
) -> tuple[list[dict], dict[str, Values]]:
    """Return a row for each budget, and the paired figures: each item's gold log-probability, each window's loss.

    Args:
        settings: The params.
        text: Held-out text; empty: none.
        limit: Items of a task; 0: all.
        shares: The budgets, of what raising every unit would take.
        budgets: Share -> peak bytes that are allowed; those that it lacks are added as they came out.
        front: Folder of a project whose front is taken; None: the greedy allocation.
    """
    context = setup.context_of(settings)
    if front is None:
        folders = trials.folders(settings)[context.ratio]
        priors = importance.measure(settings, *folders, importance.predictions(settings))
    space = Space.of(lambda bits: context.predict(bits).training, len(context.units), 1.0, None)
    skip = evaluate.seen(context.tasks, settings.evaluate.limit)

    @cache
    def judged(bits: Bits) -> tuple[dict, np.ndarray, np.ndarray | None]:
        result, model = trial.run(context, bits, trial.Work(limit=limit, skip=skip))
        figures = {
            "raised": bits.count(8),
            "peak_memory_mib": (result.peak_memory_bytes or 0) / 2**20,
            "accuracy": result.accuracy,
            "gold_logprob": result.gold_logprob,
            "validation_loss": result.validation_loss,
        }
        each = None
        if text:
            each = losses(model.merge_and_unload().float(), context.tokenizer, text, WINDOWS).numpy()
            figures["text_loss"] = float(each.mean())
        return figures, np.array([logprob for task in result.by_item.values() for _, logprob in task]), each

    rows: list[dict] = []
    items: Values = {}
    heldout: Values = {}
    for share in shares:
        allowed = budgets.get(share, space.base + int(share * sum(space.deltas[0])))
        if front is None:
            within = replace(space, budget=allowed)
            bits = within.allocate(within.per_byte(priors.sensitivity))
        else:
            bits = bit_text.parse(best(front, allowed), len(context.units))
        budgets.setdefault(share, allowed if front else context.predict(bits).training)
        figures, items[share], words = judged(bits)
        if words is not None:
            heldout[share] = words
        row = {"granularity": settings.search.granularity, "budget": share, **figures}
        rows.append(row)
        console.note(
            ", ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    return rows, {"gold log-probability of held-out items": items, "loss of held-out text": heldout}


def best(front: Path, budget: int) -> str:
    """Return the bits of the member with the highest expected score among those within a budget of bytes."""
    rows = json.loads((front / REPORTS / "pareto.json").read_text())
    within = [row for row in rows if row["front"] and row["peak_memory_bytes"] <= budget]
    return max(within, key=lambda row: row["expected"])["bits"]


def difference(one: Values, other: Values) -> tuple[float, float]:
    """Return (mean, standard error over items) of one's figures minus the other's, averaged over the budgets first."""
    each = np.mean([one[share] - other[share] for share in one], axis=0)
    return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def main(granularities: list[str], text: str, limit: int, shares: Sequence[float], fronts: list[Path]) -> None:
    """Measure, write and print."""
    given, rows, found = checks.load(), [], {}
    budgets: dict[float, int] = {}
    for index, name in enumerate(granularities):
        front = fronts[index] if fronts else None
        search = given.search.model_copy(update={"granularity": name, "seed_bits": ()})
        more, found[name] = measure(given.model_copy(update={"search": search}), text, limit, shares, budgets, front)
        rows += more
        pd.DataFrame(rows).to_csv(REPORTS / "granularity.csv", index=False)
    first, *others = granularities
    validation = {
        name: fmean(row["validation_loss"] for row in rows if row["granularity"] == name) for name in granularities
    }
    for name in others:
        print(f"{name} minus {first}: validation loss {validation[name] - validation[first]:+.4f}")
        for what, values in found[name].items():
            if values:
                mean, error = difference(values, found[first][what])
                print(f"{name} minus {first}: {what} {mean:+.4f} ± {error:.4f}")


if __name__ == "__main__":
    options = dict(item.split("=") for item in sys.argv[1:])
    words = Path(options["text"]).read_text(encoding="utf-8") if "text" in options else ""
    folders = [Path(one) for one in options["fronts"].split(",")] if "fronts" in options else []
    asked = [float(share) for share in options["budgets"].split(",")] if "budgets" in options else None
    main(
        options.get("granularities", "block,group").split(","),
        words,
        int(options.get("limit", 0)),
        asked or (FRONT_BUDGETS if folders else BUDGETS),
        folders,
    )
