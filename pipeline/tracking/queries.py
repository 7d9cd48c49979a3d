"""Runs found again: by a tag, by their id, with what they measured item by item."""

from __future__ import annotations

import json
import time
from contextlib import suppress

from mlflow import entities
from mlflow.artifacts import load_text

from pipeline.errors import UserError
from pipeline.tracking import database
from pipeline.tracking.runs import ITEMS, PARENT_TAG, Run
from pipeline.tracking.store import Missing, StoreError, Unreachable, address, asking, client, experiments, refuse_moved
from pipeline.tracking.tracked import Tracked

_PAGE = 1000


class ItemsLost(UserError):
    """A trial's run lacks what it measured item by item; what to do."""


def trials(study: str) -> list[Tracked]:
    """Return all runs of a study's trials and references, newest last."""
    return tagged("study", study)


def tagged(key: str, value: str) -> list[Tracked]:
    """Return all runs with a tag, newest last."""
    return _tagged(experiments(), key, value)  # experiments first: a store that is new gets its tables there


@asking
def _tagged(within: list[str], key: str, value: str) -> list[Tracked]:
    if address().startswith("sqlite"):
        with suppress(database.OtherTables):
            return database.tagged(address(), within, key, value)
    return _search_tagged(within, key, value)


def _search_tagged(within: list[str], key: str, value: str) -> list[Tracked]:
    runs: list[Tracked] = []
    token = None
    while True:
        page = client().search_runs(
            within,
            f"tags.{key} = '{value}'",
            order_by=["attributes.start_time ASC"],
            max_results=_PAGE,
            page_token=token,
        )
        runs += map(_tracked, page)
        token = page.token
        if not token:
            return runs


def _tracked(run: entities.Run) -> Tracked:
    info, data = run.info, run.data
    return Tracked(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        name=info.run_name,
        status=info.status,
        artifact_uri=info.artifact_uri,
        params=dict(data.params),
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )


def items(trial: Tracked) -> dict[str, object]:
    """Return what a trial measured item by item.

    Args:
        trial: Its run, as ``trials`` returns it.

    Raises:
        ItemsLost: Its run has no such file.
        StoreError: The project's folder was moved, or the store does not answer.
    """
    try:
        return json.loads(asking(load_text)(f"{trial.artifact_uri}/{ITEMS}"))
    except Unreachable:
        raise
    except (OSError, StoreError):
        refuse_moved(trial.artifact_uri)
        raise ItemsLost(
            f"run {trial.run_id} ({trial.name}) has lost its artifact {ITEMS}; delete the run, then run: "
            "mlflow run . -e search (it writes the run again from what it keeps of each trial)"
        ) from None


@asking
def run(run_id: str) -> Tracked:
    """Return one run as the store has it.

    Raises:
        Missing: There is no such run.
    """
    return _tracked(client().get_run(run_id))


def reopen(run_id: str) -> Run | None:
    """Return a handle on an existing run, or None if the store does not have it."""
    try:
        known = run(run_id)
    except Missing:
        return None
    return Run(run_id, known.experiment_id, known.name)


def move(run_id: str, parent: Run) -> None:
    """Put a run below another one."""
    set_tag(run_id, PARENT_TAG, parent.run_id)


@asking
def set_tag(run_id: str, key: str, value: str) -> None:
    """Set a tag of any run."""
    client().set_tag(run_id, key, value)


@asking
def set_metric(run_id: str, key: str, value: float) -> None:
    """Set a metric of any run, in place of what it had: charts and sorting know metrics alone."""
    client().log_metric(run_id, key, value, int(time.time() * 1000))
