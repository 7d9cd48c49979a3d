"""What a search starts from: the vectors that are tried before the sampler, and the results of an earlier search."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.params import Objective, read_history
from pipeline.search import SearchError
from pipeline.search.allocate import Spaces
from pipeline.search.study import Candidate
from pipeline.search.surrogate import Observation

if TYPE_CHECKING:
    from pipeline.compress.priors import Priors
    from pipeline.trial.result import Result


PAPER_RATIO = 0.2  # of the paper's tables; its methods are tried at the searched ratio that is next to it
PAPER_SHARE = 0.25  # of units that its QPruner2 raises


def paper_ratio(ratios: Sequence[float]) -> float:
    """Return the ratio at which the paper's methods are tried: that next to the paper's, of pruned models if any."""
    return min([ratio for ratio in ratios if ratio] or ratios, key=lambda ratio: abs(ratio - PAPER_RATIO))


def seeds(
    spaces: Spaces, priors: Mapping[float, Priors], given: Sequence[Vector], n_random: int, generator: random.Random
) -> Iterator[Candidate]:
    """Yield what is tried before the sampler.

    At several ratios the ends come first: the smallest model, and what users would take instead, the model that is not
    pruned at 4 bits and at 8. Then QPruner1 and QPruner2 at the paper's ratio, with the paper's share of raised units,
    the lowest bits at each other ratio, the user's own vectors and random ones. At one ratio the allocation by
    sensitivity stands for what teaches the ratios.

    Args:
        spaces: The feasible vectors.
        priors: Ratio -> importance of the units.
        given: The user's own vectors.
        n_random: How many random ones.
        generator: Draws these.
    """
    ratio = paper_ratio(spaces.ratios)
    space, prior = spaces.at[ratio], priors[ratio]
    few = replace(space, max_raised=min(space.max_raised, int(space.units * PAPER_SHARE)))
    if len(spaces.at) > 1:
        smallest = spaces.smallest()
        yield Candidate(smallest, "qpruner1" if smallest.ratio == ratio else "smallest")
        yield from _uniform(spaces)
    yield Candidate(Vector(ratio, (space.widths[0],) * space.units), "qpruner1")
    yield Candidate(Vector(ratio, few.allocate(prior.mutual_information)), "qpruner2")
    if len(spaces.at) == 1:
        yield Candidate(Vector(ratio, few.allocate(few.per_byte(prior.sensitivity))), "sensitivity")
    for other, there in spaces.at.items():
        yield Candidate(Vector(other, (there.widths[0],) * there.units), "uniform")
    for vector in given:
        yield Candidate(vector, "seed")
    for _ in range(n_random):
        yield Candidate(spaces.draw(generator), "random")


def _uniform(spaces: Spaces) -> Iterator[Candidate]:
    """Yield the models that are not pruned with the same bits everywhere, where they fit."""
    space = spaces.at.get(0.0)
    for width in space.widths if space else ():
        vector = Vector(0.0, (width,) * spaces.units)
        if width < bit_text.DENSE and vector in spaces:
            yield Candidate(vector, "uniform")


def import_history(
    path: str | None, units: int, ratios: Sequence[float], objective: str, widths: Sequence[int] = bit_text.WIDTHS
) -> list[Observation]:
    """Return an earlier search's results as observations that teach this one; none without a path.

    Results at ratios or widths that are not searched are left out.

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
    vectors = [Vector(result["ratio"], bit_text.read(result["bits"])) for result in results]
    return [
        Observation(vector, result[objective], result[f"{objective}_stderr"], imported=True)
        for vector, result in zip(vectors, results, strict=True)
        if vector.ratio in ratios and set(vector.bits) <= set(widths)
    ]


def export_history(study: str, finished: Sequence[Result]) -> dict[str, object]:
    """Return what ``reports/history.json`` holds: the study's name and each result's vector, objectives and memory."""
    objectives = [f"{name}{ending}" for name in get_args(Objective) for ending in ("", "_stderr")]
    kept = ("ratio", "bits", *objectives, "peak_memory_bytes", "inference_memory_bytes")
    return {"study": study, "results": [{key: getattr(result, key) for key in kept} for result in finished]}
