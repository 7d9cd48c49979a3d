"""What a recorded landscape says on two choices: the search's objective, and stopping hopeless trials early.

    python -m benchmarks.evidence [folder=benchmarks/landscape] [limit=24] [seeds=400]

Needs ``python -m benchmarks.record ... with_recovery ...``, which keeps every item's scores.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from benchmarks.harness import markdown
from pipeline.search import pareto

TRIALS = 12
FIRST = 8  # items of a task after which a trial may be stopped
EVALUATION = 0.3  # share of a trial that is its evaluation (``make bench``: trial_evaluate / trial)


@dataclass(frozen=True)
class Items:
    """Scores of many vectors on the same items.

    Attributes:
        metric: Each task's own metric, [vectors, tasks, items].
        gold_logprob: Log-probability of the gold choice, [vectors, tasks, items].
        memory: Peak bytes, [vectors].
        validation_loss: Nats a token of held-out rows, [vectors].
    """

    metric: np.ndarray
    gold_logprob: np.ndarray
    memory: np.ndarray
    validation_loss: np.ndarray

    @staticmethod
    def read(folder: Path, recovered: bool) -> Items:
        """Return the vectors measured with recovery, or those without."""
        rows = pd.read_parquet(folder / "items.parquet")
        rows = rows[(rows["steps"] > 0) == recovered]
        table = pd.read_csv(folder / "table.csv", dtype={"bits": str})
        table = table[(table["steps"] > 0) == recovered].set_index(["ratio", "bits"])
        wide = rows.pivot_table(index=["ratio", "bits"], columns=["task", "item"], values=["metric", "gold_logprob"])
        tasks = rows["task"].nunique()
        metric, logprob = (wide[name].to_numpy().reshape(len(wide), tasks, -1) for name in ("metric", "gold_logprob"))
        own = table.loc[wide.index]
        return Items(metric, logprob, own["peak_memory_bytes"].to_numpy(float), own["validation_loss"].to_numpy(float))


def objective(items: Items, limit: int, seeds: int) -> str:
    """Compare choosing by accuracy, by the gold answer's log-probability and by text, judged on held-out items.

    Each time, ``limit`` items of a task are for the search, drawn at random, the others for judging; a search is
    ``TRIALS`` of the vectors, and its pick the one with the highest score. Gains are over the mean of those vectors.
    """
    generator = np.random.default_rng(0)
    vectors, _, count = items.metric.shape
    names = ("accuracy", "gold_logprob", "validation_loss")
    tables = (items.metric, items.gold_logprob)
    gains: dict[str, list[list[float]]] = {name: [] for name in names}
    agreement: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(seeds):
        order = generator.permutation(count)
        seen, held = order[:limit], order[limit:]
        judged = [table[:, :, held].mean((1, 2)) for table in tables]
        trials = generator.choice(vectors, min(TRIALS, vectors), replace=False)
        scores = [*(table[:, :, seen].mean((1, 2)) for table in tables), -items.validation_loss]
        for name, score in zip(names, scores, strict=True):
            pick = trials[score[trials].argmax()]
            gains[name].append([one[pick] - one[trials].mean() for one in judged])
            agreement[name].append([spearmanr(score, one).statistic for one in judged])
    columns = ["chosen by", "held-out accuracy gained, points", "held-out gold log-probability gained, nats"]
    columns += ["rank correlation with held-out accuracy", "with held-out gold log-probability"]
    cells = []
    for name in names:
        mean, ranks = np.mean(gains[name], axis=0), np.mean(agreement[name], axis=0)
        cells.append([name, f"{100 * mean[0]:+.2f}", f"{mean[1]:+.4f}", f"{ranks[0]:.2f}", f"{ranks[1]:.2f}"])
    return markdown(columns, cells)


def hopeless(items: Items, seeds: int) -> str:
    """Replay searches that stop a trial which, on its first items, is surely worse than a smaller model tried before.

    Surely: by some number of standard errors of the paired difference. The vectors come at random, so that more of
    them are hopeless than in a search that is guided. What is saved counts in whole trials, of which the evaluation is
    ``EVALUATION``; what is lost is hypervolume of the front, as a share.
    """
    generator = np.random.default_rng(0)
    vectors, tasks, count = items.gold_logprob.shape
    whole = items.gold_logprob.reshape(vectors, -1)
    part = items.gold_logprob[:, :, :FIRST].reshape(vectors, -1)
    quality = whole.mean(1)
    worst_quality, worst_memory = quality.min() - 1e-3, items.memory.max() * 1.001

    def volume(chosen: list[int]) -> float:
        return pareto.hypervolume([(quality[one], items.memory[one]) for one in chosen], worst_quality, worst_memory)

    cells = []
    for errors in (1.0, 2.0, 3.0):
        stopped, lost = [], []
        for _ in range(seeds):
            order = generator.choice(vectors, min(TRIALS, vectors), replace=False)
            full: list[int] = []
            for one in order:
                difference = part[one] - part[[other for other in full if items.memory[other] <= items.memory[one]]]
                spread = difference.std(1, ddof=1) / np.sqrt(difference.shape[1])
                if not (difference.mean(1) + errors * spread < 0).any():
                    full.append(one)
            stopped.append(len(order) - len(full))
            lost.append(1 - volume(full) / volume(list(order)))
        saved = np.mean(stopped) * EVALUATION * (1 - FIRST / count)
        cells.append([f"{errors:g}", f"{np.mean(stopped):.1f}", f"{saved:.2f}", f"{100 * np.mean(lost):.2f} %"])
    columns = ["standard errors", f"stopped of {TRIALS}", "trials' worth saved", "hypervolume lost"]
    return markdown(columns, cells)


def main(folder: Path, limit: int, seeds: int) -> None:
    """Print both."""
    recovered, cheap = Items.read(folder, True), Items.read(folder, False)
    found = objective(recovered, limit, seeds)
    print(f"Objective, {len(recovered.memory)} recovered vectors, {seeds} searches:\n\n{found}")
    print(f"Stopping after {FIRST} items of a task, {len(cheap.memory)} vectors:\n\n{hopeless(cheap, seeds)}")


if __name__ == "__main__":
    given = dict(item.split("=") for item in sys.argv[1:])
    main(Path(given.get("folder", "benchmarks/landscape")), int(given.get("limit", 24)), int(given.get("seeds", 400)))
