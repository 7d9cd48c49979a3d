"""Who works on a search's trials: this process, or workers that hold the same contexts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline import bits, console, device
from pipeline.device import Compute
from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.search.crew import Answers, Crew, Here, Task
from pipeline.search.study import Study
from pipeline.stages import trials
from pipeline.stages.recorder import unfinished
from pipeline.stages.trials import Contexts
from pipeline.trial import trial

if TYPE_CHECKING:
    from pipeline.trial.recover import Steps
    from pipeline.trial.result import Result


def work(params: Params, contexts: Contexts, study: str, progress: Steps, task: Task) -> Result:
    """Turn a task into its result: the same one whoever works on it.

    Args:
        params: The params.
        contexts: What trials share.
        study: The study's name.
        progress: Wraps the recovery's steps.
        task: The task.
    """
    if task.reference and task.name == "dense":
        return trials.untouched(params, contexts.any)
    vector = task.vector
    kept = unfinished(study, task.name if task.reference else bits.write_vector(vector))
    asked = trial.Work(further=True) if task.reference else None
    result, _ = trial.run(contexts.at(vector.ratio), vector.bits, asked, progress=progress, keep=kept)
    return result


def prepared(
    params: Params,
    folders: Mapping[float, tuple[Path, Path]],
    answers: Answers,
    mark: str,
    compute: str,
    threads: int | None,
) -> Callable[[Task], Result]:
    """Load what trials share in a worker; return what turns a task into its result and writes that before it returns.

    Args:
        params: The params.
        folders: Ratio -> (pruned model, its layer bank); their checksums are verified.
        answers: Where results are written.
        mark: What the search wrote there, which a worker that has the same folder sees.
        compute: What the search computes with.
        threads: Of its computations on a CPU, 0: one for each core; None: on a GPU.

    Raises:
        UserError: This machine has another folder or computes with something else, or a checkpoint was changed.
    """
    if not answers.marked(mark):
        raise UserError(
            f"{Path.cwd()} is not the folder that the search works in; every machine must have that one under the same "
            "path, such as a network file system's"
        )
    ours = str(device.choose(params.device, params.dtype))
    if ours != compute:
        raise UserError(f"it computes with {ours} and the search with {compute}: their trials do not compare")
    if threads is not None:
        torch.set_num_threads(threads or os.cpu_count() or 1)
    contexts = Contexts(params, folders)

    def answered(task: Task) -> Result:
        result = work(params, contexts, answers.study, iter, task)
        answers.write(task, result)
        return result

    return answered


@contextmanager
def crew(params: Params, contexts: Contexts, study: Study, screen: console.Search) -> Iterator[Crew]:
    """Give who works on a study's trials, as ``search.workers`` says; workers end with the block.

    Args:
        params: The params.
        contexts: What trials share.
        study: The study.
        screen: Shows progress.

    Raises:
        UserError: The workers cannot be started.
    """
    asked = params.search
    count = asked.workers if asked.workers != "auto" or asked.cluster else _here(contexts.any.compute)
    if count == 1:
        yield Crew(Here(partial(work, params, contexts, study.name, screen.steps)))
        return
    from pipeline import workers

    compute, answers = contexts.any.compute, answers_of(study)
    gpus, number = compute.device.type == "cuda", None if count == "auto" else count
    share = 0 if asked.cluster or not number else max(1, torch.get_num_threads() // number)
    threads = None if gpus else share
    prepare = partial(prepared, params, contexts.folders, answers, answers.mark(), str(compute), threads)
    with workers.started(number, prepare, asked.cluster, gpus=gpus) as pool:
        screen.workers = pool.size
        yield Crew(pool, asked.retries, answers, console.note)
    answers.clear()  # after an interruption they stay: the same command takes them up


def _here(compute: Compute) -> int:
    """Return how many workers this machine is good for: one for each GPU; on CPUs one, as several slow each other."""
    return torch.cuda.device_count() if compute.device.type == "cuda" else 1


def answers_of(study: Study) -> Answers:
    """Return where workers write their results of a study."""
    return Answers(study.path.parent.absolute(), study.name)
