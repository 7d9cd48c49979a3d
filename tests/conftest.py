"""Fixtures that many tests share. The tiny models themselves are in fixtures/models.py."""

import copy
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pipeline import runtime

runtime.prepare()  # before torch is imported

# ruff: noqa: E402
import pytest

from pipeline import checks, documents, fits
from tests.fixtures import models
from tests.fixtures.models import (  # noqa: F401 (tests import these from here)
    FAMILIES,
    PLAIN_PRUNING,
    ROOT,
    VOCABULARY,
    batches,
    mask,
    tiny_config,
    tiny_model,
    write_jsonl,
)

# What takes longest begins first, so that no process works alone at the end.
LONGEST = (
    "test_pipeline",
    "test_presets",
    "test_tables",
    "test_paper",
    "test_campaign",
    "test_bad_models",
    "test_memory",
)


def pytest_collection_modifyitems(items):
    """Order files by how long they take; within one nothing changes."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def tokenizer():
    return models.trained_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A saved tiny Llama in bf16 with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    models.save_model(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def written_params():
    return documents.read(ROOT / "params.yaml")


@pytest.fixture
def raw_params(monkeypatch, written_params):
    """The default params as a plain dictionary, free to change, with pruning that fits a model of four blocks.

    A unit is a block, so that bit strings can be read. On the CPU, also where there is a GPU (which test_cuda.py is
    for); whatever was fetched is not there.
    """
    os.chdir(ROOT)
    monkeypatch.setattr(fits, "BASE", Path("nothing/fetched"))
    raw = copy.deepcopy(written_params)
    raw["prune"] |= PLAIN_PRUNING | {"ratios": [0.2]}
    raw["search"] |= {"granularity": "block", "max_8bit_fraction": 0.25, "n_random": 1}
    raw["device"] = "cpu"
    return raw


@pytest.fixture
def default(raw_params):
    return checks.parse(raw_params)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """The file of a store with no run: MLflow takes a second and a half to make its tables, a copy takes nothing."""
    import sqlalchemy
    from mlflow.tracking import MlflowClient

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
    def trust_the_machine(connection, _):  # a commit need not wait for the disk; a process that dies loses nothing
        connection.execute("PRAGMA synchronous=OFF")

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def empty_store_here(tmp_path, monkeypatch, empty_store):
    """An empty folder to work in, with an MLflow store of its own."""
    from pipeline import tracking

    shutil.copy(empty_store, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv(tracking.PARENT, raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
