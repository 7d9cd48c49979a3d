"""The trials and references of a search: handed to a crew, tracked, and recorded as they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline import bits, console
from pipeline.bits import Vector
from pipeline.results import labels
from pipeline.search.crew import Crew, Task
from pipeline.search.history import paper_ratio
from pipeline.search.study import Candidate, trial_name
from pipeline.stages.recorder import Recorder, finish, told
from pipeline.tracking import Run

if TYPE_CHECKING:
    from pipeline.search.study import Trial
    from pipeline.trial.context import Context
    from pipeline.trial.result import Result


@dataclass(frozen=True)
class _Open:
    """What is being worked on: its run, what it is called, and its trial in the study; None: it is a reference."""

    run: Run
    label: str
    trial: Trial | None


class Attempts:
    """Runs trials for ``search.run``, and the references beside them.

    The search's own run gets the hypervolume of the front after each trial, those of earlier processes first.

    Args:
        recorder: Keeps MLflow in step with the study.
        crew: Turns vectors into results.
        screen: Shows what is at work.
    """

    def __init__(self, recorder: Recorder, crew: Crew, screen: console.Search):
        self._recorder, self._crew, self._screen = recorder, crew, screen
        self._study = recorder.study
        self._open: dict[str, _Open] = {}
        self._waiting: deque[tuple[str, Vector]] = deque()  # references
        recorder.follow()
        screen.finished = [self._finished(record.name, record.result) for record in self._study.finished()]

    @property
    def free(self) -> int:
        """Return how many more trials would be worked on now."""
        return self._crew.free

    @property
    def busy(self) -> bool:
        """Return whether anything is worked on."""
        return self._crew.busy

    def references(self, context: Context, ratios: Sequence[float]) -> None:
        """Work on the reference rows that the study lacks, or of which it lacks further tasks, before any trial.

        Args:
            context: What trials share.
            ratios: The ratios that are searched.
        """
        further = context.further
        for name in self._recorder.missing(lambda result: not further or further.measured(result.scores.other)):
            width = 8 if name == "uniform8" else bits.DENSE
            ratio = 0.0 if name == "dense" else paper_ratio(ratios)
            self._waiting.append((name, Vector(ratio, (width,) * len(context.units))))
        self._next_references()

    def _next_references(self) -> None:
        while self._waiting and self._crew.free > 0:
            name, vector = self._waiting.popleft()
            run = self._recorder.open(name, name, vector, reference=True)
            self._hand_out(Task(name, vector, run.run_id, reference=True), run, f"reference {labels.method(name)}")

    def begin(self, trial: Trial, candidate: Candidate) -> None:
        """Hand out an open trial."""
        name = trial_name(trial.number)
        run = self._recorder.open(name, candidate.method, candidate.vector, reference=False)
        label = f"{name} ({labels.method(candidate.method)})"
        self._hand_out(Task(name, candidate.vector, run.run_id), run, label, trial)

    def _hand_out(self, task: Task, run: Run, label: str, trial: Trial | None = None) -> None:
        self._open[task.name] = _Open(run, label, trial)
        self._screen.begin(label)
        self._crew.submit(task)

    def end(self) -> tuple[Vector, Exception | None] | None:
        """Wait until a trial or a reference ends, and record it: in the journal first.

        Returns:
            A trial's vector with the error that ended it; None for a reference.
        """
        task, answer = self._crew.wait()
        ended = self._open.pop(task.name)
        self._screen.end(ended.label)
        outcome = self._recorded(task, ended, answer.outcome)
        self._crew.settle(task)
        if answer.worker:
            ended.run.tags({"worker": answer.worker, "worker_host": answer.host})
        error = outcome if isinstance(outcome, Exception) else None
        if isinstance(outcome, Exception):
            ended.run.finish("FAILED", outcome)
            what = outcome if task.reference else f"{type(outcome).__name__}: {outcome}"
            console.note(f"{ended.label} failed: {what}")
            outcome.__traceback__ = None  # its frames hold the model
        else:
            finish(ended.run, task.name, outcome)
            if not task.reference:
                self._recorder.follow()
                self._screen.finish(self._finished(task.name, outcome), told(ended.label, outcome))
        self._next_references()
        return None if task.reference else (task.vector, error)

    def _recorded(self, task: Task, ended: _Open, outcome: Result | Exception) -> Result | Exception:
        """Put what came of a task into the journal; return it, or why it cannot stand there."""
        if not isinstance(outcome, Exception):
            try:
                if ended.trial is None:
                    self._study.record_reference(task.name, ended.run.run_id, outcome)
                else:
                    self._study.complete(ended.trial, ended.run.run_id, outcome)
                return outcome
            except Exception as error:
                outcome = error
        if ended.trial is not None:
            self._study.fail(ended.trial, outcome)
        return outcome

    def _finished(self, name: str, result: Result) -> console.Finished:
        return console.Finished(name, result.score(self._study.objective)[0], sum(result.seconds.values()))
