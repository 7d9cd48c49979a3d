"""What an evaluation measured. It imports nothing, so that results are read without lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scores:
    """What an evaluation measured.

    Attributes:
        accuracy: Task -> accuracy in [0, 1] by the task's own metric (``definitions.metric``).
        stderr: Task -> standard error of that accuracy.
        other: ``<task>_<metric>`` -> the metric that is not the task's own, where there is one.
        mean: Mean accuracy, each task with equal weight.
        mean_stderr: Its standard error.
        gold_logprob: Mean over tasks of the mean log-probability of the gold choice among the choices, each choice's
            log-likelihood divided by its length where the task's metric does so; of a task without choices, the mean
            log-likelihood of its target. In nats, below zero.
        gold_logprob_stderr: Its standard error over the items.
        items: Items scored.
        by_item: Task -> of each item its own metric and the log-probability of its gold choice.
    """

    accuracy: dict[str, float]
    stderr: dict[str, float]
    other: dict[str, float]
    mean: float
    mean_stderr: float
    gold_logprob: float
    gold_logprob_stderr: float
    items: int
    by_item: dict[str, list[tuple[float, float]]] = field(default_factory=dict, repr=False)
