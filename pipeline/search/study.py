"""The study: finished trials, references and what is open, in a journal that this process has to itself.

The journal, ``artifacts/study/journal.log``, is the truth about finished trials: a result is in it before its MLflow
run ends, and a search that starts makes MLflow agree with it. A search killed at any moment therefore resumes with
every finished trial, each once.

A study is named by what defines its results: the settings, with the models and the data, and the code. So the journal
can hold many studies, and trials that do not compare never mix.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from pipeline import bits as bit_text
from pipeline import signals
from pipeline.bits import Vector
from pipeline.identity import Identity
from pipeline.locks import Lock
from pipeline.params import Objective
from pipeline.search import SearchError, journal
from pipeline.storage import CheckpointError, again

if TYPE_CHECKING:
    from pipeline.trial.result import Result

_REFERENCE = "reference:"  # before a reference's name in the study's attributes
RATIO = "ratio"  # the first parameter of a trial; those of the units follow
_RECORDED = {"run_id", "method", "result"}


@dataclass(frozen=True)
class Candidate:
    """A vector to try and how it was found: a method's name or ``random``, ``sampler``, ``seed``."""

    vector: Vector
    method: str


@dataclass(frozen=True)
class Record:
    """What the journal holds of a finished trial or a reference.

    Attributes:
        run_id: The MLflow run that it was first logged into.
        method: How its vector was found, or the reference's name.
        values: Its result as plain values.
        number: The trial's number; None for a reference.
    """

    run_id: str
    method: str
    values: Mapping[str, Any]
    number: int | None = None

    @property
    def name(self) -> str:
        """Return what it is called."""
        return self.method if self.number is None else trial_name(self.number)

    @cached_property
    def result(self) -> Result:
        """Return its result."""
        from pipeline.trial.result import Result

        return Result.from_json(self.values)


def trial_name(number: int) -> str:
    """Return what a trial is called everywhere: names count from 1, Optuna's numbers from 0."""
    return f"trial {number + 1}"


@dataclass(frozen=True)
class Kept:
    """A study as its journal has it, read without changing anything.

    Attributes:
        name: The study's name.
        journal: The id of its journal.
        records: Its finished trials, then its references.
    """

    name: str
    journal: str
    records: list[Record]


def read(folder: Path, name: str) -> Kept:
    """Return a study without taking or changing its journal.

    Raises:
        CheckpointError: The journal is missing or damaged, or does not hold the study.
    """
    path = folder / journal.NAME
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {again('search')}")
    if journal.damaged(path):
        raise CheckpointError(f"{path} is damaged; the search keeps what is whole of it: {again('search')}")
    stored = journal.opened(path)
    if name not in _names(stored):
        raise CheckpointError(f"{path} does not hold study {name}, which reports/search.json names; {again('search')}")
    study = optuna.load_study(study_name=name, storage=stored)
    return Kept(name, study.user_attrs.get("journal", ""), [*_finished(study), *_references(study)])


class Study:
    """A resumable multi-objective study: quality up, peak memory down.

    Args:
        folder: Where the journal is; this process has it to itself from then on.
        identity: What names the study.
        objective: The quality, as section ``search`` names it: the study's first value.
        memory: The peak that counts, ``training`` or ``inference``: its second.

    Attributes:
        name: The study's name.
        journal: The random id of the journal, which tells the runs of this search from those of another one that has
            the same name: a copy of the project on the same server, or a journal that was deleted.
        mended: What was damaged in the journal, or None.

    Raises:
        SearchError: Another process searches there.
    """

    def __init__(self, folder: Path, identity: Identity, objective: str = "gold_logprob", memory: str = "training"):
        _hold(folder)
        self.path = folder / journal.NAME
        self.mended = journal.mend(self.path)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._identity, self.name, self.objective, self.memory = identity, identity.name, objective, memory
        self._stored = journal.opened(self.path)
        if self.name in _names(self._stored):
            self._study = optuna.load_study(study_name=self.name, storage=self._stored)
        else:
            self._study = optuna.create_study(
                storage=self._stored, study_name=self.name, directions=["maximize", "minimize"]
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # a name that goes missing harms nothing
                self._study.set_metric_names([objective, f"{memory}_memory_bytes"])  # of the axes in Optuna's tools
        attributes = {"settings": identity.settings, "code": identity.code, "journal": uuid.uuid4().hex}
        for key, value in attributes.items():
            if key not in self._study.user_attrs:
                self._study.set_user_attr(key, value)
        self.journal: str = self._study.user_attrs["journal"]
        self._records: dict[int, Record] = {}
        for trial in self._running():
            if trial.user_attrs.keys() >= _RECORDED:  # a kill came between its result and its end
                self._tell(trial.number, _record(trial).result)

    def finished(self) -> list[Record]:
        """Return the finished trials in their order."""
        for record in _finished(self._study, known=self._records):
            self._records[record.number or 0] = record
        return [self._records[number] for number in sorted(self._records)]

    def references(self) -> list[Record]:
        """Return the reference rows."""
        return _references(self._study)

    def of_earlier_code(self) -> int:
        """Return how many finished trials of the same settings the journal holds that other code computed."""
        studies = (optuna.load_study(study_name=name, storage=self._stored) for name in _names(self._stored))
        return sum(
            len(_finished(study))
            for study in studies
            if study.user_attrs.get("settings") == self._identity.settings and study.study_name != self.name
        )

    def record_reference(self, name: str, run_id: str, result: Result) -> None:
        """Keep a reference row; it stands outside the trials."""
        values = {"run_id": run_id, "method": name, "result": result.as_json()}
        with signals.held():
            self._study.set_user_attr(f"{_REFERENCE}{name}", values)

    def abandoned(self) -> list[Candidate]:
        """End the trials that a killed process left running; return them to be tried again."""
        candidates = []
        for trial in self._running():
            self._study.tell(trial.number, state=TrialState.FAIL)
            if "method" in trial.user_attrs and RATIO in trial.params:
                candidates.append(Candidate(vector_of(trial.params), trial.user_attrs["method"]))
        return candidates

    def take_up(self, name: str, run_id: str, result: Result) -> bool:
        """Finish a trial that a killed process left open with what its worker had written; return whether it was open.

        A result that ``complete`` would refuse is not taken: the trial is run again.
        """
        for trial in self._running():
            same = RATIO in trial.params and vector_of(trial.params) == result.vector
            if same and trial_name(trial.number) == name:
                with suppress(SearchError):
                    self.complete(Trial(self._study, trial._trial_id), run_id, result)
                    return True
        return False

    def _running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])

    def start(self, candidate: Candidate, options: Mapping[str, Sequence[float]]) -> Trial:
        """Open a trial of a vector.

        Args:
            candidate: The vector and how it was found.
            options: Parameter -> its values in the space of the search (``options_of``); in Optuna's tools these are
                the trial's parameters.
        """
        params = params_of(candidate.vector, options)
        opened = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions={name: CategoricalDistribution(values) for name, values in options.items()},
            user_attrs={"bits": bit_text.write(candidate.vector.bits)},
        )
        with signals.held():  # one line in the journal, not one for each unit
            number = len(self._study.get_trials(deepcopy=False))
            self._study.add_trial(opened)
            trial = Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
            trial.set_user_attr("method", candidate.method)
        return trial

    def complete(self, trial: Trial, run_id: str, result: Result) -> None:
        """Record a finished trial. Its result goes first: from then on no kill can lose it.

        Raises:
            SearchError: A score is no number; the trial is to be failed.
        """
        for name in get_args(Objective):
            if not math.isfinite(result.score(name)[0]):
                raise SearchError(f"{name} is {result.score(name)[0]}; lower recover.learning_rate")
        with signals.held():  # an interrupt waits until the trial has ended
            trial.set_user_attr("run_id", run_id)
            trial.set_user_attr("result", result.as_json())
            self._tell(trial, result)

    def _tell(self, trial: Trial | int, result: Result) -> None:
        self._study.tell(trial, [result.score(self.objective)[0], float(result.peak(self.memory) or 0)])

    def fail(self, trial: Trial, error: BaseException) -> None:
        """Record a trial that did not finish, with its cause and no score."""
        with signals.held():
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            self._study.tell(trial, state=TrialState.FAIL)


def options_of(ratios: Sequence[float], units: Sequence[str], widths: Sequence[int]) -> dict[str, tuple[float, ...]]:
    """Return the parameters of a search's trials with their values: the ratio, and each unit's bits by its name."""
    return {RATIO: tuple(ratios), **{f"bits_{unit}": tuple(widths) for unit in units}}


def params_of(vector: Vector, names: Iterable[str]) -> dict[str, float]:
    """Return a vector as a trial's parameters; the reverse of ``vector_of``."""
    return dict(zip(names, (vector.ratio, *vector.bits), strict=True))


def vector_of(params: Mapping[str, float]) -> Vector:
    """Return the vector that a trial's parameters are."""
    ratio, *bits = params.values()
    return Vector(ratio, tuple(int(width) for width in bits))


def _names(stored: JournalStorage) -> list[str]:
    return [study.study_name for study in stored.get_all_studies()]


def _finished(study: optuna.Study, known: Mapping[int, Record] | None = None) -> list[Record]:
    """Return a study's finished trials but those already known; one whose result was lost with its line is left out."""
    return [
        _record(trial)
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if trial.number not in (known or {}) and trial.user_attrs.keys() >= _RECORDED
    ]


def _record(trial: FrozenTrial) -> Record:
    kept = trial.user_attrs
    return Record(kept["run_id"], kept["method"], kept["result"], trial.number)


def _references(study: optuna.Study) -> list[Record]:
    return [
        Record(value["run_id"], value["method"], value["result"])
        for key, value in study.user_attrs.items()
        if key.startswith(_REFERENCE)
    ]


_held: dict[Path, Lock] = {}  # locks of this process, which end with it


def _hold(folder: Path) -> None:
    """Make a journal's folder and take it for this process: another one would end the trials of this one.

    The lock lies beside the folder, which is an output of DVC.

    Raises:
        SearchError: Another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve().with_name(f".{folder.name}.lock")
    if path in _held:
        return
    lock = Lock(path)
    if not lock.take():
        lock.release()
        raise SearchError(f"another process searches in {folder}; wait for it to end")
    _held[path] = lock
