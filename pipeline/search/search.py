"""Bayesian optimization of the bit vector (paper algorithm 1): what is tried, in which order, and when it ends.

The vectors of the paper and random ones come first (``history.seeds``), then those that ``surrogate`` proposes. Results
are kept in a ``study.Study``. All that decides comes from the study, so that an interrupted search goes on as if it had
not been.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline import bits as bit_text
from pipeline.search import SearchError, surrogate
from pipeline.search.allocate import Bits, Space
from pipeline.search.history import seeds
from pipeline.search.study import Candidate, Study
from pipeline.search.surrogate import Observation

if TYPE_CHECKING:
    from optuna.trial import Trial

    from pipeline.compress.importance import Priors
    from pipeline.trial.result import Result

_FAILURES_IN_A_ROW = 3
Attempt = Callable[["Trial", Candidate, int], "Result | BaseException"]


@dataclass(frozen=True)
class Settings:
    """How a search goes, as section ``search`` of the params says it.

    Attributes:
        n_trials: Finished trials that the study should hold.
        n_random: Random vectors before the sampler takes over.
        patience: Trials of the sampler in a row without a better front that end the search; 0: never.
        objective: The quality.
        seed: Of random vectors and of the sampler.
        seed_bits: The user's own vectors to try first, as text.
    """

    n_trials: int
    n_random: int
    patience: int
    objective: str
    seed: int
    seed_bits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What is searched, and what is known of it before any trial.

    Attributes:
        space: The feasible vectors.
        priors: Importance of the units.
        history: Results of an earlier search; they teach, and random starts among them are left out.
    """

    space: Space
    priors: Priors
    history: Sequence[Observation] = ()


@dataclass(frozen=True)
class Ended:
    """How a search ended: why, and how many trials failed in this call."""

    reason: str
    failed: int


def stale(finished: Sequence[tuple[str, Result]], objective: str) -> int:
    """Return how many of the sampler's trials have passed since the front's hypervolume last grew.

    It grows with a trial if and only if no earlier one is at least as good in both objectives.

    Args:
        finished: (method, result) in the order of the trials.
        objective: Name of the quality.
    """
    count = 0
    earlier: list[tuple[float, float]] = []
    for method, result in finished:
        score, memory = result.score(objective)[0], float(result.peak_memory_bytes or 0)
        if not any(other >= score and cost <= memory for other, cost in earlier):
            count = 0
        elif method == "sampler":
            count += 1
        earlier.append((score, memory))
    return count


def propose(
    finished: Sequence[Result], problem: Problem, objective: str, exclude: set[Bits], seed: int
) -> Candidate | None:
    """Return the vector that should improve the front most; None if every feasible one is excluded.

    An imported result teaches until this study has tried its vector itself.

    Args:
        finished: The study's results.
        problem: What is searched.
        objective: Name of the quality.
        exclude: Vectors not to propose.
        seed: Of some of the sampler's starts.
    """
    generator = random.Random(seed)
    measured = [Observation(_bits(result), *result.score(objective)) for result in finished]
    tried = {observation.bits for observation in measured}
    if not measured:
        bits = problem.space.unseen(exclude, generator)
    else:
        taught = [observation for observation in problem.history if observation.bits not in tried]
        bits = surrogate.propose(
            [*measured, *taught], problem.space, problem.priors.sensitivity, exclude | tried, generator
        )
    return None if bits is None else Candidate(bits, "sampler")


def _bits(result: Result) -> Bits:
    return bit_text.parse(result.bits, len(result.bits))


def run(study: Study, settings: Settings, problem: Problem, attempt: Attempt) -> Ended:
    """Run trials until the study holds ``settings.n_trials`` finished ones, or the front stopped growing.

    Args:
        study: The study; resumed if it holds trials already.
        settings: How the search goes.
        problem: What is searched.
        attempt: Runs one trial: (open trial, candidate, finished so far) -> its result, or the error that ended it.

    Raises:
        SearchError: Three trials in a row failed.
    """
    queue = _queue(study, settings, problem)
    failed: set[Bits] = set()
    in_a_row = 0
    while True:
        records = study.finished()
        finished = [record.result for record in records]
        if reason := _end(settings, [(record.method, record.result) for record in records]):
            return Ended(reason, len(failed))
        seen = {_bits(result) for result in finished} | failed
        queue = [candidate for candidate in queue if candidate.bits not in seen]
        candidate = (
            queue.pop(0)
            if queue
            else propose(finished, problem, settings.objective, seen, settings.seed + len(finished))
        )
        if candidate is None:
            return Ended("every feasible vector was tried", len(failed))
        outcome = attempt(study.start(candidate), candidate, len(finished))
        if not isinstance(outcome, BaseException):
            in_a_row = 0
            continue
        failed.add(candidate.bits)
        in_a_row += 1
        if in_a_row == _FAILURES_IN_A_ROW:
            raise SearchError(
                f"{in_a_row} trials in a row failed, the last with {type(outcome).__name__}: {outcome}. Mend the cause "
                "and run the same command: finished trials are kept"
            )


def _queue(study: Study, settings: Settings, problem: Problem) -> list[Candidate]:
    """Return what is tried before the sampler: what a killed process left open, then the seeds."""
    known = {observation.bits for observation in problem.history}
    generator = random.Random(settings.seed)
    starts = seeds(problem.space, problem.priors, settings.seed_bits, settings.n_random, generator)
    return study.abandoned() + [
        candidate for candidate in starts if candidate.method != "random" or candidate.bits not in known
    ]


def _end(settings: Settings, finished: Sequence[tuple[str, Result]]) -> str:
    """Return why a search is at its end, or an empty text."""
    if len(finished) >= settings.n_trials:
        return f"{len(finished)} trials are finished (search.n_trials)"
    if settings.patience and stale(finished, settings.objective) >= settings.patience:
        return f"{settings.patience} trials of the sampler in a row did not improve the front (search.patience)"
    return ""
