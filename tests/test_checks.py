"""How checks are run: each on the keys that it names, and only if these are sound."""

import pytest
from conftest import tiny_config

from pipeline import checks
from pipeline.checks import machine, model, pairs
from pipeline.checks.check import Check
from pipeline.overrides import keys
from pipeline.params import ParamsError

ALL = [*pairs.CHECKS, *machine.CHECKS, *model.checks(tiny_config())]


@pytest.mark.parametrize("check", ALL, ids=lambda check: "+".join(check.keys) or "config")
def test_check_reads_the_keys_that_it_names_and_no_others(check, raw_params):
    raw_params["search"] |= {"memory_budget_gib": 100.0, "seed_bits": ["4448"]}
    values = checks._sound_values(raw_params, set())
    assert set(check.keys) <= set(values)
    assert list(checks._judge(check, {key: values[key] for key in check.keys})) == []


@pytest.mark.parametrize("check", pairs.CHECKS, ids=lambda check: "+".join(check.keys))
def test_check_is_left_out_where_one_of_its_keys_is_at_fault(check, raw_params):
    values = checks._sound_values(raw_params, set())
    for missing in check.keys:
        rest = {key: value for key, value in values.items() if key != missing}
        assert list(checks._judge(check, rest)) == []


def test_error_within_a_check_is_not_swallowed(raw_params, monkeypatch):
    monkeypatch.setattr(pairs, "CHECKS", (Check(("seed",), lambda given: iter([given.no_such_key])),))
    with pytest.raises(AttributeError, match="no_such_key"):
        checks.parse(raw_params)


def test_sound_values_are_typed_and_leave_out_what_is_at_fault(raw_params):
    del raw_params["quantize"]["r"], raw_params["dtype"]
    raw_params["prune"]["ratios"], raw_params["build"] = "much", None
    wrong = {("prune", "ratios"), ("build",), ("quantize", "r")}
    values = checks._sound_values(raw_params, wrong)
    assert values["dtype"] == "auto"  # its default
    assert values["evaluate.tasks"] == tuple(raw_params["evaluate"]["tasks"])
    assert values["prune.mlp_blocks"].last == -1
    assert values["recover"].steps == 4
    assert not {"prune", "prune.ratios", "build", "build.steps", "quantize", "quantize.r"} & set(values)
    assert {"prune.noise", "quantize.init"} <= set(values)


def test_every_key_is_known_by_its_dotted_name(raw_params):
    known = list(keys())
    assert len(known) == len(set(known))
    assert {"seed", "prune.ratios", "prune.mlp_blocks.first", "register.alias"} <= set(known)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"hidden_size": "wide"}, "hidden_size 'wide', which is no whole number above 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000; models have at most 10,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, which is no whole number"),
        ({"vocab_size": True}, "vocab_size True"),
        ({"num_attention_heads": 5}, "5 attention heads, no multiple of its 2 key/value heads"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size 66, no multiple of its 4 attention heads"),
    ],
)
def test_config_with_impossible_sizes_is_one_fault(raw_params, tmp_path, values, said):
    import json

    config = tiny_config().to_dict() | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    raw_params["model"] = {"source": f"path:{tmp_path}", "sha256": ""}
    with pytest.raises(ParamsError) as caught:
        checks.parse(raw_params)
    first, line = str(caught.value).splitlines()
    assert "1 fault" in first and line.startswith("  model.source: ") and said in line


def test_config_nested_beyond_reason_is_one_fault(raw_params, tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' * 100_000)
    raw_params["model"] = {"source": f"path:{tmp_path}", "sha256": ""}
    with pytest.raises(ParamsError, match="model.source: .*config.json cannot be read"):
        checks.parse(raw_params)


@pytest.mark.parametrize("section", [{"workers": 2}, {"workers": "auto", "cluster": "10.0.0.1:6379"}])
def test_workers_without_ray_are_refused_with_the_command_that_installs_it(raw_params, monkeypatch, section):
    raw_params["search"] |= section
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(ParamsError, match=r"search.workers: .* needs Ray, which is not installed; run `make workers`"):
        checks.parse(raw_params)
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    assert checks.parse(raw_params).search.workers == section["workers"]


def test_one_worker_and_one_for_each_gpu_of_this_machine_need_no_ray(raw_params, monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    for workers in (1, "auto"):
        raw_params["search"]["workers"] = workers
        assert checks.parse(raw_params).search.cluster is None
