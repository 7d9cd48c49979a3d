"""The stage ``export`` on a tiny built model: what it writes, what it measures, what it refuses to leave behind."""

import json

import pytest
from conftest import write_jsonl

from pipeline import params, paths, storage
from pipeline.export import dense, gguf_file, limits, llama
from pipeline.stages import export as stage
from tests.fixtures.exports import save_built
from tests.fixtures.models import save_model

needs_llama = pytest.mark.skipif(llama.installed() is None, reason=f"llama.cpp is not here: pip install {llama.WHEEL}")


class Noted:
    """What the stage tells its run."""

    def __init__(self):
        self.figures, self.artifacts = {}, []

    def metrics(self, figures):
        self.figures |= figures

    def artifact(self, path):
        self.artifacts.append(path)


@pytest.fixture
def project(raw_params, tmp_path, monkeypatch, tokenizer):
    """Params and a folder that holds what the stage reads."""
    rows = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}, of course."} for word in "abcd"]
    write_jsonl(tmp_path / "data/alpaca.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    with storage.writing(paths.BASE) as folder:
        save_model(folder, tokenizer)
    with storage.writing(paths.FINAL) as folder:
        save_built(folder, tokenizer)
        (folder / "lineage.json").write_text(json.dumps({"base_model": "package:x==1"}))
    raw_params["data"]["validation_rows"] = 2
    return raw_params


def export_params(raw, **changes):
    raw["export"] |= {"rounds": 1, "tolerance": 0.5} | changes
    raw["data"] |= {"alpaca": "path:data/alpaca.jsonl", "benchmarks": "hub"}
    return params.Params.model_validate(raw)


@needs_llama
@pytest.mark.parametrize("adapters", ["merged", "separate"])
def test_stage_writes_checks_and_times_both_forms(project, adapters):
    run = Noted()
    stage.run(export_params(project, adapters=adapters), run)
    storage.verify(paths.EXPORT, "export")
    beside = {"qpruner-adapters.gguf"} if adapters == "separate" else set()
    assert {path.name for path in (paths.EXPORT / "gguf").iterdir()} == {"qpruner.gguf", "Modelfile"} | beside
    assert (paths.EXPORT / "hf/modeling_pruned.py").exists() and not (paths.EXPORT / "plain").exists()
    kept = json.loads((paths.REPORTS / "export.json").read_text())
    assert kept == run.figures and kept["gguf_checked"] == 1 and kept["generated_speedup"] > 0
    assert (
        kept["gguf_tokens"] > 5 and abs(kept["gguf_difference"]) < 0.2 and kept["gguf_bytes"] > kept["parameters"] / 2
    )
    text = (paths.EXPORT / "README.md").read_text()
    assert "than the built model" in text and "`package:x==1`" in text
    assert [path.name for path in paths.EXPORT.parent.iterdir() if path.name.startswith(".")] == []


@needs_llama
def test_stage_leaves_nothing_that_answers_otherwise(project, monkeypatch):
    monkeypatch.setattr(gguf_file, "paired", lambda value, config: value)  # heads are then rotated wrongly
    with pytest.raises(limits.ExportError, match="Nothing was written"):
        stage.run(export_params(project, tolerance=0.001), Noted())
    assert not paths.EXPORT.exists() and not (paths.REPORTS / "export.json").exists()


def test_stage_without_llama_cpp_says_that_nothing_was_checked(project, monkeypatch, capsys):
    monkeypatch.setattr(llama, "installed", lambda: None)
    run = Noted()
    stage.run(export_params(project), run)
    assert run.figures["gguf_checked"] == 0 and "gguf_difference" not in run.figures
    assert "pip install xllamacpp" in capsys.readouterr().err + (paths.EXPORT / "README.md").read_text()
    assert (paths.EXPORT / "gguf/qpruner.gguf").exists()


@pytest.mark.parametrize("method, expected", [("calibrated", True), ("nearest", False)])
def test_4_bits_are_fitted_to_the_calibration_text_where_the_banks_codes_are(project, method, expected):
    rows = [{"instruction": "Count.", "input": "", "output": f"{number}, then the next. " * 20} for number in range(9)]
    write_jsonl(paths.ALPACA, rows)
    project["quantize"] |= {"method": method, "init": "loftq", "samples": 8, "max_length": 128}
    built = dense.read(paths.FINAL)
    found = stage.fitted(export_params(project), built, built.merged)
    assert set(found) == ({name for name, bits in built.bits.items() if bits == 4} if expected else set())
