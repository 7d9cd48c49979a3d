"""What stands in a project's folder: finished results, and what a dead process left behind."""

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import optuna
import psutil
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.end_to_end.project import runs
from tests.faults.tally import Try


def journal_trials(project: Path) -> list[tuple[str, str]]:
    """(study, vector) of each finished trial in the journals of the search and of the tables."""
    trials = []
    for path in (project / "artifacts").glob("**/journal.log"):
        storage = JournalStorage(JournalFileBackend(str(path)))
        for summary in optuna.get_all_study_summaries(storage):
            study = optuna.load_study(study_name=summary.study_name, storage=storage)
            finished = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
            results = [trial.user_attrs["result"] for trial in finished]
            trials += [(summary.study_name, f"{result['ratio']:g}:{result['bits']}") for result in results]
    return trials


def cells(project: Path) -> list[str]:
    """The runs of the finished cells of ``table`` and ``ablation``."""
    files = (project / "artifacts/table/cells").glob("*.json")
    return [json.loads(path.read_text())["run_id"] for path in files]


def finished_runs(project: Path, stage: str) -> list:
    if not (project / "mlflow.db").exists():
        return []
    return [run for run in runs(project) if run.data.tags.get("stage") == stage and run.info.status == "FINISHED"]


def identified(run) -> tuple[str, str]:
    """(study, vector) of a trial's run."""
    return run.data.tags["study"], f"{run.data.tags['ratio']}:{run.data.tags['bits']}"


def processes(project: Path) -> list[psutil.Process]:
    """Living processes that work in the project's folder."""
    there = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(project) and process.status() != psutil.STATUS_ZOMBIE:
                there.append(process)
        except (psutil.Error, OSError):
            continue
    return there


def wait_for_end(project: Path, seconds: float) -> list[psutil.Process]:
    """Wait until no process works in the folder; return those that still do."""
    limit = time.monotonic() + seconds
    while (alive := processes(project)) and time.monotonic() < limit:
        time.sleep(0.2)
    return alive


def named(alive: list[psutil.Process]) -> list[str]:
    """Their command lines, for a message."""
    lines = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    return lines


def litter(project: Path) -> list[str]:
    """Temporary files and folders, and locks that are links to nothing. A file that is only locked may stay."""
    names = []
    for folder in ("artifacts", "reports", "data"):
        for path in (project / folder).rglob("*"):
            dangling = path.is_symlink() and not path.exists()
            temporary = path.name.startswith(".") and path.name != ".gitignore" and path.suffix != ".lock"
            if dangling or temporary:
                names.append(str(path.relative_to(project)))
    return names


def compare(done: Try, project: Path, trials_before: list, cells_before: list) -> None:
    """Count what a fault and the run after it have lost, doubled and left behind."""
    trials, logged = Counter(journal_trials(project)), finished_runs(project, "trial")
    tracked = Counter(map(identified, logged))
    lost = set(trials_before) - set(trials) | set(trials) - set(tracked)
    doubled = [key for counts in (trials, tracked) for key, count in counts.items() if count > 1]
    lost_cells = set(cells_before) - {run.info.run_id for run in finished_runs(project, "cell")}
    running = [run.info.run_name for run in runs(project) if run.info.status == "RUNNING"]
    left = [*running, *map(str, processes(project)), *litter(project)]
    done.lost += len(lost) + len(lost_cells)
    done.doubled += len(doubled)
    done.left += len(left)
    for what, names in (("lost", [*lost, *lost_cells]), ("doubled", doubled), ("left", left)):
        if names:
            done.remark(f"{what}: {names}")
