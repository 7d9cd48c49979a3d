"""What a search starts from: the vectors that are tried before the sampler, and the results of an earlier search."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from pipeline import bits as bit_text
from pipeline.params import Objective, read_history
from pipeline.search import SearchError
from pipeline.search.allocate import Space
from pipeline.search.study import Candidate
from pipeline.search.surrogate import Observation

if TYPE_CHECKING:
    from pipeline.compress.importance import Priors
    from pipeline.trial.result import Result


def seeds(
    space: Space, priors: Priors, given: Sequence[str], n_random: int, generator: random.Random
) -> Iterator[Candidate]:
    """Yield what is tried before the sampler.

    These are QPruner1, QPruner2, the allocation by sensitivity, the user's own vectors and random ones.

    Args:
        space: The feasible vectors.
        priors: Importance of the units.
        given: The user's own vectors, as text.
        n_random: How many random ones.
        generator: Draws these.
    """
    yield Candidate((4,) * space.units, "qpruner1")
    yield Candidate(space.allocate(priors.mutual_information), "qpruner2")
    yield Candidate(space.allocate(space.per_byte(priors.sensitivity)), "sensitivity")
    for text in given:
        yield Candidate(bit_text.parse(text, space.units), "seed")
    for _ in range(n_random):
        yield Candidate(space.draw(generator), "random")


def import_history(path: str | None, units: int, objective: str) -> list[Observation]:
    """Return an earlier search's results as observations that teach this one; none without a path.

    Raises:
        SearchError: A result is of another number of units.
    """
    results = read_history(path) if path else []
    for result in results:
        if len(result["bits"]) != units:
            raise SearchError(
                f"search.history: {path} holds bits {result['bits']!r}, which cover {len(result['bits'])} units, but "
                f"this model has {units} at this granularity; name a history of the same model and granularity, or null"
            )
    return [
        Observation(
            bit_text.parse(result["bits"], units), result[objective], result[f"{objective}_stderr"], imported=True
        )
        for result in results
    ]


def export_history(study: str, finished: Sequence[Result]) -> dict[str, object]:
    """Return what ``reports/history.json`` holds: the study's name and each result's bits, objectives and memory."""
    objectives = [f"{name}{ending}" for name in get_args(Objective) for ending in ("", "_stderr")]
    kept = ("bits", *objectives, "peak_memory_bytes")
    return {"study": study, "results": [{key: getattr(result, key) for key in kept} for result in finished]}
