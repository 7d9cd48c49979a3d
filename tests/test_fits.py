import json
import subprocess
import sys
import types

import pytest
from conftest import FAMILIES, ROOT, tiny_config, tiny_model

from pipeline import GIB, architecture, checks, documents, fits, params
from pipeline import __main__ as command
from pipeline.compress import structures
from pipeline.params import ParamsError
from pipeline.results import plan
from pipeline.trial import even, memory


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny model's config and nothing else."""
    tiny_config().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def raw(raw_params, folder):
    raw_params["model"] = {"source": f"path:{folder}", "sha256": ""}
    return raw_params


def faults(raw):
    with pytest.raises(ParamsError) as caught:
        checks.parse(raw)
    first, *lines = str(caught.value).splitlines()
    assert first == f"params.yaml has {len(lines)} fault{'s' * (len(lines) > 1)}:"
    return [line.strip() for line in lines]


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NONSENSE = {
    "attention_range": (
        {"prune": {"attention_blocks": {"first": 1, "last": 4}}},
        "prune.attention_blocks: 1 to 4 is no range within blocks 0 to 3",
    ),
    "mlp_range": (
        {"prune": {"mlp_blocks": {"first": 4, "last": -1}}},
        "prune.mlp_blocks: 4 to -1 is no range within blocks 0 to 3",
    ),
    "spared_by_this_model": (
        {"prune": {"shapes": "uniform", "mlp_blocks": {"first": 0, "last": 2}}},
        "prune.shapes: uniform gives all blocks one shape, but prune.mlp_blocks 0 to 2 spare some; set first to 0",
    ),
    "ratio": ({"prune": {"ratios": [0.2, 0.8]}}, "prune.ratios: 0.8 of 156,224 parameters is more than the 0.624 "),
    "table_ratios": ({"table": {"ratios": [0.2, 0.8]}}, "table.ratios: 0.8 of 156,224 parameters is more than the "),
    "ablation_ratio": ({"ablation": {"ratio": 0.7}}, "ablation.ratio: 0.7 of 156,224 parameters is more than the "),
    "rank": ({"quantize": {"r": 33}}, "quantize.r: rank 33 is more than the 32 of the smallest linear (k_proj)"),
    "prune_length": ({"prune": {"max_length": 1025}}, "prune.max_length: 1025 tokens are more than the model's 1024"),
    "importance_length": ({"importance": {"max_length": 2048}}, "importance.max_length: 2048 tokens are more than"),
    "recover_length": ({"recover": {"max_length": 4096}}, "recover.max_length: 4096 tokens are more than"),
    "seed_bits": (
        {"search": {"seed_bits": ["4448", "44484"]}},
        "search.seed_bits: bits '44484' are 5 digits, but with granularity block the model has 4 units",
    ),
    "seed_bits_of_groups": (
        {"search": {"granularity": "group", "seed_bits": ["4448"]}},
        "search.seed_bits: bits '4448' are 4 digits, but with granularity group the model has 16 units",
    ),
    "budget": (
        {"search": {"memory_budget_gib": 0.0005}},
        "search.memory_budget_gib: 0.0005 GiB, but recovery with 0.2 pruned and 4 bits everywhere takes about ",
    ),
    "choice": ({"build": {"choose": "484"}}, "build.choose: bits '484' are 3 digits, but with granularity block"),
    # and those that no model is needed for
    "spared": (
        {"prune": {"shapes": "uniform", "attention_blocks": {"first": 2, "last": -2}}},
        "prune.shapes: uniform gives all blocks one shape, but prune.attention_blocks 2 to -2 spare some; set first",
    ),
    "second_order": (
        {"prune": {"importance": "taylor2", "samples": 0}},
        "prune.samples: samples is 0, but importance 'taylor2'",
    ),
    "random_steps": (
        {"prune": {"importance": "random", "steps": 3}},
        "prune.steps: steps is 3, but random scores do not get better; set it to 1",
    ),
    "surgeon": ({"prune": {"importance": "surgeon"}}, "prune.importance: 'surgeon' scores what is lost after the rest"),
    "compensate": (
        {"prune": {"importance": "random", "compensate": True, "samples": 0}},
        "prune.samples: samples is 0, but importance 'random' or compensation needs rows",
    ),
    "noise": (
        {"prune": {"importance": "taylor1", "noise": 0.3}},
        "prune.noise: noise 0.3 changes what layers receive, which importance 'taylor1' without compensation",
    ),
    "warmup": ({"recover": {"warmup_steps": 5}}, "recover.warmup_steps: 5 steps of warmup do not end within the 4 of"),
    "warmup_of_build": (
        {"recover": {"steps": 0, "warmup_steps": 17}},
        "recover.warmup_steps: 17 steps of warmup do not end within the 16 of build.steps",
    ),
    "clusters": (
        {"importance": {"samples": 2, "max_length": 31}},
        "importance.clusters: 64 clusters of at most 62 tokens (samples x max_length)",
    ),
}


@pytest.mark.parametrize("changes, wanted", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_with_what_to_do(raw, changes, wanted):
    for section, values in changes.items():
        raw[section] |= values
    (line,) = faults(raw)
    assert line.startswith(wanted)


def test_default_values_fit_the_tiny_model(raw):
    checks.parse(raw)


@pytest.mark.parametrize(
    "section, values",
    [
        ("prune", {"attention_blocks": {"first": 3, "last": 3}, "ratios": [0.62]}),
        ("quantize", {"r": 32}),
        ("recover", {"max_length": 1024}),
        ("search", {"seed_bits": ["4448"]}),
        ("search", {"granularity": "linear", "seed_bits": ["4" * 27 + "8"]}),
        ("build", {"choose": "8484"}),
        ("build", {"choose": "4" * 32}),  # as long as a run's id
        ("prune", {"importance": "surgeon", "compensate": True}),
        ("prune", {"importance": "magnitude", "samples": 0}),
        ("prune", {"importance": "activation", "noise": 1}),
        ("prune", {"importance": "taylor1", "compensate": True, "noise": 0.5}),
        ("recover", {"warmup_steps": 4}),
        ("search", {"n_trials": 2}),  # fewer than n_random: a quick look
    ],
)
def test_limits_themselves_are_allowed(raw, section, values):
    raw[section] |= values
    if section == "prune" and "ratios" in values:
        raw["prune"]["attention_blocks"] = {"first": 0, "last": -1}
    checks.parse(raw)


@pytest.mark.parametrize("multiple_of, channels", [(1, 95), (8, 88), (64, 32), (200, 0)])
def test_most_that_may_go_leaves_a_head_and_a_multiple_of_channels(multiple_of, channels):
    span = params.BlockRange(first=0, last=-1)
    head = 64 * 16 * (2 + 1 + 1 + 2)  # q and o of two query heads, k and v
    most = 4 * (head + 3 * 64 * channels)
    whole = sum(one.numel() for one in tiny_model().parameters())
    settings = types.SimpleNamespace(
        structures=("attention", "mlp"), attention_blocks=span, mlp_blocks=span, multiple_of=multiple_of
    )
    assert structures.ratio(tiny_config(), settings, "prune.ratio", most / whole - 1e-9) is None
    assert structures.ratio(tiny_config(), settings, "prune.ratio", most / whole + 1e-6).startswith("prune.ratio: ")


def test_budget_is_judged_by_the_prediction_for_an_evenly_pruned_model(raw):
    smaller = even.pruned(tiny_config(), raw["prune"]["ratios"][-1])
    setting = plan.setting_of(checks.parse(raw))
    least = memory.predict(smaller, even.bits_of(smaller, 0), setting).training / GIB
    raw["search"]["memory_budget_gib"] = least
    checks.parse(raw)
    raw["search"]["memory_budget_gib"] = 0.9 * least
    (line,) = faults(raw)
    assert line.startswith("search.memory_budget_gib") and "raise it, prune more" in line


def test_a_wrong_value_does_not_hide_that_the_ratios_are_too_large(raw):
    raw["prune"] |= {"importance": "fisher", "ratios": [0.8]}
    raw["table"]["ratios"] = [0.2, 0.7]
    with pytest.raises(params.ParamsError) as caught:
        checks.parse(raw)
    lines = str(caught.value).splitlines()
    assert lines[0] == "params.yaml has 3 faults:"
    for key in ("prune.importance", "prune.ratios: 0.8", "table.ratios: 0.7"):
        assert sum(line.startswith(f"  {key}") for line in lines) == 1


def test_all_nonsense_is_listed_at_once_and_nothing_is_written(raw, tmp_path, monkeypatch, capsys):
    alone = ("attention_range", "prune_length", "recover_length", "seed_bits", "choice", "warmup", "clusters")
    together = (*alone, "rank")
    for name in together:
        for section, values in NONSENSE[name][0].items():
            raw[section] |= values
    raw["seed"] = "forty"
    raw["quantize"]["four_bit"] = "nf5"  # and the rank is judged nevertheless
    raw["data"]["alpaca"] = f"path:{ROOT / 'data/sample/alpaca.jsonl'}"
    raw["data"]["benchmarks"] = f"path:{ROOT / 'data/sample/benchmarks'}"
    project = tmp_path / "project"
    project.mkdir()
    (project / "params.yaml").write_text(documents.write(raw))
    monkeypatch.chdir(project)
    for arguments in (["check"], ["prune"], ["run", "search"]):
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert "params.yaml has 10 faults:" in error
        for name in together:
            assert NONSENSE[name][1] in error
        assert "seed: " in error and "quantize.four_bit: " in error
        assert [path.name for path in project.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_quantized_model_is_refused(raw, folder, method, init):
    raw["quantize"]["init"] = init
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    (line,) = faults(raw)
    assert line.startswith(f"model.source: the model is already quantized (method {method}); pruning and")


def test_missing_items_are_listed_beside_an_unknown_task(raw, tmp_path):
    (tmp_path / "items").mkdir()
    (tmp_path / "items/piqa.jsonl").write_text("{}\n")
    raw["data"]["benchmarks"] = f"path:{tmp_path / 'items'}"
    raw["evaluate"]["tasks"] = ["piqa", "boolq", "pika", "sciq"]
    task, items = faults(raw)
    assert task.startswith("evaluate.tasks.2: lm-eval ships no task 'pika'")
    assert items.startswith(f"data.benchmarks: {tmp_path / 'items'} has no boolq.jsonl, sciq.jsonl; add it or")


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_config_that_cannot_be_read_is_a_fault(raw, folder, text):
    (folder / "config.json").write_text(text)
    (line,) = faults(raw)
    assert line.startswith(f"model.source: {folder}/config.json cannot be read (")


def test_fetched_model_is_judged_where_it_is_the_one_asked_for(raw_params, folder, monkeypatch):
    monkeypatch.setattr(fits, "BASE", folder)
    raw_params["search"]["seed_bits"] = ["4484444"]
    checks.parse(raw_params)  # nobody knows what was fetched
    (folder / fits.SOURCE).write_text("hub:some/other@main")
    checks.parse(raw_params)
    (folder / fits.SOURCE).write_text(raw_params["model"]["source"])
    (line,) = faults(raw_params)
    assert "search.seed_bits: bits '4484444' are 7 digits" in line


@pytest.mark.parametrize("family, tied", [("llama", False), *((family, True) for family in FAMILIES)])
def test_saved_config_gives_what_transformers_own_does(family, tied, tmp_path):
    config = tiny_config(family, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    read = fits.read(tmp_path)
    model = tiny_model(family, tie_word_embeddings=tied)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert architecture.parameters(read) == architecture.parameters(config) == counted
    assert architecture.shapes(read) == architecture.shapes(config)
    assert architecture.head_dim(read) == architecture.head_dim(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_that_leaves_fields_out_is_read_as_transformers_reads_it(family, tmp_path):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    left = {key: value for key, value in values.items() if key not in ("tie_word_embeddings", "head_dim")}
    (tmp_path / "config.json").write_text(json.dumps(left))
    read, theirs = fits.read(tmp_path), type(config).from_pretrained(tmp_path)
    assert read.tie_word_embeddings == theirs.tie_word_embeddings
    assert architecture.parameters(read) == architecture.parameters(theirs)


def test_old_config_without_key_value_heads_has_as_many_as_query_heads(tmp_path):
    old = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
           "intermediate_size": 96, "vocab_size": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    (shape, _) = architecture.shapes(fits.read(tmp_path))
    assert (shape.heads, shape.kv_heads, shape.channels) == (4, 4, 96)
    assert architecture.parameters(fits.read(tmp_path)) == 2 * 512 * 64 + 64 + 2 * (2 * 64 + 4 * 64**2 + 3 * 64 * 96)


def test_checking_params_imports_neither_torch_nor_transformers(raw, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(documents.write(raw))
    code = f"""
import sys
from pipeline import checks
checks.load({str(path)!r})
assert not {{"torch", "transformers", "lm_eval", "mlflow"}} & {{*sys.modules}}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
