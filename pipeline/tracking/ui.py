"""Pages of MLflow's UI: a view of a search's trials, stored in the experiment, and the addresses that open it.

MLflow keeps shared views (columns, order, charts) as tags of the experiment, which is how its own "share" button works;
the form of their content is that of MLflow 3.17's pages. Its UI opens an experiment on pages for agents unless the
address says ``workflowType=machine_learning``; no tag of the experiment changes that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from urllib.parse import quote, urlencode

from pipeline import console
from pipeline.tracking.runs import Run
from pipeline.tracking.store import address, asking, client, is_server, parent_run, server_address

_VIEW_TAG = "mlflow.sharedViewState."
_WORKFLOW = {"workflowType": "machine_learning"}
_PARAMS = ("method", "bits", "share_raised", "average_bits", "ratio")
_METRICS = ("peak_memory_gib", "inference_memory_bytes", "accuracy", "pareto_probability")


@asking
def show_search(run: Run, study: str, objective: str) -> None:
    """Keep a view of a study's trials in the experiment, name its runs after it, and print the view's address.

    Args:
        run: The search's run.
        study: The study's name, also the view's.
        objective: The metric that trials are ranked by.
    """
    view = json.dumps(_view(study, objective), separators=(",", ":"))
    client().set_experiment_tag(run.experiment_id, _VIEW_TAG + study, view)
    for run_id in filter(None, (run.run_id, parent_run())):
        name = client().get_run(run_id).info.run_name.partition(",")[0]
        client().set_tag(run_id, "mlflow.runName", f"{name}, study {study}")
    console.note(f"Its trials in MLflow's UI:\n{ui_command(run.experiment_id, study)}")


def _view(study: str, objective: str) -> dict[str, object]:
    score = f"metrics.`{objective}`"
    columns = [score, *(f"metrics.`{name}`" for name in _METRICS), *(f"params.`{name}`" for name in _PARAMS)]
    charts = [_scatter(memory, objective) for memory in _METRICS[:2]]
    return {
        "searchFilter": f"tags.study = '{study}'",
        "orderByKey": score,
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [*dict.fromkeys(columns)],
        "compareRunCharts": charts,
        "compareRunSections": [
            _section("front", "Score against memory", display=True),
            _section("model", "Model metrics", display=False),
            _section("system", "System metrics", display=False),
        ],
        "isAccordionReordered": True,
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": True,
    }


def _scatter(memory: str, objective: str) -> dict[str, object]:
    return {
        "type": "SCATTER",
        "uuid": f"front-{memory}",
        "metricSectionId": "front",
        "runsCountToCompare": 100,
        "isGenerated": False,
        "deleted": False,
        "xaxis": {"key": memory, "type": "METRIC"},
        "yaxis": {"key": objective, "type": "METRIC"},
    }


def _section(uuid: str, name: str, *, display: bool) -> dict[str, object]:
    return {
        "uuid": uuid,
        "name": name,
        "display": display,
        "isReordered": False,
        "deleted": False,
        "isGenerated": True,
    }


def ui_command(experiment: str, study: str | None = None, order: str = "accuracy") -> str:
    """Return what opens the trials, best first, in MLflow's UI: an address, after the command that serves it.

    Args:
        experiment: The experiment's id.
        study: The study whose view was kept, or None for the trials of all studies.
        order: The metric that trials are sorted by, without a study.
    """
    if study:
        asked = {"viewStateShareKey": study, "compareRunsMode": "CHART"}
    else:
        asked = {"searchFilter": 'tags.stage = "trial"', "orderByKey": f"metrics.`{order}`", "orderByAsc": "false"}
    page = f"#/experiments/{experiment}/runs?{urlencode(_WORKFLOW | asked, quote_via=quote)}"
    if is_server():
        return f"{server_address()}/{page}"
    return f"{serve_command()}\nhttp://127.0.0.1:5000/{page}"


def serve_command() -> str:
    """Return the command that serves the UI. A store's address may hold a password: only our own file's is shown."""
    where = f"'{address()}'" if address().startswith("sqlite") else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --host 127.0.0.1 --backend-store-uri {where}"


def serve_ui() -> int:
    """Serve MLflow's UI for this project's store until it is interrupted; of a server, print the address.

    Returns:
        The exit status.
    """
    page = f"#/experiments?{urlencode(_WORKFLOW)}"
    if is_server():
        console.note(f"MLflow's UI is served there already: {server_address()}/{page}")
        return 0
    console.note(f"MLflow's UI: http://127.0.0.1:5000/{page} (Ctrl-C ends it)")
    # By the environment, not as an argument: an address may hold a password. Jobs are for agents, a gigabyte of them.
    settings = {"MLFLOW_BACKEND_STORE_URI": address(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "5000", "--workers", "1"]
    return subprocess.call(command, env=os.environ | settings)
