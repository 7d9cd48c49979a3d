"""Stage ``search``: Bayesian optimization of the bit vector (paper algorithm 1); the only module that knows optuna.

Reads ``artifacts/pruned``, ``artifacts/bank``, ``reports/importance.json`` and the data. Writes the study's journal,
``artifacts/study/journal.log``, ``reports/trials.csv`` and ``reports/search.json``. A study is named by a digest of all
that defines it, so that the journal can hold many and a changed setting never mixes trials that do not compare.

The journal is the truth about finished trials: a result is in it before its MLflow run ends, and a search that starts
makes MLflow agree with it. A search killed at any moment therefore resumes with every finished trial, each once.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from pipeline.allocate import Bits, Space
from pipeline.importance import Priors
from pipeline.params import Search
from pipeline.quantize import write_bits
from pipeline.trial import Result

JOURNAL = "journal.log"
_FAILURES_IN_A_ROW = 3
_DISTRIBUTION = CategoricalDistribution([4, 8])


class SearchError(RuntimeError):
    """The search cannot go on: what failed and what to do."""


@dataclass(frozen=True)
class Candidate:
    """A bit vector to try and how it was found: a method's name or ``random``, ``sampler``, ``seed``, ``retry``."""

    bits: Bits
    method: str


class Study:
    """A resumable multi-objective study: accuracy up, peak memory down."""

    def __init__(self, folder: Path, name: str, units: int):
        folder.mkdir(parents=True, exist_ok=True)
        cut_torn_line(folder / JOURNAL)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        self._study = optuna.create_study(
            storage=storage, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        self.units = units

    def finished(self) -> list[dict[str, Any]]:
        """Return what was recorded of each finished trial: ``number``, ``run_id``, ``method``, ``result``."""
        return [
            {"number": trial.number, **trial.user_attrs}
            for trial in self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        ]

    def references(self) -> dict[str, dict[str, Any]]:
        """Return what was recorded of each reference row: name -> ``run_id``, ``method``, ``result``."""
        return {
            key.removeprefix("reference:"): value
            for key, value in self._study.user_attrs.items()
            if key.startswith("reference:")
        }

    def record_reference(self, name: str, run_id: str, result: Result) -> None:
        """Keep a reference row; it stands outside the trials."""
        self._study.set_user_attr(f"reference:{name}", {"run_id": run_id, "method": name, "result": result.as_json()})

    def abandoned(self) -> list[Candidate]:
        """End the trials that a killed process left running; return them to be tried again."""
        found = []
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            self._study.tell(trial.number, state=TrialState.FAIL)
            if "bits" in trial.user_attrs:
                bits = tuple(int(digit) for digit in trial.user_attrs["bits"])
                found.append(Candidate(bits, trial.user_attrs["method"]))
        return found

    def start(self, candidate: Candidate) -> Any:
        """Open a trial of a bit vector."""
        self._study.enqueue_trial(_as_params(candidate.bits))
        trial = self._study.ask({f"bits_{index}": _DISTRIBUTION for index in range(self.units)})
        trial.set_user_attr("bits", write_bits(candidate.bits))
        trial.set_user_attr("method", candidate.method)
        return trial

    def complete(self, trial: Any, run_id: str, result: Result) -> None:
        """Record a finished trial."""
        trial.set_user_attr("run_id", run_id)
        trial.set_user_attr("result", result.as_json())
        self._study.tell(trial, [result.accuracy, result.peak_memory_bytes])

    def fail(self, trial: Any, error: BaseException) -> None:
        """Record a trial that did not finish, with its cause and no score."""
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        self._study.tell(trial, state=TrialState.FAIL)


def _bits(result: Result) -> Bits:
    return tuple(int(digit) for digit in result.bits)


def _as_params(bits: Sequence[int]) -> dict[str, int]:
    return {f"bits_{index}": width for index, width in enumerate(bits)}


def cut_torn_line(journal: Path) -> None:
    """Cut a journal at its last newline: a write that a kill tore would break every later read; changes the file."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        with journal.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def seeds(settings: Search, space: Space, priors: Priors, generator: random.Random) -> Iterator[Candidate]:
    """Yield what is tried before the sampler: QPruner1, QPruner2, the sensitivity allocation, your own, random ones."""
    yield Candidate((4,) * space.units, "qpruner1")
    yield Candidate(space.allocate(priors.mutual_information), "qpruner2")
    yield Candidate(space.allocate(_per_byte(priors.sensitivity, space)), "sensitivity")
    for text in settings.seed_bits:
        yield Candidate(tuple(int(digit) for digit in text), "seed")
    for _ in range(settings.n_random):
        yield Candidate(space.draw(generator), "random")


def _per_byte(sensitivity: Sequence[float], space: Space) -> list[float]:
    """Sensitivity for each byte that the unit costs at 8 bits."""
    return [value / max(delta, 1) for value, delta in zip(sensitivity, space.deltas, strict=True)]


def propose(finished: Sequence[Result], space: Space, priors: Priors, seed: int) -> Candidate | None:
    """Return the vector that Optuna's Gaussian process expects to improve the front most; None if none is left.

    The sampler is told how far each vector is within the limit on 8-bit units. What it proposes beyond the limit is
    brought back by giving up the least sensitive units; what was tried already becomes an untried neighbour.
    """
    generator = random.Random(seed)
    seen = {_bits(result) for result in finished}
    distributions = {name: _DISTRIBUTION for name in _as_params((4,) * space.units)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multi-objective GP is marked experimental
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        scratch = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        for result in finished:
            values = [result.accuracy, result.peak_memory_bytes / 2**20]
            past = create_trial(params=_as_params(_bits(result)), distributions=distributions, values=values)
            past.set_constraint("eights", _bits(result).count(8) - space.max_eights)
            scratch.add_trial(past)
        asked = scratch.ask(distributions)
    proposed = tuple(asked.params[name] for name in distributions)
    repaired = space.repair(proposed, priors.sensitivity)
    bits = space.unseen(seen, generator, near=repaired)
    return None if bits is None else Candidate(bits, "sampler")


def run(
    study: Study,
    settings: Search,
    space: Space,
    priors: Priors,
    seed: int,
    attempt: Callable[[Any, Candidate, int], Result | BaseException],
) -> int:
    """Run trials until the study holds ``settings.n_trials`` finished ones.

    Args:
        study: The study; resumed if it holds trials already.
        settings: Section ``search`` of the params.
        space: The feasible vectors.
        priors: Importance of the units.
        seed: Of random vectors and of the sampler.
        attempt: Runs one trial: (open trial, candidate, finished so far) -> its result, or the error that ended it.

    Returns:
        Number of trials that failed in this call.

    Raises:
        SearchError: Three trials in a row failed.
    """
    generator = random.Random(seed)
    queue = study.abandoned() + list(seeds(settings, space, priors, generator))
    failed: set[Bits] = set()
    in_a_row = 0
    while True:
        finished = [Result.from_json(record["result"]) for record in study.finished()]
        if len(finished) >= settings.n_trials:
            return len(failed)
        seen = {_bits(result) for result in finished} | failed
        queue = [candidate for candidate in queue if candidate.bits not in seen]
        candidate = queue.pop(0) if queue else propose(finished, space, priors, seed + len(finished))
        if candidate is not None and candidate.bits in failed:
            other = space.unseen(seen, generator)
            candidate = Candidate(other, "random") if other is not None else None
        if candidate is None:
            return len(failed)  # every feasible vector was tried
        trial = study.start(candidate)
        outcome = attempt(trial, candidate, len(finished))
        if isinstance(outcome, Result):
            in_a_row = 0
            continue
        failed.add(candidate.bits)
        in_a_row += 1
        if in_a_row == _FAILURES_IN_A_ROW:
            raise SearchError(
                f"{in_a_row} trials in a row failed, the last with {type(outcome).__name__}: {outcome}. Mend the cause "
                "and run the same command: finished trials are kept"
            )
