"""Bayesian optimization of ratio and bits (paper algorithm 1): what is tried, in which order, and when it ends.

The vectors of the paper and random ones come first (``history.seeds``), then those that ``acquire`` proposes. Results
are kept in a ``study.Study``. All that decides comes from the study, so that an interrupted search goes on as if it had
not been.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from pipeline.bits import Vector
from pipeline.search import SearchError, acquire
from pipeline.search.allocate import Spaces
from pipeline.search.history import seeds
from pipeline.search.study import Candidate, Study, options_of
from pipeline.search.surrogate import Belief, Observation

if TYPE_CHECKING:
    from optuna.trial import Trial

    from pipeline.compress.priors import Priors
    from pipeline.trial.result import Result

_FAILURES_IN_A_ROW = 3


class Attempts(Protocol):
    """Runs trials, as many side by side as it has workers, and records how they ended."""

    @property
    def free(self) -> int:
        """Return how many more trials would be worked on now."""

    @property
    def busy(self) -> bool:
        """Return whether it works on anything."""

    def begin(self, trial: Trial, candidate: Candidate) -> None:
        """Hand out an open trial."""

    def end(self) -> tuple[Vector, Exception | None] | None:
        """Wait until something ends; return a trial's vector with the error that ended it, or None: it was no trial."""


@dataclass(frozen=True)
class Settings:
    """How a search goes, as section ``search`` of the params says it.

    Attributes:
        n_trials: Finished trials that the study should hold.
        n_random: Random vectors before the sampler takes over.
        patience: Trials of the sampler in a row without a better front that end the search; 0: never.
        objective: The quality.
        seed: Of random vectors and of the sampler.
        memory: The peak that counts: ``training`` or ``inference``.
        seed_vectors: The user's own vectors to try first.
    """

    n_trials: int
    n_random: int
    patience: int
    objective: str
    seed: int
    memory: str = "training"
    seed_vectors: tuple[Vector, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What is searched, and what is known of it before any trial.

    Attributes:
        spaces: The feasible vectors.
        priors: Ratio -> importance of the units.
        history: Results of an earlier search; they teach, and random starts among them are left out.
    """

    spaces: Spaces
    priors: Mapping[float, Priors]
    history: Sequence[Observation] = ()

    @cached_property
    def beliefs(self) -> dict[float, Belief]:
        """Return what is known of each ratio before any trial."""
        return beliefs(self.priors, self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the bits that a unit may have, ascending."""
        return next(iter(self.spaces.at.values())).widths

    @property
    def options(self) -> dict[str, tuple[float, ...]]:
        """Return a trial's parameters in the study, with their values."""
        names = next(iter(self.priors.values())).units
        return options_of(sorted(self.priors), names, self.widths)


def beliefs(priors: Mapping[float, Priors], widths: Sequence[int]) -> dict[float, Belief]:
    """Return what the sampler's model is told of each ratio.

    Args:
        priors: Ratio -> importance of the units.
        widths: The bits that a unit may have, ascending; 4 is the lowest that gains are known from.
    """
    return {
        ratio: Belief(-prior.distance, tuple(prior.gains(width) for width in widths[1:]), tuple(widths[1:]))
        for ratio, prior in priors.items()
    }


@dataclass(frozen=True)
class Ended:
    """How a search ended: why, and how many trials failed in this call."""

    reason: str
    failed: int


def stale(finished: Sequence[tuple[str, Result]], objective: str, memory: str = "training") -> int:
    """Return how many of the sampler's trials have passed since the front's hypervolume last grew.

    It grows with a trial if and only if no earlier one is at least as good in both objectives.

    Args:
        finished: (method, result) in the order of the trials.
        objective: Name of the quality.
        memory: The peak that counts.
    """
    count = 0
    earlier: list[tuple[float, float]] = []
    for method, result in finished:
        score, peak = result.score(objective)[0], float(result.peak(memory) or 0)
        if not any(other >= score and cost <= peak for other, cost in earlier):
            count = 0
        elif method == "sampler":
            count += 1
        earlier.append((score, peak))
    return count


def propose(
    finished: Sequence[Result],
    problem: Problem,
    objective: str,
    exclude: set[Vector],
    seed: int,
    pending: Sequence[Vector] = (),
) -> Candidate | None:
    """Return the vector that should improve the front most; None if every feasible one is excluded.

    An imported result teaches until this study has tried its vector itself. Before any result the vector is random.

    Args:
        finished: The study's results.
        problem: What is searched.
        objective: Name of the quality.
        exclude: Vectors not to propose.
        seed: Of some of the sampler's starts.
        pending: Vectors that are tried now, among the excluded ones.
    """
    generator = random.Random(seed)
    measured = [Observation(result.vector, *result.score(objective)) for result in finished]
    tried = {observation.vector for observation in measured}
    if not measured:
        vector = problem.spaces.unseen(exclude, generator)
    else:
        taught = [observation for observation in problem.history if observation.vector not in tried]
        known = [*measured, *taught]
        vector = acquire.propose(known, problem.spaces, problem.beliefs, exclude | tried, generator, pending)
    return None if vector is None else Candidate(vector, "sampler")


def run(study: Study, settings: Settings, problem: Problem, attempts: Attempts) -> Ended:
    """Run trials until the study holds ``settings.n_trials`` finished ones, or the front stopped growing.

    What decides is the same for one worker and for many: with several, a proposal counts on what is tried already, and
    when the search is at its end, trials that have begun are waited for.

    Args:
        study: The study; resumed if it holds trials already.
        settings: How the search goes.
        problem: What is searched.
        attempts: Runs the trials.

    Raises:
        SearchError: Three trials in a row failed.
    """
    queue = _queue(study, settings, problem)
    failed: set[Vector] = set()
    pending: list[Vector] = []
    in_a_row = 0
    while True:
        records = study.finished()
        reason = _end(settings, [(record.method, record.result) for record in records])
        if not reason and attempts.free > 0 and len(records) + len(pending) < settings.n_trials:
            finished = [record.result for record in records]
            seen = {result.vector for result in finished} | failed | set(pending)
            queue = [candidate for candidate in queue if candidate.vector not in seen]
            seed = settings.seed + len(finished) + len(pending)
            candidate = queue.pop(0) if queue else propose(finished, problem, settings.objective, seen, seed, pending)
            if candidate is not None:
                attempts.begin(study.start(candidate, problem.options), candidate)
                pending.append(candidate.vector)
                continue
            reason = "every feasible vector was tried"
        if not attempts.busy:
            return Ended(reason, len(failed))
        ended = attempts.end()
        if ended is None:
            continue
        vector, error = ended
        pending.remove(vector)
        if error is None:
            in_a_row = 0
            continue
        failed.add(vector)
        in_a_row += 1
        if in_a_row == _FAILURES_IN_A_ROW:
            raise SearchError(
                f"{in_a_row} trials in a row failed, the last with {type(error).__name__}: {error}. Mend the cause "
                "and run the same command: finished trials are kept"
            )


def _queue(study: Study, settings: Settings, problem: Problem) -> list[Candidate]:
    """Return what is tried before the sampler: what a killed process left open, then the seeds."""
    known = {observation.vector for observation in problem.history}
    generator = random.Random(settings.seed)
    starts = seeds(problem.spaces, problem.priors, settings.seed_vectors, settings.n_random, generator)
    return study.abandoned() + [
        candidate for candidate in starts if candidate.method != "random" or candidate.vector not in known
    ]


def _end(settings: Settings, finished: Sequence[tuple[str, Result]]) -> str:
    """Return why a search is at its end, or an empty text."""
    if len(finished) >= settings.n_trials:
        return f"{len(finished)} trials are finished (search.n_trials)"
    if settings.patience and stale(finished, settings.objective, settings.memory) >= settings.patience:
        return f"{settings.patience} trials of the sampler in a row did not improve the front (search.patience)"
    return ""
