"""Stage ``search``: Bayesian optimization of the bit vector (paper algorithm 1); the only module that knows optuna.

Reads ``artifacts/pruned``, ``artifacts/bank``, ``reports/importance.json`` and the data. Writes the study's journal,
``artifacts/study/journal.log``, ``reports/trials.csv``, ``reports/trials.parquet``, ``reports/history.json`` and
``reports/search.json``. A study is named by a digest of all that defines it, so that the journal can hold many and a
changed setting never mixes trials that do not compare. What vector to try next is ``surrogate.py``'s.

The journal is the truth about finished trials: a result is in it before its MLflow run ends, and a search that starts
makes MLflow agree with it. A search killed at any moment therefore resumes with every finished trial, each once.
"""

from __future__ import annotations

import fcntl
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pipeline import bits as bit_text
from pipeline.compress.importance import Priors
from pipeline.errors import UserError
from pipeline.params import Objective, Search, read_history
from pipeline.search import surrogate
from pipeline.search.allocate import Bits, Space
from pipeline.search.surrogate import Observation
from pipeline.trial.trial import Result

JOURNAL = "journal.log"
_FAILURES_IN_A_ROW = 3


class SearchError(UserError):
    """The search cannot go on: what failed and what to do."""


@dataclass(frozen=True)
class Candidate:
    """A bit vector to try and how it was found: a method's name or ``random``, ``sampler``, ``seed``, ``retry``."""

    bits: Bits
    method: str


@dataclass(frozen=True)
class Ended:
    """How a search ended: why, and how many trials failed in this call."""

    reason: str
    failed: int


class Study:
    """A resumable multi-objective study: quality up, peak memory down.

    Args:
        folder: Where the journal is; this process has it to itself from then on.
        name: The digest of all that defines the study.
        objective: As section ``search`` has it: the study's first value.

    Raises:
        SearchError: Another process searches there.
    """

    def __init__(self, folder: Path, name: str, objective: str = "gold_logprob"):
        _hold(folder)
        cut_torn_line(folder / JOURNAL)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        self._study = optuna.create_study(
            storage=storage, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        self.objective = objective
        for trial in self._running():
            if "result" in trial.user_attrs:  # a kill came between its result and its end
                self._tell(trial.number, Result.from_json(trial.user_attrs["result"]))

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
        for trial in self._running():
            self._study.tell(trial.number, state=TrialState.FAIL)
            if "bits" in trial.user_attrs:
                bits = tuple(int(digit) for digit in trial.user_attrs["bits"])
                found.append(Candidate(bits, trial.user_attrs["method"]))
        return found

    def _running(self) -> list[Any]:
        return self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])

    def start(self, candidate: Candidate) -> Any:
        """Open a trial of a bit vector."""
        trial = self._study.ask()
        trial.set_user_attr("method", candidate.method)
        trial.set_user_attr("bits", bit_text.write(candidate.bits))
        return trial

    def complete(self, trial: Any, run_id: str, result: Result) -> None:
        """Record a finished trial. Its result goes first: from then on no kill can lose it.

        Raises:
            SearchError: A score is no number; the trial is to be failed.
        """
        for name in get_args(Objective):
            if not math.isfinite(result.score(name)[0]):
                raise SearchError(f"{name} is {result.score(name)[0]}; lower recover.learning_rate")
        trial.set_user_attr("run_id", run_id)
        trial.set_user_attr("result", result.as_json())
        self._tell(trial, result)

    def _tell(self, trial: Any, result: Result) -> None:
        self._study.tell(trial, [result.score(self.objective)[0], result.peak_memory_bytes])

    def fail(self, trial: Any, error: BaseException) -> None:
        """Record a trial that did not finish, with its cause and no score."""
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        self._study.tell(trial, state=TrialState.FAIL)


def _bits(result: Result) -> Bits:
    return tuple(int(digit) for digit in result.bits)


_held: dict[Path, TextIO] = {}  # locks of this process, which end with it


def _hold(folder: Path) -> None:
    """Make a journal's folder and take it for this process: another one would end the trials of this one.

    Raises:
        SearchError: Another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve().with_name(f".{folder.name}.lock")
    if path in _held:
        return
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SearchError(f"another process searches in {folder}; wait for it to end") from None
    _held[path] = file


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
    yield Candidate(space.allocate(space.per_byte(priors.sensitivity)), "sensitivity")
    for text in settings.seed_bits:
        yield Candidate(tuple(int(digit) for digit in text), "seed")
    for _ in range(settings.n_random):
        yield Candidate(space.draw(generator), "random")


def import_history(path: str | None, units: int, objective: str) -> list[Observation]:
    """Return an earlier search's results as observations that teach this one; none without a path.

    Raises:
        ValueError: A result is of another number of units.
    """
    results = read_history(path) if path else []
    for one in results:
        if len(one["bits"]) != units:
            raise ValueError(
                f"search.history: {path} holds bits {one['bits']!r}, which cover {len(one['bits'])} units, but this "
                f"model has {units} at this granularity; name a history of the same model and granularity, or null"
            )
    return [
        Observation(
            tuple(int(digit) for digit in one["bits"]), one[objective], one[f"{objective}_stderr"], imported=True
        )
        for one in results
    ]


def export_history(study: str, finished: Sequence[Result]) -> dict[str, Any]:
    """Return what ``reports/history.json`` holds: the study's digest and each result's bits, objectives and memory."""
    objectives = [f"{name}{ending}" for name in get_args(Objective) for ending in ("", "_stderr")]
    kept = ("bits", *objectives, "peak_memory_bytes")
    return {"study": study, "results": [{key: getattr(one, key) for key in kept} for one in finished]}


def stale(finished: Sequence[tuple[str, Result]], objective: str) -> int:
    """Return how many of the sampler's trials have passed since the front's hypervolume last grew.

    It grows with a trial if and only if no earlier one is at least as good in both objectives.

    Args:
        finished: (method, result) in the order of the trials.
        objective: Name of the quality.
    """
    count = 0
    earlier: list[tuple[float, int]] = []
    for method, result in finished:
        score, memory = result.score(objective)[0], result.peak_memory_bytes or 0
        if not any(other >= score and cost <= memory for other, cost in earlier):
            count = 0
        elif method == "sampler":
            count += 1
        earlier.append((score, memory))
    return count


def propose(
    finished: Sequence[Result],
    history: Sequence[Observation],
    objective: str,
    space: Space,
    priors: Priors,
    exclude: set[Bits],
    seed: int,
) -> Candidate | None:
    """Return the vector that should improve the front most; None if every feasible one is excluded.

    An imported result teaches until this study has tried its vector itself.
    """
    generator = random.Random(seed)
    own = [Observation(_bits(one), *one.score(objective)) for one in finished]
    tried = {one.bits for one in own}
    taught = [one for one in history if one.bits not in tried]
    bits = (
        surrogate.propose([*own, *taught], space, priors.sensitivity, exclude | tried, generator)
        if own
        else space.unseen(exclude, generator)
    )
    return None if bits is None else Candidate(bits, "sampler")


def run(
    study: Study,
    settings: Search,
    space: Space,
    priors: Priors,
    seed: int,
    attempt: Callable[[Any, Candidate, int], Result | BaseException],
    history: Sequence[Observation] = (),
) -> Ended:
    """Run trials until the study holds ``settings.n_trials`` finished ones, or the front stopped growing.

    All that decides comes from the study, so that an interrupted search goes on as if it had not been.

    Args:
        study: The study; resumed if it holds trials already.
        settings: Section ``search`` of the params.
        space: The feasible vectors.
        priors: Importance of the units.
        seed: Of random vectors and of the sampler.
        attempt: Runs one trial: (open trial, candidate, finished so far) -> its result, or the error that ended it.
        history: Results of an earlier search; they teach, and random starts among them are left out.

    Raises:
        SearchError: Three trials in a row failed.
    """
    generator = random.Random(seed)
    known = {one.bits for one in history}
    queue = study.abandoned() + [
        candidate
        for candidate in seeds(settings, space, priors, generator)
        if candidate.method != "random" or candidate.bits not in known
    ]
    failed: set[Bits] = set()
    in_a_row = 0
    while True:
        records = [(record["method"], Result.from_json(record["result"])) for record in study.finished()]
        finished = [result for _, result in records]
        if len(finished) >= settings.n_trials:
            return Ended(f"{len(finished)} trials are finished (search.n_trials)", len(failed))
        if settings.patience and stale(records, settings.objective) >= settings.patience:
            reason = f"{settings.patience} trials of the sampler in a row did not improve the front (search.patience)"
            return Ended(reason, len(failed))
        seen = {_bits(result) for result in finished} | failed
        queue = [candidate for candidate in queue if candidate.bits not in seen]
        candidate = (
            queue.pop(0)
            if queue
            else propose(finished, history, settings.objective, space, priors, seen, seed + len(finished))
        )
        if candidate is None:
            return Ended("every feasible vector was tried", len(failed))
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
