"""What several workers gain: a tiny search whose trials sleep besides, with 1, 2 and 4 workers on this machine.

    python -m benchmarks.workers FOLDER [workers=1,2,4] [trials=40] [sleep=8]

A trial of a 7B model takes a GPU minutes in which the search's own process does nothing. Here the trials of a tiny
model compute a second and sleep as long as ``sleep`` says, so that two cores can show what a GPU each would. ``FOLDER``
gets a clone with the tiny model (``tests/end_to_end/project.py``); each number of workers gets a journal and an MLflow
store of its own. Prints a Markdown table: seconds of the trials (from the begin of the first to the end of the last)
and of the whole stage (imports, starting Ray and the workers), and what journal and store hold.

    python -m benchmarks.workers . ask [pending=0,3,7,63] [tried=50]
    python -m benchmarks.workers . driver [trials=300]

``ask``: seconds that a proposal takes with so many trials at work, after ``tried`` finished ones, on the landscape of
four ratios and 120 units. ``driver``: milliseconds of the driver a trial, all but proposing and computing it: journal,
MLflow (sqlite), screen.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import markdown, timed

BAR = 3.5  # times faster with 4 workers
_ONE = "one"  # a search in this process, in the folder of a project
_SLEEP = "QPRUNER_BENCHMARK_SLEEP"


def slowed(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return work that sleeps after it."""

    def sleeping(*arguments: Any) -> Any:
        result = work(*arguments)
        time.sleep(float(os.environ[_SLEEP]))
        return result

    return sleeping


def prepared(*arguments: Any) -> Callable[..., Any]:
    """Do in a worker's process what ``work.prepared`` does, with slow trials."""
    from pipeline.stages import work

    work.work = slowed(work.work)
    return work.prepared(*arguments)


def search_slowly() -> None:
    """Run stage ``search`` of the project in this folder, with slow trials in this process and in workers."""
    from benchmarks import workers  # not __main__, so that workers can import it
    from pipeline import checks, runtime, tracking
    from pipeline.stages import shell, work

    runtime.prepare()
    tracking.on_termination_interrupt()
    work.work, work.prepared = slowed(work.work), workers.prepared  # type: ignore[assignment]
    shell.start("search", checks.load())


def measured(project: Path, count: int, trials: int, sleep: float) -> dict[str, float]:
    """Hold a search with a number of workers in a project; return its figures."""
    from mlflow.tracking import MlflowClient

    store = project.parent / f"store-{count}.db"
    store.unlink(missing_ok=True)
    shutil.rmtree(project / "artifacts/study", ignore_errors=True)
    changed = {"search.workers": count, "search.n_trials": trials, "search.n_random": 4}
    more = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "QPRUNER_OVERRIDES": json.dumps(changed), _SLEEP: str(sleep)}
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.workers", _ONE]
    done = subprocess.run(command, cwd=project, env=os.environ | more, capture_output=True, text=True, check=False)
    whole = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    client = MlflowClient(f"sqlite:///{store}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()], max_results=1000)
    of_trials = [run for run in runs if run.data.tags["stage"] == "trial"]
    (search,) = [run for run in runs if run.data.tags["stage"] == "search"]
    vectors = {(run.data.tags["ratio"], run.data.tags["bits"]) for run in of_trials if run.info.status == "FINISHED"}
    begins = min(run.info.start_time for run in of_trials)
    return {
        "workers": count,
        "trials' seconds": (max(run.info.end_time for run in of_trials) - begins) / 1000,
        "stage's seconds": whole,
        "finished runs": sum(run.info.status == "FINISHED" for run in of_trials),
        "different vectors": len(vectors),
        "in the journal": json.loads((project / "reports/search.json").read_text())["finished"],
        "below the search's run": sum(
            run.data.tags["mlflow.parentRunId"] == search.info.run_id for run in runs if run is not search
        ),
        "hypervolume": round(search.data.metrics["hypervolume"], 5),
    }


def speedup(folder: Path, counts: Sequence[int], trials: int, sleep: float) -> str:
    """Return a table of searches with several numbers of workers."""
    from tests.end_to_end.project import command, edit, tiny_project

    project = folder / "project"
    if not (project / "reports/importance.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tiny_project(folder)
        edit(project, "search", granularity="group", max_8bit_fraction=1.0, references=[])
        built = command(project, "dvc", "repro", "importance", "quantize", timeout=3600)
        if built.returncode:
            raise RuntimeError(built.stderr[-3000:])
    rows = []
    for count in counts:
        rows.append(measured(project, count, trials, sleep))
        print(rows[-1], flush=True)
    first = rows[0]
    for row in rows:
        for name in ("trials' seconds", "stage's seconds"):
            row[f"times faster ({name})"] = round(first[name] / row[name], 2)
    return markdown(list(rows[0]), [[f"{value:g}" for value in row.values()] for row in rows])


def ask(pending: Sequence[int], tried: int) -> str:
    """Return a table of the seconds that a proposal takes with some trials at work."""
    from benchmarks import landscapes
    from pipeline.search import acquire
    from pipeline.search.search import beliefs
    from pipeline.search.surrogate import Observation

    landscape, generator = landscapes.joint(0.01, units=120), random.Random(0)
    spaces, known = landscape.spaces, beliefs(landscape.priors, (4, 8))
    drawn = [spaces.draw(generator) for _ in range(tried + max(pending))]
    past = [Observation(vector, landscape.quality_of(vector), 0.01) for vector in drawn[:tried]]
    rows = []
    for count in pending:
        now = drawn[tried : tried + count]
        before = time.process_time()
        seconds = timed(partial(acquire.propose, past, spaces, known, set(drawn), random.Random(0), now))
        rows.append([str(count), f"{seconds:.2f}", f"{time.process_time() - before:.2f}"])
    return markdown(["at work", "seconds of a proposal", "of these processor time"], rows)


def driver(trials: int) -> str:
    """Return the milliseconds that the driver takes a trial: its journal, MLflow and screen; nothing is computed."""
    import tempfile

    from benchmarks import landscapes
    from benchmarks.services import outcome, scratch_store
    from pipeline import bits, checks, console, tracking
    from pipeline.identity import Identity
    from pipeline.search import search
    from pipeline.search.crew import Crew, Here
    from pipeline.search.study import Study
    from pipeline.stages.attempts import Attempts
    from pipeline.stages.recorder import Recorder
    from pipeline.trial.result import Result

    landscape, generator = landscapes.joint(0.01), random.Random(0)
    drawn = outcome(generator).as_json()

    def work(task: Any) -> Result:
        vector = {"ratio": task.vector.ratio, "bits": bits.write(task.vector.bits)}
        return Result.from_json(drawn | vector)

    settings = search.Settings(trials, 2 * trials, 0, "response_logprob", 0)
    problem = search.Problem(landscape.spaces, landscape.priors)
    with scratch_store(), tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder), Identity("study", "code"))
        recorder = Recorder(tracking.create("search", None, {"stage": "search"}), study, checks.load())
        screen = console.Search(trials)
        attempts = Attempts(recorder, Crew(Here(work)), screen)
        before = time.process_time()
        seconds = timed(lambda: search.run(study, settings, problem, attempts))
        computed = time.process_time() - before
        again = timed(lambda: Study(Path(folder), Identity("study", "code")).finished())
        size = study.path.stat().st_size
    return markdown(
        ["trials", "driver, ms a trial", "of these processor time", "journal, KB a trial", "s to read the journal"],
        [[str(trials), *(f"{1000 * value / trials:.1f}" for value in (seconds, computed, size / 1e6)), f"{again:.2f}"]],
    )


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    given: Mapping[str, str] = dict(item.split("=") for item in arguments if "=" in item)
    place, what, *_ = [*(item for item in arguments if "=" not in item), "speedup"]
    if place == _ONE:
        search_slowly()
    elif what == "ask":
        print(ask([int(count) for count in given.get("pending", "0,3,7,63").split(",")], int(given.get("tried", 50))))
    elif what == "driver":
        print(driver(int(given.get("trials", 300))))
    else:
        counts = [int(count) for count in given.get("workers", "1,2,4").split(",")]
        print(speedup(Path(place).absolute(), counts, int(given.get("trials", 40)), float(given.get("sleep", 8))))


if __name__ == "__main__":
    main(sys.argv[1:])
