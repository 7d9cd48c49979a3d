"""Workers on several GPUs or machines: Ray actors that turn tasks into results. The only module that imports Ray.

The search's process asks, tells, keeps the journal and writes MLflow; workers only compute. So Ray holds no truth here:
a worker loads what trials share once, and writes each result into the study's folder before it returns it. Whatever
dies, the same command goes on. A Ray of this search's own ends with it. It listens on loopback alone, wants a random
token, and has no dashboard.
"""

from __future__ import annotations

import os
import pickle
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline import console
from pipeline.errors import UserError
from pipeline.search import SearchError
from pipeline.search.crew import Answer, Died, Task

if TYPE_CHECKING:
    from pipeline.trial.result import Result

Work = Callable[[Task], "Result"]
INSTALL = "make workers"
_STORE = 80 * 2**20  # bytes of Ray's object store, near its least: results are small, and artifacts lie in files
_FOLDER = "qpruner-ray-"  # before the random name of a local Ray's folder
_LONGEST = 30  # characters of the path that it lies in: those of sockets, which lie in it, are limited to 107
_SERVERS = ("raylet", "gcs_server")  # processes of a local Ray that nothing goes on without
_TRIES = 3  # to start a local Ray
_STARTS = 3  # workers in a row that may die before they are ready
_POLL = 1.0  # seconds between two looks at interrupts
_PATIENCE = 600  # seconds without any worker before that is said: a large model takes minutes to verify and load
_PASSED = ("HF_", "OMP_", "ONEDNN_", "TOKENIZERS_", "TORCH", "TQDM_", "XDG_", "MPL")  # variables of a cluster's workers


class Process:
    """What runs in a worker's own process."""

    def start(self, folder: str, prepare: Callable[[], Work]) -> tuple[str] | str:
        """Load what trials share, in the project's folder; return (name of the machine,), or what is wrong."""
        try:
            os.chdir(folder)
            self._work = prepare()
        except (UserError, OSError) as error:
            return f"worker on {platform.node()}: {error}"
        return (platform.node(),)

    def answer(self, task: Task) -> Result | Exception:
        """Return a task's result, or what went wrong, with its traceback as a note."""
        try:
            return self._work(task)
        except Exception as error:
            return _portable(error)


def _portable(error: Exception) -> Exception:
    """Return an error that another process can read: itself where it can be pickled."""
    error.add_note(f"In a worker on {platform.node()}:\n{traceback.format_exc()}")
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class _Worker:
    """A worker as the search sees it.

    Attributes:
        name: What it is called; one that takes its place is called the same.
        actor: Ray's handle.
        call: What it works on now: its start, or a task; None: it is free.
        task: That task; None while it starts.
        host: Its machine; empty while it starts.
    """

    name: str
    actor: Any
    call: Any
    task: Task | None = None
    host: str = ""


class Workers:
    """A pool of Ray actors (``crew.Pool``).

    Args:
        size: How many.
        prepare: Loads what they need; it is called in each of them once, in the folder of this process.
        gpus: GPUs of each: 0 or 1.
    """

    def __init__(self, size: int, prepare: Callable[[], Work], gpus: int):
        self.size, self._prepare, self._gpus = size, prepare, gpus
        self._folder = str(Path.cwd())
        self._servers = [child for child in psutil.Process().children() if child.name() in _SERVERS and _lives(child)]
        self._tasks: deque[Task] = deque()
        self._deaths = 0  # of workers that were not ready yet, in a row
        self._workers = [self._new(f"worker {number + 1}") for number in range(size)]

    def submit(self, task: Task) -> None:
        """Take a task; it waits until a worker is free."""
        self._tasks.append(task)

    def wait(self) -> Answer:
        """Return the next answer.

        Raises:
            SearchError: Workers cannot start, or a local Ray has lost a process of its own.
        """
        import ray

        waited = 0.0
        while True:
            self._hand_out()
            calls = {worker.call: worker for worker in self._workers if worker.call is not None}
            ended, _ = ray.wait(list(calls), timeout=_POLL)
            if not ended and not all(map(_lives, self._servers)):  # Ray itself would wait on
                raise SearchError("a process of Ray's own ended; run the same command: what workers finished is kept")
            for call in ended:
                answer = self._ended(calls[call], call)
                if answer is not None:
                    return answer
            waited += 0.0 if ended or any(worker.host for worker in self._workers) else _POLL
            if waited == _PATIENCE:
                console.note(f"no worker has started in {_PATIENCE} s; does Ray have room for {self.size}?")

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._tasks and worker.call is None:
                worker.task = self._tasks.popleft()
                worker.call = worker.actor.answer.remote(worker.task)

    def _ended(self, worker: _Worker, call: Any) -> Answer | None:
        """Return the answer that a call brought; None if it was a worker's start."""
        import ray

        task, worker.task, worker.call = worker.task, None, None
        try:
            outcome = ray.get(call)
        except ray.exceptions.RayError as error:
            host, cause = worker.host, _cause(error)
            self._replace(worker)
            if task is not None:
                return Answer(task.name, Died(cause), worker.name, host)
            self._deaths += 1
            if self._deaths == _STARTS:
                raise SearchError(
                    f"{_STARTS} workers in a row died before they were ready, the last: {cause}. Every machine needs "
                    f"this project's environment, and its folder under the same path: {self._folder}"
                ) from error
            return None
        if task is not None:
            return Answer(task.name, outcome, worker.name, worker.host)
        if isinstance(outcome, str):
            raise SearchError(outcome)
        self._deaths, (worker.host,) = 0, outcome
        return None

    def _replace(self, worker: _Worker) -> None:
        import ray

        with suppress(Exception):
            ray.kill(worker.actor)
        new = self._new(worker.name)
        worker.actor, worker.call, worker.host = new.actor, new.call, ""

    def _new(self, name: str) -> _Worker:
        import ray

        actor = ray.remote(Process).options(num_cpus=1, num_gpus=self._gpus, scheduling_strategy="SPREAD").remote()
        return _Worker(name, actor, actor.start.remote(self._folder, self._prepare))

    def close(self) -> None:
        """End the workers, whatever they do."""
        import ray

        for worker in self._workers:
            with suppress(Exception):
                ray.kill(worker.actor)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _cause(error: Exception) -> str:
    """Return in one line why a worker ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:500]}"


def installed() -> bool:
    """Return whether Ray is there; nothing is imported."""
    return find_spec("ray") is not None


@contextmanager
def started(
    count: int | None, prepare: Callable[[], Work], cluster: str | None = None, *, gpus: bool = False
) -> Iterator[Workers]:
    """Give workers, which end with the block.

    Args:
        count: How many; None: one for each GPU that Ray sees, on CPUs one.
        prepare: Loads what a worker needs and returns what turns a task into its result; it is pickled.
        cluster: Address of a Ray that runs; None: one is started, for this search alone.
        gpus: Whether each worker needs a GPU.

    Raises:
        SearchError: There is no Ray, or none at the address.
    """
    if not installed():
        raise SearchError(f"Ray is not installed, which more than one worker needs; run: {INSTALL}")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would report to its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # as important as trials of this process
    if cluster is None:  # Ray reads these when it is imported
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}  # the former: loopback alone
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    with _connected(cluster) if cluster else _local(count):
        number = count or (max(1, int(ray.cluster_resources().get("GPU", 0))) if gpus else 1)
        pool = Workers(number, prepare, int(gpus))
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def _local(count: int | None) -> Iterator[None]:
    """Start a Ray that ends with the block, and with this process if that is killed."""
    with (
        _folder() as folder,
        _connected(
            "local",
            num_cpus=count or os.cpu_count(),
            object_store_memory=_STORE,
            include_dashboard=False,
            _temp_dir=str(folder),
        ),
    ):
        yield


@contextmanager
def _connected(address: str, **more: Any) -> Iterator[None]:
    """Connect to Ray, whose handlers of signals give way to this project's.

    Raises:
        SearchError: No Ray answers at the address.
    """
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _connect(address, more)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _connect(address: str, more: Mapping[str, Any]) -> None:
    """Connect to a Ray. One that is to be started on a busy machine may miss Ray's own limit of 30 seconds: again."""
    import ray

    passed = {key: value for key, value in os.environ.items() if key.startswith(_PASSED)}
    path = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"env_vars": passed | {"PYTHONPATH": path}}
    for attempt in range(_TRIES):
        try:
            ray.init(address, log_to_driver=False, logging_level="error", runtime_env=variables, **more)
            return
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if address != "local":
                message = (
                    f"search.cluster: no Ray answers at {address} ({_cause(error)}); start it, or mend the address"
                )
                raise SearchError(message) from error
            if attempt == _TRIES - 1:
                raise SearchError(f"Ray does not start here ({_cause(error)}); run the same command again") from error


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a folder for a local Ray. A process beside this one ends what is left of that Ray, however this one ends."""
    place = Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=place if len(str(place)) <= _LONGEST else "/tmp"))
    code = f"from pipeline import workers; workers.keep({str(folder)!r}, {os.getpid()})"
    keeper = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    assert keeper.stdin is not None
    try:
        yield folder
    finally:
        keeper.stdin.close()
        keeper.wait()


def keep(folder: str, driver: int) -> None:
    """Wait for the end of a local Ray or of its search; then end what is left of that Ray, and remove its folder.

    Ray's agents wait for minutes for a directory that was killed. They rename themselves and hide their environment, so
    they are known by the logs in the folder that they write.

    Args:
        folder: The Ray's folder.
        driver: Number of the search's process, which may have such a log open.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()  # until the search closes it, or dies
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != driver and any(file.path.startswith(f"{folder}/") for file in process.open_files()):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)
