"""Addresses of pages in MLflow's UI."""

from __future__ import annotations

from pipeline.tracking.store import address, is_server, server_address


def ui_command(experiment: str, study: str | None = None, order: str = "accuracy") -> str:
    """Return what opens the trials, flat and best first, in the MLflow UI: a command, unless a server runs it already.

    A store's address may hold a password, so only that of our own file is shown.
    """
    search = "tags.stage%20%3D%20%22trial%22"
    if study:
        search += f"%20and%20tags.study%20%3D%20%22{study}%22"
    page = f"#/experiments/{experiment}/runs?searchFilter={search}&orderByKey=metrics.%60{order}%60&orderByAsc=false"
    if is_server():
        return f"{server_address()}/{page}"
    where = f"'{address()}'" if address().startswith("sqlite") else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --host 127.0.0.1 --backend-store-uri {where}\nhttp://127.0.0.1:5000/{page}"
