"""What surrounds the trials: starting, tracking, querying, suggesting, and a pipeline with nothing to do."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import harness
from benchmarks.harness import BAR, Figure, LeftOut, interleaved, less_is_better, timed
from benchmarks.setup import Setup
from pipeline import checks, params, tracking
from pipeline.bits import Vector
from pipeline.paths import REPORTS
from pipeline.search import pareto
from pipeline.stages import STAGES
from pipeline.stages.recorder import Recorder, log_result
from pipeline.trial.result import Result

STARTUP, NOOP, QUERY, SHARE = 5.0, 3.0, 1.0, 0.02  # bars: seconds, and a share
LOSSES = 16


def startup(setup: Setup) -> dict[str, Figure]:
    """Measure the seconds from a process's start to a stage's first line of work, caches warm, against a bar of 5 s.

    ``startup_check`` is the whole of ``python -m pipeline check``; the others start Python, import what the stage
    imports and end.
    """
    commands = {"check": ["-m", "pipeline", "check"]}
    for name in STAGES:
        commands[name] = ["-c", f"import pipeline.stages.{name}"]
    found = {}
    for name, command in commands.items():
        subprocess.run([sys.executable, *command], check=True, capture_output=True)  # warms the caches
        (seconds,) = interleaved(partial(process, command), repeats=setup.options.repeats)
        found[f"startup_{name}"] = less_is_better(seconds, STARTUP, "s", setup.options.repeats, BAR)
    return found


def process(command: list[str]) -> float:
    """Return the seconds that a Python process takes."""
    return timed(lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True))


def repro_noop(setup: Setup) -> dict[str, Figure]:
    """Measure the seconds of ``dvc repro`` with nothing to do, against a bar of 3 s.

    Raises:
        LeftOut: Something is out of date, and ``dvc repro`` would run it.
    """
    status = subprocess.run([sys.executable, "-m", "dvc", "status", "-q"], capture_output=True, check=False)
    if not Path("dvc.lock").exists() or status.returncode:
        raise LeftOut("dvc.lock is not in step with the working tree; run: dvc repro")
    (seconds,) = interleaved(lambda: process(["-m", "dvc", "repro", "-q"]), repeats=setup.options.repeats)
    return {"repro_noop": less_is_better(seconds, NOOP, "s", setup.options.repeats, BAR)}


@contextmanager
def scratch_store() -> Iterator[None]:
    """Use an empty MLflow store in a temporary folder."""
    before = {key: os.environ.get(key) for key in ("MLFLOW_TRACKING_URI", tracking.PARENT)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.pop(tracking.PARENT, None)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value


def outcome(generator: random.Random, units: int = 30) -> Result:
    """Return a drawn result with as many figures as a trial's, to log; it stands for no trial."""
    values: dict[str, Any] = {
        "ratio": 0.2,
        "bits": "".join(generator.choice("48") for _ in range(units)),
        "accuracy": generator.random(),
        "accuracy_stderr": 0.03,
        "tasks": {name: (generator.random(), 0.1) for name in params.TASKS},
        "other": {},
        "gold_logprob": -generator.random(),
        "gold_logprob_stderr": 0.03,
        "validation_loss": generator.random(),
        "validation_loss_stderr": 0.03,
        "peak_memory_bytes": generator.randrange(2**30),
        "inference_memory_bytes": 2**28,
        "memory_source": "predicted",
        "seconds": {"assemble": 1.0, "recover": 1.0, "evaluate": 1.0},
        "items": 168,
        "losses": [generator.random() for _ in range(LOSSES)],
        "by_item": {name: [(float(generator.random() < 0.5), -generator.random())] * 24 for name in params.TASKS},
        "validation_losses": [],
        "trained_tokens": 0,
        "by_row": [(generator.random() * 100, 100)] * 16,
    }
    return Result.from_json(values)


def recorder(study: str) -> Any:
    """Return a search's recorder with its own run in the store."""
    run = tracking.create("search", None, {"stage": "search"})
    named: Any = SimpleNamespace(name=study, journal="journal")
    return Recorder(run, named, checks.load())


def record(to: Any, number: int, result: Result) -> None:
    """Track one trial as the search does: open its run, log its figures, end it; a step in the search's own run."""
    own = to.open(f"trial {number}", "random", result.vector, reference=False)
    own.tags({"trial": str(number)})
    log_result(own, f"trial {number}", result)
    own.finish()
    to.run.series("hypervolume", [(number, result.accuracy)])


def record_one_by_one(parent: tracking.Run, number: int, result: Result) -> None:
    """Track the same trial with a call for each value."""
    client = tracking.client()
    tags = {"mlflow.parentRunId": parent.run_id, "stage": "trial", "study": "s", "method": "random"}
    run_id = client.create_run(parent.experiment_id, tags=tags, run_name=f"trial {number}").info.run_id
    for key, value in {"bits": result.bits, "method": "random", "granularity": "block"}.items():
        client.log_param(run_id, key, value)
    for key, figure in result.metrics().items():
        client.log_metric(run_id, key, figure)
    for step, loss in enumerate(result.losses):
        client.log_metric(run_id, "loss", loss, step=step)
    for key, value in {"trial": str(number), "memory_source": "predicted", "mlflow.runName": "trial"}.items():
        client.set_tag(run_id, key, value)
    client.set_terminated(run_id)
    client.log_metric(parent.run_id, "hypervolume", result.accuracy, step=number)


def tracking_share(setup: Setup) -> dict[str, Figure]:
    """Compare what tracking one trial takes with logging its values one call each: seconds.

    A trial's run with its params, its metrics, 16 losses and its end, in a fresh sqlite store. ``tracking_share`` is
    that time's share of a whole trial as ``trial`` measured it, now or in the run that left ``reports/bench.json``,
    against a bar of 2 %.
    """
    from benchmarks import costs

    if ("ours", "trial") not in setup.seconds:
        if kept := harness.read(REPORTS / "bench.json").get("trial"):
            setup.seconds["ours", "trial"] = kept.ours
        else:
            costs.trial(setup)
    generator, repeats = random.Random(0), 5 * setup.options.repeats
    with scratch_store():
        to, numbers = recorder("s"), iter(range(10**6))
        sides = (
            lambda: timed(lambda: record(to, next(numbers), outcome(generator))),
            lambda: timed(lambda: record_one_by_one(to.run, next(numbers), outcome(generator))),
        )
        interleaved(*sides, repeats=1)
        ours, theirs = interleaved(*sides, repeats=repeats)
    share = ours / setup.seconds["ours", "trial"]
    return {
        "tracking": less_is_better(ours, theirs, "s a trial", repeats),
        "tracking_share": less_is_better(share, SHARE, "share of a trial", repeats, BAR),
    }


def query(setup: Setup, sizes: tuple[int, ...] = (1000, 2000)) -> dict[str, Figure]:
    """Measure the seconds from a store of many trials to their Pareto front, against a bar of 1 s.

    ``tracking.trials``, ``pareto.points`` and ``pareto.front`` on a fresh sqlite store of 1,000 and 2,000 runs.
    """
    found = {}
    for size, seconds in query_seconds(sizes, setup.options.repeats).items():
        found[f"query_{size}"] = less_is_better(seconds[1], QUERY, "s", setup.options.repeats, BAR)
    return found


def query_seconds(sizes: tuple[int, ...], repeats: int) -> dict[int, tuple[float, float]]:
    """Return for each number of trials: seconds to store the last of them, and to get the front of all."""
    generator, found, stored = random.Random(0), {}, 0

    def front() -> None:
        every = pareto.points(tracking.trials("s"), "accuracy")
        assert len(every) == stored and pareto.front(every)

    with scratch_store():
        to = recorder("s")
        for size in sorted(sizes):
            start, before = time.perf_counter(), stored
            while stored < size:
                record(to, stored, outcome(generator))
                stored += 1
            each = (time.perf_counter() - start) / (size - before)
            (seconds,) = interleaved(lambda: timed(front), repeats=repeats)
            found[size] = (each, seconds)
    return found


def suggestion(setup: Setup) -> dict[str, Figure]:
    """Compare ``acquire.propose`` with optuna's GPSampler: seconds a suggestion.

    After 10, 50 and 100 trials of 30, 40 and 120 units at one pruning ratio, a quarter of them at 8 bits at most, and
    of 120 units at four ratios, all of which may have 8 bits; made-up scores.
    """
    figures, repeats = {}, setup.options.repeats
    for units, ratios in ((30, 1), (40, 1), (120, 1), (120, 4)):
        for done in (10, 50, 100):
            ours, theirs = suggesters(done, units, ratios)
            fast, slow = interleaved(partial(timed, ours), partial(timed, theirs), repeats=repeats)
            name = f"suggestion_{done}_trials_{units}_units" + (f"_{ratios}_ratios" if ratios > 1 else "")
            figures[name] = less_is_better(fast, slow, "s", repeats)
    return figures


def suggesters(done: int, units: int, ratios: int = 1) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return (our proposal, GPSampler's) as functions, both after the same made-up trials.

    Args:
        done: Trials that are known.
        units: Of the model.
        ratios: How many pruning ratios there are; with several, any number of units may be raised.
    """
    from benchmarks import contenders
    from pipeline.compress.priors import Priors
    from pipeline.search.allocate import Space, Spaces
    from pipeline.search.surrogate import Observation

    generator = random.Random(units)
    gains = tuple(generator.random() for _ in range(units))
    costs = tuple(generator.randrange(2**20, 2**21) for _ in range(units))
    most = units // 4 if ratios == 1 else units
    shares = [index / 10 for index in range(ratios)]
    spaces = Spaces({share: Space(int(2**29 * (1 - share)), (costs,), most, None) for share in shares}, {})
    names = tuple(map(str, range(units)))
    priors = {share: Priors(names, (0.0,) * units, gains, gains, 0.0, share, 1) for share in shares}
    tried: list[Vector] = []
    while len(tried) < done:
        if (vector := spaces.draw(generator)) not in tried:
            tried.append(vector)
    observations = [
        Observation(
            vector,
            sum(gain for gain, width in zip(gains, vector.bits, strict=True) if width == 8) / units
            - vector.ratio
            + generator.gauss(0, 0.02),
            0.02,
        )
        for vector in tried
    ]
    contenders.quiet()
    ours, theirs = (make(spaces, priors, 0) for make in (contenders.ours, contenders.gp))
    return partial(ours, observations), partial(theirs, observations)
