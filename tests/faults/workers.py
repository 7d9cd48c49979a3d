"""Kills at random moments of a search with workers, then the same command again.

    python -m tests.faults.workers FOLDER [kills=30] [workers=2] [trials=12] [seed=0]

Study, journal, MLflow, Ray and its workers are real; trials are looked up after a second's sleep, so that a kill costs
seconds. Prints a line a try and the table: what was lost, doubled, left behind (RUNNING runs, processes, answers, a
local Ray's folder), or unclear. It resumes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil

from tests.end_to_end.project import heed_interrupts
from tests.faults.state import journal_trials, named, processes, wait_for_end
from tests.faults.tally import Tally, Try
from tests.fixtures import working

SLEEP = 1.0
_GRACE = 60.0  # seconds in which all processes have to end
_PATIENCE = 900.0
# Imports of the tests' own, before the search looks after signals: an interrupt ends them without a traceback.
_SEARCH = """
import runpy, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module("tests.faults.workers", run_name="__main__", alter_sys=True)
"""
ROOT = Path(__file__).resolve().parents[2]


def prepared(params, folders, answers, mark, compute, threads):
    """What a worker loads in place of a model."""
    assert answers.marked(mark)
    return working.sleeping(answers, SLEEP)


def search(workers: int, trials: int) -> None:
    """Hold a search with workers in this folder: its journal in ``artifacts/study``, its runs in ``mlflow.db``."""
    from pipeline import checks, console, runtime, tracking
    from pipeline.search import search
    from pipeline.search.study import Study
    from pipeline.stages import recorder, work
    from pipeline.stages.attempts import Attempts
    from tests.faults import workers as itself  # not __main__, so that workers can import it
    from tests.fixtures.searches import PROBLEM, RATIO, SPACES, STUDY, UNITS

    runtime.prepare()
    os.chdir(ROOT)
    params = checks.load()
    os.chdir(os.environ["QPRUNER_FAULTS"])
    asked = {"workers": workers, "n_trials": trials, "n_random": 2, "references": ("uniform8",), "retries": 3}
    params = params.model_copy(update={"search": params.search.model_copy(update=asked)})
    tracking.on_termination_interrupt()
    work.prepared = itself.prepared
    compute = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    context = SimpleNamespace(units=[None] * UNITS, further=None, compute=compute)
    contexts = SimpleNamespace(any=context, folders={RATIO: None})
    with tracking.stage("search", {}) as run:
        study = Study(Path("artifacts/study"), STUDY)
        own = recorder.Recorder(run, study, params, SPACES)
        own.take_up(work.answers_of(study))
        own.agree()
        screen = console.Search(trials)
        with tracking.patient(), screen, work.crew(params, contexts, study, screen) as hands:
            attempts = Attempts(own, hands, screen)
            attempts.references(context, [RATIO])
            settings = recorder.search_settings(params, UNITS)
            search.run(study, settings, PROBLEM, attempts)


# How a search dies: whom the signal reaches, and which one.


def _named(driver: psutil.Process, part: str) -> list[psutil.Process]:
    named = []
    for process in driver.children(recursive=True):
        with suppress(psutil.Error):
            if part in " ".join(process.cmdline()):
                named.append(process)
    return named


def _begun(what: str, place: Path, driver: psutil.Process) -> bool:
    journal = place / "artifacts/study/journal.log"
    if what == "the first result":
        return journal.exists() and '"result"' in journal.read_text()
    return what == "the start" or bool(_named(driver, "ray::Process"))


def _some(part: str, draw: random.Random):
    def kill(driver: psutil.Process) -> str:
        there = _named(driver, part)
        if not there:
            return "none was there yet"
        draw.choice(there).kill()
        return ""

    return kill


def _driver(number: int):
    def kill(driver: psutil.Process) -> str:
        driver.send_signal(number)
        return ""

    return kill


def _group(number: int):
    def kill(driver: psutil.Process) -> str:
        os.killpg(driver.pid, number)
        return ""

    return kill


def deaths(draw: random.Random) -> dict:
    return {
        "SIGKILL to a worker": _some("ray::Process", draw),
        "SIGKILL to the driver": _driver(signal.SIGKILL),
        "SIGKILL to the group": _group(signal.SIGKILL),
        "SIGINT to the group": _group(signal.SIGINT),
        "SIGTERM to the driver": _driver(signal.SIGTERM),
        "SIGKILL to the raylet": _some("raylet/raylet", draw),
        "SIGTERM to the group": _group(signal.SIGTERM),
        "SIGKILL to Ray's directory": _some("gcs_server", draw),
    }


def temporary(folder: Path) -> Path:
    """Where a try's Ray has its folder; paths of sockets must be short."""
    path = Path(tempfile.gettempdir()) / f"q{zlib.crc32(str(folder).encode()):x}"
    path.mkdir(exist_ok=True)
    return path


def start(folder: Path, workers: int, trials: int, output) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "QPRUNER_"))}
    environment |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "QPRUNER_FAULTS": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary(folder)),
    }
    command = [sys.executable, "-c", _SEARCH, "search", str(workers), str(trials)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def kill(folder: Path, number: int, seed: int, workers: int, trials: int) -> Try:
    """Start a search in a new folder, kill a part of it at a random moment, start it again, and count."""
    draw = random.Random(f"{seed} {number}")
    ways = deaths(draw)
    death = list(ways)[number % len(ways)]
    done = Try(death, f"{number}: {death}")
    place = folder / f"try-{number}"
    (place / "artifacts/study").mkdir(parents=True, exist_ok=True)
    (place / "died").touch()  # no worker kills itself
    after = draw.choice(["the start", "the first worker came", "the first result", "the first result"])
    moment = draw.uniform(0, 10) if after == "the start" else draw.uniform(0, trials * SLEEP / workers)
    with (place / "killed.txt").open("w") as output:
        process = start(place, workers, trials, output)
        driver = psutil.Process(process.pid)
        while process.poll() is None and not _begun(after, place, driver):
            time.sleep(0.3)
        time.sleep(moment)
        done.remark(f"{moment:.1f} s after {after}")
        if process.poll() is None:
            done.remark(ways[death](driver) or "hit")
        if death == "SIGKILL to a worker" or "none was there" in done.note:
            process.wait(timeout=_PATIENCE)
        alive = wait_for_end(place, _GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done.left += len(alive)
    if alive:
        done.remark(f"alive {_GRACE:.0f} s later: {named(alive)}")
    if death.startswith(("SIGINT", "SIGTERM")):
        done.read((place / "killed.txt").read_text())
    if (death == "SIGKILL to a worker" or "none was there" in done.note) and process.returncode:
        done.unclear += 1
        done.remark(f"the search ended with {process.returncode}")
    before = journal_trials(place)
    written = [json.loads(path.read_text())["name"] for path in place.glob("artifacts/study/answers/*/trial-*.json")]
    done.remark(f"{len(before)} trials in the journal, {len(written)} answers beside it")
    with (place / "again.txt").open("w") as output:
        status = start(place, workers, trials, output).wait(timeout=_PATIENCE)
    if status:
        done.unclear += 1
        done.remark(f"exit status {status} of the same command: {(place / 'again.txt').read_text()[-300:]}")
    wait_for_end(place, 10)
    compare(done, place, before, written, trials)
    return done


def compare(done: Try, place: Path, before: list, written: list, trials: int) -> None:
    """Count what the kill and the run after it have lost, doubled and left behind."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()], max_results=1000)
    searches = sorted((run for run in runs if run.data.tags["stage"] == "search"), key=lambda run: run.info.start_time)
    finished = [run for run in runs if run.data.tags["stage"] == "trial" and run.info.status == "FINISHED"]
    tracked = Counter((run.data.tags["study"], f"{run.data.tags['ratio']}:{run.data.tags['bits']}") for run in finished)
    kept = Counter(journal_trials(place))
    elsewhere = [run for run in finished if run.data.tags["mlflow.parentRunId"] != searches[-1].info.run_id]
    again = {run.data.tags["name"] for run in finished}
    lost = [*(set(before) - set(kept)), *(set(kept) ^ set(tracked)), *elsewhere, *(set(written) - again)]
    done.lost += len(lost) + max(0, trials - len(kept))
    done.doubled += sum(count > 1 for counts in (kept, tracked) for count in counts.values())
    left = [run.info.run_name for run in runs if run.info.status == "RUNNING"]
    left += [str(each) for each in processes(place)]
    left += [str(path) for path in (place / "artifacts").rglob("*") if path.name.startswith(".") and path.is_dir()]
    left += [str(path) for path in place.glob("artifacts/study/answers")]
    left += [str(path) for path in temporary(place).glob("qpruner-ray-*")]
    shutil.rmtree(temporary(place))
    done.left += len(left)
    for what, names in (("lost", lost), ("left", left)):
        if names:
            done.remark(f"{what}: {names}")


def main(arguments: list[str]) -> None:
    if arguments[0] == "search":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            search(*map(int, arguments[1:]))
        except KeyboardInterrupt:
            sys.exit("interrupted")
        return
    given = dict(item.split("=") for item in arguments[1:])
    folder, seed = Path(arguments[0]).absolute(), int(given.get("seed", 0))
    tally = Tally(folder / "tally.jsonl")
    for number in range(int(given.get("kills", 30))):
        if any(done.name.startswith(f"{number}: ") for done in tally.tries):
            continue
        began = time.monotonic()
        tally.add(kill(folder, number, seed, int(given.get("workers", 2)), int(given.get("trials", 12))))
        print(f"{time.monotonic() - began:.0f} s, {tally.tries[-1].name}: {tally.tries[-1].note}", flush=True)
    print(tally.table())


if __name__ == "__main__":
    main(sys.argv[1:])
