"""How sure the differences between trials are: trials answer the same items, so they are compared item by item.

The standard error of a score mostly tells which items were asked, and other items would move all trials alike. Here the
items are drawn again, the same for all trials (bootstrap). What then still varies between trials is the error of their
differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Items = Mapping[str, Any]  # what a trial measured item by item: ``by_item`` and ``by_row`` of ``trial.Result``
_AT_ONCE = 100  # draws: of 20,000 items they take 16 MB


def strata(record: Items, objective: str) -> list[np.ndarray]:
    """Return the items that an objective rests on, of each task or of the held-out rows: [items, 2], sum and weight.

    The objective is the mean over strata of what the items sum up to by their weights.

    Args:
        record: ``by_item`` and ``by_row`` as ``trial.Result`` has them.
        objective: ``response_logprob``, ``gold_logprob``, ``accuracy``, or a task's name for its accuracy.
    """
    if objective == "response_logprob":
        return [np.array(record["by_row"], dtype=float) * (-1, 1)]
    tasks = record["by_item"]
    column = 1 if objective == "gold_logprob" else 0
    chosen = [tasks[objective]] if objective in tasks else tasks.values()
    columns = [np.array(items, dtype=float)[:, column] for items in chosen]
    return [np.column_stack([values, np.ones(len(values))]) for values in columns]


def score(items: Sequence[np.ndarray]) -> float:
    """Return the objective that strata give."""
    return float(np.mean([stratum[:, 0].sum() / stratum[:, 1].sum() for stratum in items]))


def redrawn(trials: Sequence[Sequence[np.ndarray]], draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Return every trial's score on items drawn anew from each stratum, with replacement: [draws, trials].

    Args:
        trials: Strata of each trial, of the same items in the same order.
        draws: How often the items are drawn.
        seed: Of the draws.

    Raises:
        ValueError: The trials did not answer the same items.
    """
    generator = np.random.default_rng(seed)
    scores = np.zeros((draws, len(trials)))
    for stratum in zip(*trials, strict=True):
        sums, weights = np.moveaxis(np.stack(stratum), 2, 0)  # [trials, items] each
        count = sums.shape[1]
        for start in range(0, draws, _AT_ONCE):
            here = slice(start, min(start + _AT_ONCE, draws))
            times = generator.multinomial(count, np.full(count, 1 / count), size=here.stop - here.start)
            scores[here] += (times @ sums.T) / (times @ weights.T)
    return scores / len(trials[0]) if trials else scores


def errors(scores: np.ndarray, among: Sequence[bool]) -> np.ndarray:
    """Return each trial's standard error without what the trials share: that of its distance from their mean.

    Args:
        scores: As ``redrawn`` returns them.
        among: Which trials the mean is over, [trials].
    """
    if not any(among):
        return scores.std(axis=0)
    return (scores - scores[:, np.asarray(among)].mean(axis=1, keepdims=True)).std(axis=0)


def undominated(scores: np.ndarray, memories: Sequence[float]) -> np.ndarray:
    """Return in which share of the draws no other trial dominates each one, [trials].

    Args:
        scores: As ``redrawn`` returns them; higher is better.
        memories: Of each trial in bytes; lower is better.
    """
    memory = np.asarray(memories)
    shares = np.empty(len(memory))
    cheaper = np.full(len(scores), -np.inf)  # the best score for less memory, in each draw
    for value in np.unique(memory):
        equal = scores[:, memory == value]
        best = equal.max(axis=1)
        shares[memory == value] = 1 - ((equal <= cheaper[:, None]) | (equal < best[:, None])).mean(axis=0)
        cheaper = np.maximum(cheaper, best)
    return shares


def difference(trial: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return by how much one trial's score is above another's, and the standard error of that."""
    scores = redrawn([trial, other])
    return score(trial) - score(other), float((scores[:, 0] - scores[:, 1]).std())
