"""A run as the store has it, without MLflow's own types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tracked:
    """A run as the store has it.

    Attributes:
        run_id: Its id.
        experiment_id: Its experiment's.
        name: Its name.
        status: ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED``.
        artifact_uri: Where its artifacts are.
        params: Its params.
        metrics: The latest value of each metric.
        tags: Its tags.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    artifact_uri: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
