"""A fresh clone with a tiny model, and the real commands in it: what the end-to-end tests and the campaign share."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import yaml
from mlflow.tracking import MlflowClient

from tests.fixtures import models
from tests.fixtures.models import PLAIN_PRUNING, ROOT

BIN = Path(sys.executable).parent
TASKS = ["piqa", "arc_easy"]
SEARCH = ("mlflow", "run", ".", "-e", "search", "--env-manager=local", "--experiment-name", "qpruner")


def clone(target: Path) -> Path:
    """A clone of the last commit, with the working tree's own changes on top."""
    git = ["git", "-C", str(ROOT)]
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    listed = subprocess.run([*git, "ls-files", "-mo", "--exclude-standard"], capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def tiny_params(model: Path) -> dict:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["device"] = "cpu"
    raw["model"] = {"source": f"path:{model}", "sha256": ""}
    raw["data"]["validation_rows"] = 4
    raw["prune"] |= PLAIN_PRUNING | {"samples": 4, "max_length": 256, "ratios": [0, 0.2]}
    raw["importance"] |= {"samples": 4, "max_length": 256, "clusters": 4, "outcomes": 4}
    raw["recover"] |= {"steps": 1, "batch_size": 2, "micro_batch_size": 2, "max_length": 256}
    raw["evaluate"] |= {"tasks": TASKS, "limit": 4, "final_limit": 4}
    raw["search"] |= {"granularity": "block", "n_trials": 4, "n_random": 1, "max_8bit_fraction": 0.5}  # 11 feasible
    raw["build"] |= {"steps": 1}
    raw["export"] |= {"rounds": 1, "tolerance": 0.5}  # a random model's answers are near to even: 4 bits move them more
    raw["table"] |= {"ratios": [0.3], "steps": 1, "limit": 6, "n_trials": 4}
    raw["ablation"] |= {"ratio": 0.3}
    return raw


def environment() -> dict:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "QPRUNER_", "DVC_"))}
    return kept | {"PATH": f"{BIN}:{kept['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def command(project: Path, *arguments: str, more: dict | None = None, **options) -> subprocess.CompletedProcess:
    """Run a command in the project to its end; ``more`` adds to the environment."""
    options = {"timeout": 500} | options
    return subprocess.run(
        arguments, cwd=project, env=environment() | (more or {}), capture_output=True, text=True, check=False, **options
    )


def start(project: Path, *arguments: str, more: dict | None = None, output=subprocess.DEVNULL) -> subprocess.Popen:
    """Start a command in the project, in a process group of its own."""
    return subprocess.Popen(
        arguments,
        cwd=project,
        env=environment() | (more or {}),
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def end_group(process: subprocess.Popen) -> None:
    """Kill what ``start`` started and all in its group; return once the process is gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def heed_interrupts() -> None:
    """Let SIGINT end a process again, which a shell's background jobs ignore, and all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def runs(project: Path) -> list:
    """All MLflow runs of the project's store, oldest first."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return sorted(client.search_runs(experiments, max_results=1000), key=lambda run: run.info.start_time)


def by_stage(project: Path, stage: str, status: str = "FINISHED") -> list:
    return [run for run in runs(project) if run.data.tags.get("stage") == stage and run.info.status == status]


def edit(project: Path, section: str, **values) -> None:
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw[section] |= values
    (project / "params.yaml").write_text(yaml.safe_dump(raw))


def wait_for_trials(project: Path, count: int) -> None:
    """Wait until so many trials have finished and one more is running."""
    limit = time.time() + 300
    while len(by_stage(project, "trial")) < count or not by_stage(project, "trial", "RUNNING"):
        assert time.time() < limit, "no trial was seen running"
        time.sleep(0.05)


def tiny_project(folder: Path) -> Path:
    """Make ``folder/project``, a clone whose params name ``folder/model``, a tiny random model."""
    models.save_model(folder / "model", models.trained_tokenizer())
    project = clone(folder / "project")
    (project / "params.yaml").write_text(yaml.safe_dump(tiny_params(folder / "model")))
    return project


if __name__ == "__main__":
    print(tiny_project(Path(sys.argv[1]).resolve()))
