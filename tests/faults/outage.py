"""An MLflow server on loopback that stops in the middle of a search, for a while or for good."""

import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tests.end_to_end.project import command, edit, end_group, environment, start
from tests.faults import state
from tests.faults.kills import run
from tests.faults.tally import Try


class Server:
    """``mlflow server`` on a free port, with its store in ``folder`` unless told otherwise.

    ``more`` adds to its environment, which holds the keys of an object store.
    """

    def __init__(self, folder: Path, backend: str = "", artifacts: str = "", more: dict | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.more = folder, more or {}
        self.backend = backend or f"sqlite:///{folder / 'server.db'}"
        self.artifacts = artifacts or str(folder / "artifacts")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def up(self) -> None:
        arguments = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        arguments += ["--artifacts-destination", self.artifacts]
        settings = {"MLFLOW_BACKEND_STORE_URI": self.backend, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                arguments,
                cwd=self.folder,
                env=environment() | settings | self.more,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        limit = time.monotonic() + 120
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert time.monotonic() < limit and self.process.poll() is None, "the server does not start"
            time.sleep(0.2)

    def down(self) -> None:
        if self.process:
            end_group(self.process)
            self.process = None

    def runs(self, where: str = "") -> list:
        client = MlflowClient(self.uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return client.search_runs(experiments, where, max_results=1000)

    def trials(self, study: str | None = None) -> list:
        return self.runs("tags.stage = 'trial'" + (f" and tags.study = '{study}'" if study else ""))


def outage(project: Path, number: int, seconds: float | None) -> Try:
    """Stop the server once two trials have finished; start it again after ``seconds``, or (None) only after the search.

    A search must not depend on it: it ends with all its trials in the journal and says that tracking is behind. Once
    the server answers, the same command makes it agree with the journal.
    """
    done = Try("outages", f"{number}: " + ("for good" if seconds is None else f"for {seconds:.0f} s"))
    edit(project, "recover", learning_rate=0.004 + number * 1e-6)
    server = Server(project.parent / f"server-{number}")
    server.up()
    where = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    before = state.journal_trials(project)
    output = project.parent / "outage.txt"
    try:
        with output.open("w") as file:
            process = start(project, *run("search"), more=where, output=file)
            _wait(lambda: len(state.journal_trials(project)) >= len(before) + 2 or process.poll() is not None)
            server.down()
            if seconds is not None:
                time.sleep(seconds)
                server.up()
            try:
                process.wait(timeout=400)
            except subprocess.TimeoutExpired:
                end_group(process)
                done.unclear += 1
                done.remark("the search had not ended 400 s after the server's death")
        text = output.read_text()
        # Then `mlflow run` itself cannot write how it ended, and shows its own traceback.
        done.read(text.partition("\nerror: the tracking store")[0])
        if seconds is None and not any(word in text.lower() for word in ("tracking", "mlflow server", "store")):
            done.unclear += 1
            done.remark("nothing was said about tracking")
        trials = [each for each in state.journal_trials(project) if each not in before]
        if len(trials) < 4:
            done.unclear += 1
            done.remark(f"{len(trials)} of 4 trials were finished without the server")
        if server.process is None:
            server.up()
        again = command(project, *run("search"), more=where, timeout=1800)
        done.read(again.stdout + again.stderr)
        if again.returncode:
            done.unclear += 1
            done.remark(f"exit status {again.returncode} once the server answers: {again.stderr.strip()[-300:]}")
        _agree(done, server, [each for each in state.journal_trials(project) if each not in before])
    finally:
        server.down()
    return done


def _agree(done: Try, server: Server, trials: list) -> None:
    try:
        logged = server.trials()
    except MlflowException as error:
        done.unclear += 1
        done.remark(f"the server cannot be read: {error}")
        return
    finished = [state.identified(run) for run in logged if run.info.status == "FINISHED"]
    done.lost += len(set(trials) - set(finished))
    done.doubled += len(finished) - len(set(finished))
    done.left += sum(run.info.status == "RUNNING" for run in logged)


def _wait(until, seconds: float = 600) -> None:
    limit = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.2)
