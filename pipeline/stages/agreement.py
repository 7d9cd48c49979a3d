"""Whether MLflow says of a search's trials what its journal says, which is the truth about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline import console, tracking
from pipeline.errors import UserError
from pipeline.search.study import Record
from pipeline.tracking import Tracked


class TrackingBehind(UserError):
    """The store does not hold what the journal holds; the message says which trials and what to do."""


def by_journal_run(study: str, journal: str) -> dict[str, Tracked]:
    """Return the runs of one journal's study by the run ids that stand in the journal."""
    runs = [run for run in tracking.trials(study) if run.tags.get("journal") == journal]
    return {run.tags.get(tracking.JOURNAL_ID, run.run_id): run for run in runs}


def tracked(study: str, journal: str) -> list[Tracked]:
    """Return the finished runs of one journal's study, a run for each trial and reference."""
    return [run for run in by_journal_run(study, journal).values() if run.status == "FINISHED"]


def verified_runs(study: str, journal: str, records: Sequence[Record]) -> list[Tracked]:
    """Return the runs of a study's trials and references, which must say what the journal says.

    Runs that the journal does not hold are left out with a note: another copy of it has gone on in the same store.

    Args:
        study: The study's name.
        journal: The journal's id.
        records: What the journal holds.

    Raises:
        TrackingBehind: A run is missing or says something else.
    """
    known = by_journal_run(study, journal)
    finished = {run_id: run for run_id, run in known.items() if run.status == "FINISHED"}
    if lost := [record.name for record in records if record.run_id not in finished]:
        raise TrackingBehind(
            f"the MLflow store has no finished run of {_listed(lost)}, which the journal of the search holds; write "
            "them into it with: mlflow run . -e search"
        )
    for record in records:
        run = finished[record.run_id]
        if differing := _differences(run, record):
            raise TrackingBehind(
                f"run {run.run_id} ({record.name}) does not say what the journal says: {'; '.join(differing)}. Was it "
                "edited? Delete the run, and write it again with: mlflow run . -e search"
            )
    if others := len(finished) - len(records):
        console.note(
            f"{others} runs of study {study} are not in this folder's journal, so a copy of it has gone on elsewhere; "
            "they are left out"
        )
    return [finished[record.run_id] for record in records]


def _differences(run: Tracked, record: Record) -> list[str]:
    """Return in what a run and the journal differ: bits and all figures that stand in both."""
    differences = []
    if run.tags.get("bits") != record.values["bits"]:
        differences.append(f"bits {run.tags.get('bits')}, journal {record.values['bits']}")
    for key, value in _figures(record.values).items():
        other = run.metrics.get(key, value)
        if not math.isclose(other, value, rel_tol=1e-9, abs_tol=1e-12):
            differences.append(f"{key} {other}, journal {value}")
    return differences


def _figures(values: Mapping[str, object]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
