"""What the registry holds of a version, and which version has the alias."""

import os
import tempfile
from pathlib import Path

import mlflow
import pytest

from pipeline import tracking
from pipeline.tracking import Packed, Registration, Standing, registry

CODE = """
import mlflow
import pandas as pd

class Echo(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        with open(context.artifacts["checkpoint"] + "/weights") as file:
            self.weights = file.read()

    def predict(self, context, model_input: pd.DataFrame, params=None) -> list[str]:
        return [f"{self.weights} {text} {params}" for text in model_input]

mlflow.models.set_model(Echo())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, empty_store_here):
    """A project with a checkpoint that DVC linked symbolically, and an empty store."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/weights").write_text("weights")
    (tmp_path / "artifacts/final").mkdir(parents=True)
    (tmp_path / "artifacts/final/weights").symlink_to(tmp_path / "cache/weights")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/model.py").write_text(CODE)
    return tmp_path


def register(folder, score, promote="better", items="a"):
    asked = Registration(
        name="small",
        alias="champion",
        promote=promote,
        standing=Standing("accuracy", score, items),
        description="What it is.",
        metrics={"accuracy": score, "size_mb": 12.5},
        tags={"base_model": "package:x==1"},
    )
    packed = Packed(
        model_code=folder / "code/model.py",
        checkpoint=folder / "artifacts/final",
        code=[folder / "code"],
        requirements=["mlflow"],
        params={"max_new_tokens": 64, "temperature": 0.5, "stop": []},
        example=["Hello"],
    )
    with tracking.stage("register", {}) as run:
        return tracking.register_model(run, asked, packed)


def champion():
    return tracking.client().get_model_version_by_alias("small", "champion")


def test_registered_version_says_what_it_is_and_answers(folder):
    registered = register(folder, 0.5)
    assert registered.uri == "models:/small/1" and registered.promoted and registered.reason == "no version had it"
    version = champion()
    assert version.description == "What it is." and version.tags["base_model"] == "package:x==1"
    figures = tracking.client().get_logged_model(version.source.removeprefix("models:/")).metrics
    assert {figure.key: figure.value for figure in figures} == {"accuracy": 0.5, "size_mb": 12.5}
    model = mlflow.pyfunc.load_model("models:/small@champion")
    assert model.predict(["a"], params={"max_new_tokens": 3}) == [
        "weights a {'max_new_tokens': 3, 'temperature': 0.5, 'stop': []}"
    ]
    assert tracking.registered("models:/small/1") and not tracking.registered("models:/small/2")
    assert not tracking.registered("models:/nobody/1")
    assert [path.name for path in (folder / "artifacts").iterdir()] == ["final"]


def test_alias_stays_with_the_better_version(folder):
    assert register(folder, 0.5).promoted
    worse = register(folder, 0.25)
    assert not worse.promoted and worse.reason == "accuracy 0.2500 against 0.5000 on the same items"
    assert str(champion().version) == "1"
    assert register(folder, 0.75).uri == f"models:/small/{champion().version}"


SAME, OTHER = Standing("accuracy", 0.5, "a"), Standing("accuracy", 0.5, "b")


@pytest.mark.parametrize(
    "promote, new, current, moves, told",
    [
        ("better", Standing("accuracy", 0.6, "a"), SAME, True, "0.6000 against 0.5000"),
        ("better", SAME, SAME, False, "0.5000 against 0.5000"),
        ("better", Standing("accuracy", 0.9, "a"), OTHER, False, "judged on other items"),
        ("better", Standing("gold_logprob", 0.9, "a"), SAME, False, "judged on other items"),
        ("better", SAME, None, False, "judged on other items"),
        ("better", SAME, "nobody", True, "no version had it"),
        ("always", Standing("accuracy", 0.1, "a"), SAME, True, "always"),
        ("never", Standing("accuracy", 0.9, "a"), SAME, False, "never"),
        ("never", SAME, "nobody", False, "never"),
    ],
)
def test_who_deserves_the_alias(promote, new, current, moves, told):
    promoted, reason = registry.deserves_alias(promote, new, current)
    assert promoted == moves and told in reason


def test_standing_survives_as_tags():
    exact = Standing("accuracy", 0.1 + 0.2, "a")
    assert Standing.from_tags(exact.tags() | {"other": "x"}) == exact
    assert Standing.from_tags({"score": "0.5"}) is None


def test_temporary_files_lie_beside_the_checkpoint_and_what_a_kill_left_is_removed(tmp_path):
    final = tmp_path / "artifacts/final"
    left = tmp_path / "artifacts/.final-register-left"
    left.mkdir()
    before = tempfile.gettempdir()
    with registry.scratch_beside(final) as scratch:
        assert Path(tempfile.mkdtemp()).parent == scratch and scratch.parent == final.parent
        assert not left.exists()
    assert tempfile.gettempdir() == before and not scratch.exists()


def test_symbolic_links_become_files_without_a_copy(tmp_path):
    real = registry.real_files(tmp_path / "artifacts/final", tmp_path)
    assert not (real / "weights").is_symlink()
    assert os.path.samefile(real / "weights", tmp_path / "cache/weights")
    assert registry.real_files(tmp_path / "code", tmp_path) == tmp_path / "code"
