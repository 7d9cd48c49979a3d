"""The real commands on a tiny random model, in a fresh clone: `mlflow run`, kill, interrupt, failure, registry."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from pipeline import checkpoint, device, storage
from pipeline.trial import build
from tests.end_to_end.project import (
    SEARCH,
    TASKS,
    by_stage,
    clone,
    command,
    edit,
    environment,
    runs,
    start,
    tiny_params,
    wait_for_trials,
)

HARD_LINKS = "[cache]\n type = hardlink\n"
PARETO = (sys.executable, "-m", "pipeline", "run", "pareto")


@pytest.fixture(scope="module")
def project(tmp_path_factory, model_folder):
    """A clone in which the main command has run once, with hard links into DVC's cache, as shared disks have them."""
    folder = clone(tmp_path_factory.mktemp("clone") / "qpruner")
    (folder / ".dvc/config.local").write_text(HARD_LINKS)
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params(model_folder)))
    done = command(folder, *SEARCH)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (folder / "terminal.txt").write_text(done.stdout + done.stderr)
    return folder


def test_main_command_leaves_one_tree_of_finished_runs(project):
    found = {run.info.run_id: run for run in runs(project)}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    (top,) = [run for run in found.values() if "mlflow.parentRunId" not in run.data.tags]
    assert top.data.tags["stage"] == "project"
    stages = [run for run in found.values() if run.data.tags.get("mlflow.parentRunId") == top.info.run_id]
    assert sorted(run.data.tags["stage"] for run in stages) == sorted(
        ["fetch", "prune", "importance", "quantize", "search", "pareto", "build", "evaluate"]
        + ["export", "register", "report"]
    )
    (search,) = by_stage(project, "search")
    trials = by_stage(project, "trial")
    assert len(trials) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {search.info.run_id}
    for run in trials:
        metrics = run.data.metrics
        assert run.data.tags["ratio"] in ("0", "0.2") and len(run.data.tags["bits"]) == 4
        assert run.data.tags["memory_source"] == "predicted"
        assert metrics["accuracy"] == pytest.approx(sum(metrics[task] for task in TASKS) / 2)
        assert all(f"{task}_stderr" in metrics for task in TASKS)
        assert {"peak_memory_bytes", "seconds_assemble", "seconds_recover", "seconds_evaluate"} <= set(metrics)
    assert search.inputs.dataset_inputs
    kept = MlflowClient(f"sqlite:///{project / 'mlflow.db'}").list_artifacts(search.info.run_id, "report")
    assert {"report/report.html", "report/pareto.png"} <= {file.path for file in kept}


def test_terminal_ends_with_the_front_and_the_command_that_opens_it(project):
    text = (project / "terminal.txt").read_text()
    assert "Pareto front" in text and "mlflow ui" in text and "viewStateShareKey" in text


def test_front_from_mlflow_equals_the_front_of_the_study(project):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(project / "artifacts/study/journal.log")))
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(study_name=summary.study_name, storage=storage)
    front = {(trial.user_attrs["run_id"], *trial.values) for trial in study.best_trials}
    rows = [row for row in json.loads((project / "reports/pareto.json").read_text()) if row["front"]]
    assert {(row["run_id"], row["score"], row["peak_memory_bytes"]) for row in rows} == front
    assert rows[0]["probability"] == 1 and all(0 <= row["probability"] <= 1 for row in rows)
    assert all(0 <= row["paired_stderr"] < row["stderr"] for row in rows)
    tagged = {run.info.run_id for run in by_stage(project, "trial") if run.data.tags["pareto"] == "true"}
    assert tagged == {row["run_id"] for row in rows}
    chances = {run.info.run_id: run.data.metrics["pareto_probability"] for run in by_stage(project, "trial")}
    assert [chances[row["run_id"]] for row in rows] == [row["probability"] for row in rows]


def test_repro_right_after_does_nothing(project):
    before = len(runs(project))
    done = command(project, "dvc", "repro")
    assert done.returncode == 0 and "Running stage" not in done.stdout
    assert len(runs(project)) == before


def test_second_machine_with_the_cache_reruns_nothing_and_compares(project, tmp_path):
    (tmp_path / "remote").mkdir()
    second = clone(tmp_path / "second")
    shared = f"[core]\n remote = shared\n['remote \"shared\"']\n url = {tmp_path}/remote\n"
    (project / ".dvc/config.local").write_text(shared + HARD_LINKS)
    (second / ".dvc/config.local").write_text(f"{shared}[cache]\n type = symlink\n")
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(project / name, second / name)
    git = ["git", "-C", str(second), "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "commit", "-qam", "A search"], check=True)
    assert command(project, "dvc", "push", "-q").returncode == 0
    pulled = command(second, "dvc", "pull", "-q")
    assert pulled.returncode == 0, pulled.stderr
    done = command(second, "dvc", "repro")
    assert done.returncode == 0 and "Running stage" not in done.stdout and "up to date" in done.stdout
    assert not (second / "mlflow.db").exists()
    names = {path.name for path in (project / "reports").iterdir()}
    assert names == {path.name for path in (second / "reports").iterdir()}

    ratio = json.loads((project / "reports/prune.json").read_text())["ratio_0.2"]
    storage.write_text(second / "reports/prune.json", json.dumps({"ratio_0.2": 0.5}))
    (change,) = json.loads(command(second, "dvc", "metrics", "diff", "--json").stdout).values()
    assert change["ratio_0.2"] == {"old": ratio, "new": 0.5, "diff": pytest.approx(0.5 - ratio)}
    table = command(second, "dvc", "exp", "show", "--csv").stdout
    assert f"{ratio}" in table and "!" not in table
    assert command(second, "dvc", "plots", "show", "reports/pareto.json", "reports/pareto.png").returncode == 0

    assert (second / "artifacts/final/model.safetensors").is_symlink()
    done = command(second, "dvc", "repro", "--force", "--single-item", "register")
    assert done.returncode == 0, done.stderr
    assert json.loads((second / "reports/register.json").read_text())["model"] == "models:/qpruner/1"


def test_registered_model_answers_where_the_project_is_not_installed(project, tmp_path):
    code = """
import json, mlflow, torch
model = mlflow.pyfunc.load_model("models:/qpruner@champion")
inner = model.unwrap_python_model()
from pipeline.trial import build
logits = build.probe(inner.model, inner.tokenizer)
answer, short = (model.predict(["Name a color."], params=params) for params in (None, {"max_new_tokens": 1}))
print(json.dumps({"answer": answer, "short": short, "logits": logits.flatten().tolist()}))
"""
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment() | store,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found["answer"][0], str)
    assert len(found["short"][0]) < len(found["answer"][0])
    final, compute = project / "artifacts/final", device.choose("cpu", "auto")
    built = checkpoint.load_final(final, compute.device, compute.dtype)
    # On a CPU it computes with dense weights; bitsandbytes' int8 modules round what they receive, too. In bf16 a step
    # between two numbers is 0.016 from 2 on and 0.03 from 4 on.
    logits = build.probe(built, checkpoint.load_tokenizer(final)).flatten().tolist()
    assert found["logits"] == pytest.approx(logits, abs=0.02 if compute.dtype == torch.float32 else 0.07)
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    tags = client.get_model_version_by_alias("qpruner", "champion").tags
    assert {"alpaca_md5", "pruned_checkpoint", "git_commit", "search_run", "bits", "size", "score"} <= set(tags)


def test_asking_for_more_trials_adds_them_and_a_kill_loses_none(project):
    process = start(project, *SEARCH, "-P", "n_trials=8")
    wait_for_trials(project, 6)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {run.info.run_id for run in by_stage(project, "trial")}
    assert len(kept) >= 6
    done = command(project, *PARETO, "--set", "search.n_trials=8")  # what comes after has run once, which is enough
    assert done.returncode == 0, done.stderr[-3000:]
    after = by_stage(project, "trial")
    assert kept <= {run.info.run_id for run in after}
    assert len(after) == 8 and len({(run.data.tags["ratio"], run.data.tags["bits"]) for run in after}) == 8
    assert not [run for run in runs(project) if run.info.status == "RUNNING"]


def test_interrupted_search_with_another_recipe_repeats_nothing_upstream_and_leaves_killed_runs(project):
    edit(project, "recover", learning_rate=0.001)
    earlier = {run.info.run_id for run in runs(project)}
    process = start(project, *SEARCH, "-P", "n_trials=30")  # many, as a slow machine notices the first one late
    wait_for_trials(project, len(by_stage(project, "trial")) + 1)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=240)
    limit = time.time() + 60
    while True:
        every = [run for run in runs(project) if run.info.run_id not in earlier]
        (project_run,), (search_run,) = (
            [run for run in every if run.data.tags.get("stage") == one] for one in ("project", "search")
        )
        if project_run.info.status == search_run.info.status == "KILLED":
            break
        assert time.time() < limit, [(run.info.run_name, run.info.status) for run in (project_run, search_run)]
        time.sleep(0.2)
    stages = [run.data.tags["stage"] for run in every]
    assert not {"fetch", "prune", "quantize", "importance"} & set(stages) and stages.count("search") == 1
    # The interrupt may come in the moment between two trials; then none was cut short.
    trials = [run for run in every if run.data.tags["stage"] == "trial"]
    assert {run.info.status for run in trials} <= {"FINISHED", "KILLED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {search_run.info.run_id}
    assert trials[0].data.tags["bits"] == "4444"  # tried with the earlier recipe, too
    assert not [run for run in runs(project) if run.info.status == "RUNNING"]


def test_nothing_was_written_through_a_link_into_the_cache(project):
    assert (project / "artifacts/final/model.safetensors").stat().st_nlink > 1
    files = [path for path in (project / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        assert hashlib.md5(path.read_bytes()).hexdigest() == f"{path.parent.name}{path.stem}"
