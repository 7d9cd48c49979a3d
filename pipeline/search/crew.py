"""Who turns vectors into results: this process, or several workers. Each task is answered once, whatever workers do.

A worker may die, answer late or answer twice. Tasks have names, so a second answer is known as one; a task whose worker
died goes to another one, and the vector and all random draws with it, so that the result is the same.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline import storage
from pipeline.bits import Vector

if TYPE_CHECKING:
    from pipeline.trial.result import Result

ANSWERS = "answers"  # folder beside a study's journal
_MARK = "search"  # file in it while a search has workers


@dataclass(frozen=True)
class Task:
    """A vector to turn into a result.

    Attributes:
        name: What it is called in its study, such as ``trial 5`` or ``dense``; no two tasks share one.
        vector: Ratio and bits.
        run_id: The MLflow run that its result goes into.
        reference: Whether it is a reference and no trial.
    """

    name: str
    vector: Vector
    run_id: str
    reference: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of a task.

    Attributes:
        name: The task's.
        outcome: Its result, or what went wrong.
        worker: Who gave it; empty: this process.
        host: The worker's machine.
    """

    name: str
    outcome: Result | Exception
    worker: str = ""
    host: str = ""


class Died(Exception):
    """A worker ended before it answered: why."""


class Pool(Protocol):
    """Workers that take tasks; they may answer in any order, late, or twice.

    Attributes:
        size: How many tasks it works on at once.
    """

    size: int

    def submit(self, task: Task) -> None:
        """Take a task; it waits until a worker is free."""

    def wait(self) -> Answer:
        """Return the next answer; ``Died`` in it if its worker ended, whose place another one takes."""


class Here:
    """A pool of one: this process works on a task while it waits for it.

    Args:
        work: Turns a task into its result.
    """

    size = 1

    def __init__(self, work: Callable[[Task], Result]):
        self._work = work
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Take a task."""
        self._tasks.append(task)

    def wait(self) -> Answer:
        """Work on the oldest task."""
        task = self._tasks.popleft()
        try:
            return Answer(task.name, self._work(task))
        except Exception as error:
            return Answer(task.name, error)


@dataclass(frozen=True)
class Answers:
    """Results that workers wrote into the study's folder before they announced them; the journal takes them from there.

    A driver that dies therefore loses no result that was finished. All processes see the same folder.

    Attributes:
        folder: The study's folder, absolute where workers have another working directory.
        study: The study's name.
    """

    folder: Path
    study: str

    @property
    def _place(self) -> Path:
        return self.folder / ANSWERS / self.study

    def write(self, task: Task, result: Result) -> None:
        """Write a task's result, whole or not at all; when this returns, it is on the disk.

        Raises:
            DiskError: It cannot be written.
        """
        content = {"name": task.name, "run_id": task.run_id, "result": result.as_json()}
        storage.write_text(self._file(task.name), json.dumps(content))

    def read(self) -> dict[str, tuple[str, Result]]:
        """Return the results that no journal took yet: name of the task -> (id of its run, result).

        A file that is damaged is left out: its trial is run again.
        """
        from pipeline.trial.result import Result

        kept = {}
        for path in sorted(self._place.glob("*.json")):
            with suppress(ValueError, KeyError, TypeError, OSError):
                content = json.loads(path.read_text(encoding="utf-8"))
                kept[content["name"]] = (content["run_id"], Result.from_json(content["result"]))
        return kept

    def drop(self, name: str) -> None:
        """Remove what was written of a task: its study has it, or does not want it."""
        self._file(name).unlink(missing_ok=True)

    def mark(self) -> str:
        """Write a random text by which another process knows that it sees this folder, and return it."""
        text = uuid.uuid4().hex
        storage.write_text(self._place / _MARK, text)
        return text

    def marked(self, text: str) -> bool:
        """Return whether this is the folder that was marked so."""
        with suppress(OSError):
            return (self._place / _MARK).read_text(encoding="utf-8") == text
        return False

    def clear(self) -> None:
        """Remove all that is left of this study, and the folders if nothing else is in them."""
        shutil.rmtree(self._place, ignore_errors=True)
        with suppress(OSError):
            (self.folder / ANSWERS).rmdir()

    def _file(self, name: str) -> Path:
        return self._place / f"{name.replace(' ', '-')}.json"


class Crew:
    """Hands tasks to a pool, and takes one answer for each.

    Args:
        pool: Who works.
        retries: How many further workers get the task of one that died.
        answers: What workers of this study wrote before they announced it.
        told: Hears of each worker that died.
    """

    def __init__(
        self,
        pool: Pool,
        retries: int = 0,
        answers: Answers | None = None,
        told: Callable[[str], object] = lambda _: None,
    ):
        self._pool, self._retries, self._answers, self._told = pool, retries, answers, told
        self._open: dict[str, Task] = {}
        self._deaths: Counter[str] = Counter()

    @property
    def free(self) -> int:
        """Return how many more tasks would be worked on now; negative if some wait."""
        return self._pool.size - len(self._open)

    @property
    def busy(self) -> bool:
        """Return whether a task is open."""
        return bool(self._open)

    def submit(self, task: Task) -> None:
        """Hand out a task."""
        assert task.name not in self._open
        self._open[task.name] = task
        self._pool.submit(task)

    def wait(self) -> tuple[Task, Answer]:
        """Return the next task that ended, with its result or what went wrong."""
        while True:
            answer = self._pool.wait()
            task = self._open.get(answer.name)
            if task is None:
                continue  # it was answered before
            if isinstance(answer.outcome, Died) and (kept := self._kept(task)) is not None:
                answer = replace(answer, outcome=kept)  # it had answered, and its death was told in place of that
            if isinstance(answer.outcome, Died):
                self._deaths[task.name] += 1
                deaths = self._deaths[task.name]
                cause = f"{task.name} ended with its worker: {answer.outcome}"
                if deaths <= self._retries:
                    self._told(f"{cause}; another worker takes it up")
                    self._pool.submit(task)
                    continue
                workers = "worker" if deaths == 1 else f"{deaths} workers in turn"
                answer = replace(answer, outcome=Died(f"{workers} died at it, the last: {answer.outcome}"))
            del self._open[task.name]
            return task, answer

    def settle(self, task: Task) -> None:
        """Forget what a worker wrote of a task: the study has what came of it."""
        if self._answers is not None:
            self._answers.drop(task.name)

    def _kept(self, task: Task) -> Result | None:
        return None if self._answers is None else self._answers.read().get(task.name, (None, None))[1]
