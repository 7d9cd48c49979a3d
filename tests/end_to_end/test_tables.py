"""`table` and `ablation` through the entry point on a tiny model, killed in the middle and run again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.end_to_end.project import by_stage, clone, command, environment, runs, tiny_params

RUN = (sys.executable, "-m", "pipeline", "run")


@pytest.fixture(scope="module")
def project(tmp_path_factory, model_folder):
    folder = clone(tmp_path_factory.mktemp("clone") / "qpruner")
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params(model_folder)))
    return folder


def test_table_and_ablation_from_a_clone_lose_nothing_to_a_kill(project):
    cells = project / "artifacts/table/cells"
    process = subprocess.Popen(
        [*RUN, "table"], cwd=project, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not cells.exists() or len(list(cells.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {json.loads(path.read_text())["run_id"] for path in cells.glob("*.json")}

    done = command(project, *RUN, "table")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not by_stage(project, "cell", "RUNNING")
    found = by_stage(project, "cell")
    assert len(found) == 5 and kept <= {run.info.run_id for run in found}
    (top,) = by_stage(project, "table")
    assert {run.data.tags["mlflow.parentRunId"] for run in found} == {top.info.run_id}
    searched = {run.info.run_id for run in found if run.data.tags["method"] == "qpruner3"}
    trials = by_stage(project, "trial")
    assert len(trials) == 4 and {run.data.tags["mlflow.parentRunId"] for run in trials} == searched
    assert all(run.data.metrics["items"] == 12 for run in found)  # 6 of each task, after the 4 of the trials
    assert all(run.data.metrics["items"] == 8 for run in trials)
    text = (project / "reports/table.md").read_text()
    # a heading; five cells on two tasks and their mean; four differences from QPruner3
    assert text.count("±") == 1 + 5 * 3 + 4 * 3 and "failed" not in text and "pending" not in text
    assert (project / "reports/table.tex").read_text().count(r"\hline") == 4

    done = command(project, sys.executable, "-m", "pipeline", "ablation")  # what it needs is there
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(by_stage(project, "cell")) == 5 + 9 and len(by_stage(project, "trial")) == 4
    assert "| PIQA | " in (project / "reports/ablation.md").read_text()
    assert not [run for run in runs(project) if run.info.status == "RUNNING"]
