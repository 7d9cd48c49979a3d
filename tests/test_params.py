import ast
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT
from pydantic import BaseModel, ValidationError

from pipeline import checks, documents, overrides, params
from pipeline.params import ParamsError

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
NAMES = ("accuracy", "gold_logprob", "response_logprob")
GOOD_ROW = {"ratio": 0.2, "bits": "4484"} | {f"{name}{ending}": 0.5 for name in NAMES for ending in ("", "_stderr")}


def change(raw, **changes):
    for key, value in changes.items():
        *sections, name = key.split("__")
        target = raw
        for section in sections:
            target = target[section]
        target[name] = value
    return raw


def refused(raw):
    with pytest.raises(ParamsError) as caught:
        checks.parse(raw)
    return str(caught.value)


def model_of(folder, family):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return f"path:{folder}"


def sections(kind=params.Params):
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


@pytest.fixture
def saved(raw_params, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(documents.write(raw_params))
    return path


def test_default_file_parses(default):
    assert default.seed == 42
    assert default.evaluate.tasks == params.TASKS
    assert default.prune.attention_blocks.last == -1
    assert default.search.memory_budget_gib is None
    assert default.register_.alias == "champion"


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_preset_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert checks.load(path).search.n_trials > 0


@pytest.mark.parametrize(
    "name, ratios",
    [("llama-7b", (0.2, 0.3, 0.5)), ("vicuna-7b", (0.2, 0.3, 0.5)), ("llama-13b", (0.5,))],  # tables 1 and 3
)
def test_papers_preset_trains_and_searches_as_the_paper_did(name, ratios, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = checks.load(f"presets/{name}.yaml")
    assert found.table.ratios == ratios
    assert (found.quantize.four_bit, found.quantize.iterations, found.quantize.r) == ("nf4", 1, 8)  # section 4
    training = found.recover
    assert (training.train, training.learning_rate, training.dropout) == ("lora", 3e-4, 0.05)  # appendix B
    assert (training.batch_size, training.micro_batch_size, training.max_length) == (8, 4, 256)
    # appendix D: 10 random starts and 40 iterations make 50 points
    assert (found.search.n_random, found.search.n_trials, found.table.n_trials) == (10, 10 + 40, 10 + 40)


@pytest.mark.parametrize("name, model", [("vicuna-7b", "lmsys/vicuna-7b-v1.5"), ("llama-13b", "yahma/llama-13b-hf")])
def test_papers_preset_fetches_the_model_of_its_appendix(name, model, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert checks.load(f"presets/{name}.yaml").model.source.startswith(f"hub:{model}@")


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("prune__ratoi", 0.3, ["prune.ratoi", "0.3", "unknown key"]),
        ("serch", {}, ["serch", "unknown key"]),
        ("seed", "forty", ["seed", "'forty'", "integer"]),
        ("seed", True, ["seed", "True", "integer"]),
        ("seed", 2**32, ["seed", str(2**32), "less than"]),
        ("device", "tpu", ["device", "'tpu'", "'auto', 'cpu' or 'cuda'"]),
        ("model", None, ["model", "None", "dictionary"]),
        ("model__source", "smollm", ["model.source", "'smollm'", "hub:<org>/<name>@<revision>"]),
        ("model__source", "path:no/such/folder", ["model.source", "no/such/folder does not exist"]),
        ("model__source", "path:tests", ["model.source", "tests/config.json does not exist"]),
        ("model__sha256", "abc", ["model.sha256", "'abc'", "[0-9a-f]{64}"]),
        ("data__alpaca", "path:no/such.jsonl", ["data.alpaca", "no/such.jsonl does not exist"]),
        ("data__alpaca", "path:tests", ["data.alpaca", "tests is no file with a row a line"]),
        ("data__format", "chat", ["data.prompt", "Alpaca's prompt holds no conversation", "set data.prompt to chat"]),
        ("data__prompt", "chat", None),
        ("data__names", {"output": "response", "input": None}, None),
        ("data__names", {"reply": "response"}, ["data.names.reply", "'instruction'"]),
        ("data__names", {"role": "from"}, ["data.names", "'role' is no name in rows of format alpaca"]),
        ("data__names", {"output": None}, ["data.names", "'output' is null"]),
        ("data__benchmarks", "path:params.yaml", ["data.benchmarks", "params.yaml is no folder"]),
        ("data__alpaca", "path:" + "x" * 5000, ["data.alpaca", "cannot be read (File name too long)"]),
        ("data__benchmarks", "hub:a/b@main", ["data.benchmarks", "'hub:a/b@main'", "path:"]),
        ("data__validation_rows", 0, ["data.validation_rows", "0", "greater than 0"]),
        ("prune__ratios", [0.95], ["prune.ratios.0", "0.95", "less than 0.9"]),
        ("prune__ratios", [float("nan")], ["prune.ratios.0", "nan"]),
        ("prune__ratios", [], ["prune.ratios", "at least 1"]),
        ("prune__ratios", [0.2, 0.2], ["prune.ratios", "once"]),
        ("prune__ratios", [0.2, 0], ["prune.ratios", "must ascend; write [0.0, 0.2]"]),
        ("prune__ratios", 0.3, None),
        ("prune__ratios", [0, 0.2], None),
        ("search__bits", [4], ["search.bits", "at least 2"]),
        ("search__bits", [4, 6], ["search.bits.1", "6", "4, 8 or 16"]),
        ("search__bits", [8, 16], ["search.bits", "must begin with 4"]),
        ("search__bits", [8, 4], ["search.bits", "must ascend"]),
        ("search__bits", [4, 8, 16], None),
        ("search__memory", "gpu", ["search.memory", "'gpu'", "'training' or 'inference'"]),
        ("search__seed_bits", ["0.3:4448"], ["seed_bits '0.3:4448' has ratio 0.3", "prune.ratios"]),
        ("search__seed_bits", ["444f"], ["seed_bits '444f' has 16 bits", "search.bits"]),
        ("build__choose", "0.3:4448", ["build.choose: '0.3:4448' has ratio 0.3", "prune.ratios"]),
        ("prune__structures", ["mlp", "embeddings"], ["prune.structures.1", "'embeddings'", "'attention' or 'mlp'"]),
        ("prune__shapes", "square", ["prune.shapes", "'square'", "'free' or 'uniform'"]),
        ("prune__structures", [], ["prune.structures", "at least 1"]),
        ("prune__samples", 0, ["prune", "samples is 0", "set samples"]),
        ("prune__attention_blocks", {"first": -1, "last": 2}, ["prune.attention_blocks.first", "-1", "equal to 0"]),
        ("importance__clusters", 1, ["importance.clusters", "1", "equal to 2"]),
        ("quantize__double_quant", "yes", ["quantize.double_quant", "'yes'", "boolean"]),
        ("quantize__iterations", 17, ["quantize.iterations", "17", "equal to 16"]),
        ("recover__micro_batch_size", 3, ["recover", "batch_size 8", "micro_batch_size 3", "multiple"]),
        ("recover__learning_rate", float("nan"), ["recover.learning_rate", "nan"]),
        ("table__ratios", [0.2, 0.2], ["table.ratios", "once"]),
        ("table__ratios", [], ["table.ratios", "at least 1"]),
        ("table__ratios", [0.2, 0.95], ["table.ratios.1", "0.95", "less than 0.9"]),
        ("ablation__ratio", 0, ["ablation.ratio", "0", "greater than 0"]),
        ("evaluate__tasks", ["boolq", "trivia"], ["evaluate.tasks.1", "'trivia'", "openbookqa"]),
        ("evaluate__tasks", ["boolq", "boolq"], ["evaluate.tasks", "once"]),
        ("evaluate__tasks", ["boolq"], None),
        ("register__alias", "latest", ["register.alias", "MLflow's registry", "champion"]),
        ("register__alias", "v1", ["register.alias", "MLflow's registry"]),
        ("register__alias", "v1a", None),
        ("register__name", "..", ["register.name", "'..'"]),
        ("search__seed_bits", ["8888"], ["seed_bits '8888'", "4 of 4", "max_8bit_fraction allows 25%"]),
        ("search__seed_bits", ["484x"], ["search.seed_bits", "'484x'", "4s, 8s and fs"]),
        ("search__seed_bits", [""], ["search.seed_bits", "4s, 8s and fs"]),
        ("search__seed_bits", ["4448"], None),
        ("search__max_8bit_fraction", 1.5, ["search.max_8bit_fraction", "1.5", "equal to 1"]),
        ("search__memory_budget_gib", -1.0, ["search.memory_budget_gib", "-1.0", "greater than 0"]),
        ("search__memory_budget_gib", float("inf"), ["search.memory_budget_gib", "inf"]),
        (
            "search__objective",
            "boolq",
            ["search.objective", "'boolq'", "'accuracy', 'gold_logprob' or 'response_logprob'"],
        ),
        ("search__average_bits", 3.9, ["search.average_bits", "3.9", "equal to 4"]),
        ("search__average_bits", 16.1, ["search.average_bits", "16.1", "equal to 16"]),
        ("search__average_bits", 4.0, ["search.average_bits", "leaves no unit at 8 bits", "max_8bit_fraction is 0.25"]),
        ("search__average_bits", 4.5, None),
        ("search__patience", -1, ["search.patience", "-1", "equal to 0"]),
        ("search__history", "no/such.json", ["search.history", "no/such.json cannot be read", "No such file"]),
        ("search__history", "params.yaml", ["search.history", "params.yaml is no history", "JSON"]),
        ("search__history", "reports/history.json", ["search.history", "own output", "copy it elsewhere"]),
        ("pareto__objective", "trivia", ["pareto.objective", "'trivia'", "use one of accuracy, gold_logprob"]),
        ("build__choose", "worst", ["build.choose", "'worst'", "best"]),
        ("register__name", "a/b", ["register.name", "'a/b'", "pattern"]),
        ("register__name", "a" * 5000, ["register.name", "at most 250 characters", "aaa... (5,002 characters)"]),
        ("register__alias", "a\n", ["register.alias", "pattern"]),
        ("evaluate__tasks", ["x" * 5000], ["evaluate.tasks.0", "at most 250 characters"]),
        ("seed", "9" * 5000, ["seed", "valid integer", "999... (5,002 characters)"]),
        ("prune__steps", 10**30, ["prune.steps", "less than or equal to 1000000000"]),
        ("search__n_trials", 1e30, ["search.n_trials", "1e+30", "valid integer"]),
        ("search__workers", 0, ["search.workers: must be a number from 1 to 1000, or auto (value 0)"]),
        ("search__workers", True, ["search.workers: must be a number"]),
        ("search__workers", "many", ["search.workers: must be a number", "'many'"]),
        ("search__cluster", "auto", ["search.cluster: 'auto' is named, but workers is 1"]),
        ("search__retries", -1, ["search.retries", "greater than or equal to 0"]),
        ("recover__batch_size", 10**30, ["recover.batch_size", "less than or equal to"]),
        ("prune__max_length", 1, ["prune.max_length", "greater than or equal to 2"]),
        ("recover__max_length", 1, ["recover.max_length", "greater than or equal to 2"]),
        ("prune__structures", ["mlp", "mlp"], ["prune.structures", "once"]),
        ("search__references", ["dense", "dense"], ["search.references", "once"]),
        ("search__seed_bits", ["4448", "4448"], ["search.seed_bits", "once"]),
        ("search__memory_budget_gib", 1e30, ["search.memory_budget_gib", "less than or equal to"]),
        ("quantize__double_quant", "on", ["quantize.double_quant", "'on'", "boolean"]),
        ("model__source", "package:-r==1", ["model.source", "must be of the form"]),
        ("model__source", "package:--no-index==1", ["model.source", "must be of the form"]),
        ("model__source", "package:-e==1", ["model.source", "must be of the form"]),
        ("model__source", "package:--log==/tmp/x", ["model.source", "must be of the form"]),
        ("model__source", "package:a==1\n", ["model.source", "must be of the form"]),
        ("model__source", "package:a ==1", ["model.source", "must be of the form"]),
        ("model__source", "package:a==1.*", ["model.source", "must be of the form"]),
        ("model__source", "package:a==", ["model.source", "must be of the form"]),
        ("model__source", "package:A_b.c-d==1.0rc1+cpu", None),
        ("model__source", "hub:a/b@main\n", ["model.source", "must be of the form"]),
        ("model__source", "hub:../b@main", ["model.source", "must be of the form"]),
        ("model__source", "hub:-a/b@main", ["model.source", "must be of the form"]),
        ("build__choose", "484\n", ["build.choose", "pattern"]),
        ("pareto", {"objective": "accuracy", "x" * 5000: 1}, ["unknown key", "xxx..."]),
    ],
)
def test_fault_names_key_value_and_what_is_allowed(raw_params, key, value, wanted):
    raw = change(raw_params, **{key: value})
    if wanted is None:
        checks.parse(raw)
        return
    lines = refused(raw).splitlines()
    assert lines[0] == "params.yaml has 1 fault:"
    assert len(lines) == 2
    for text in wanted:
        assert text in lines[1]


@pytest.mark.parametrize("key, value", [("data__alpaca", "package:a==1"), ("data__benchmarks", "hub:a/b@main")])
def test_refused_form_of_a_source_is_not_called_allowed(raw_params, key, value):
    message = refused(change(raw_params, **{key: value})).replace(value, "")
    assert key.replace("__", ".") in message
    assert "path:" in message
    assert value.split(":")[0] + ":" not in message


@pytest.mark.parametrize("home", [True, False])
def test_home_folder_is_written_out(raw_params, tmp_path, monkeypatch, home):
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = change(raw_params, data__alpaca="path:~/rows.jsonl" if home else "path:~no-such-user/rows.jsonl")
    if home:
        assert checks.parse(raw).data.alpaca == f"path:{tmp_path}/rows.jsonl"
    else:
        assert "data.alpaca: the home folder that ~ stands for is not known" in refused(raw)


@pytest.mark.parametrize("content", ["[" * 100_000, json.dumps({"results": [GOOD_ROW | {"accuracy": 10**400}]})])
def test_history_that_is_an_attack_is_one_fault(raw_params, tmp_path, content):
    (tmp_path / "history.json").write_text(content)
    assert "search.history: " in refused(change(raw_params, search__history=str(tmp_path / "history.json")))


@pytest.mark.parametrize("name", ["params.yaml", *(f"presets/{path.name}" for path in PRESETS)])
def test_every_key_of_the_file_has_a_comment(name):
    sections, before, bare = [], "", []
    for line in (ROOT / name).read_text().splitlines():
        key, colon, rest = line.strip().partition(":")
        if line.strip() and colon and not line.strip().startswith("#"):
            if not line.startswith(" "):
                sections.append(key)
            value = rest.partition(" #")[0].strip()
            if value and " #" not in rest and not before.strip().startswith("#"):
                bare.append(f"{sections[-1]}.{key}")
        before = line
    assert bare == []


def test_preset_file_holds_every_key():
    for path in PRESETS:
        flat = set(params.flatten(checks.load(path)))
        assert flat == {key.replace("register.", "register_.") for key in overrides.keys()}


@pytest.fixture
def presets(tmp_path):
    """Return a writer of a preset in a folder of its own, beside the default; it returns the file."""
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/default.yaml").write_text((ROOT / "presets/default.yaml").read_text())

    def write(name, text):
        file = tmp_path / "presets" / f"{name}.yaml"
        file.write_text(text)
        return file

    return write


def test_preset_states_only_what_differs_from_its_base(presets, monkeypatch):
    monkeypatch.chdir(ROOT)
    presets("middle", "base: default\nprune: { ratio: 0.3, steps: 2 }\n")
    file = presets("top", "base: middle\nprune: { ratio: 0.35 }\nseed: 3\n")
    expected = change(overrides.read("params.yaml"), prune__ratio=0.35, prune__steps=2, seed=3)
    assert overrides.read(file) == expected
    presets("top", "base: middle\nprune: { ratoi: 0.35 }\nsearch: 3\n")
    message = refused(overrides.read(file))
    assert "prune.ratoi: unknown key" in message and "search: " in message


@pytest.mark.parametrize("base", ["nowhere", "3", "null", "[default]", "own", "../params", "other"])
def test_base_that_is_no_other_preset_is_refused(presets, base):
    presets("other", "base: own\n")
    with pytest.raises(ParamsError, match=r"own\.yaml: base .* is no other preset"):
        overrides.read(presets("own", f"base: {base}\n"))


def test_params_yaml_has_no_base(tmp_path):
    (tmp_path / "params.yaml").write_text("base: default\n")
    with pytest.raises(ParamsError, match="only a file in presets/ may have a base"):
        overrides.read(tmp_path / "params.yaml")


def test_missing_key_and_section_are_named(raw_params):
    del raw_params["quantize"], raw_params["prune"]["ratios"]
    lines = refused(raw_params).splitlines()
    assert lines[0] == "params.yaml has 2 faults:"
    for key in ("quantize", "prune.ratios"):
        assert any(line.startswith(f"  {key}: missing; add it") for line in lines)


FAULTS = {
    "prune__ratoi": 0.3,
    "seed": "forty",
    "prune__ratios": [0.95],
    "data__alpaca": "path:no/such.jsonl",
    "evaluate__tasks": ["boolq", "trivia"],
}
NAMED = ("prune.ratoi", "seed", "prune.ratios.0", "data.alpaca", "evaluate.tasks.1")


@pytest.mark.parametrize(
    "more, named",
    [
        ({}, []),
        ({"search__seed_bits": ["8888"]}, ["seed_bits '8888'"]),
        ({"search__seed_bits": ["8888"], "search__n_trials": 0}, ["seed_bits '8888'", "search.n_trials"]),
        ({"recover__micro_batch_size": 3, "recover__steps": -1}, ["micro_batch_size 3", "recover.steps"]),
        ({"model__source": "gpt2"}, ["model family 'gpt2'"]),
    ],
    ids=["fields", "seed_bits", "seed_bits_beside_another", "micro_batch_beside_another", "family"],
)
def test_all_faults_are_listed_at_once(raw_params, tmp_path, more, named):
    if "model__source" in more:
        more = {"model__source": model_of(tmp_path, more["model__source"])}
    message = refused(change(raw_params, **FAULTS, **more))
    lines = message.splitlines()
    for key in NAMED:
        assert sum(line.startswith(f"  {key}:") for line in lines) == 1
    for text in named:
        assert text in message
    assert lines[0] == f"params.yaml has {len(NAMED) + len(named)} faults:"
    assert len(lines) == 1 + len(NAMED) + len(named)


def test_unmeasured_objective_is_refused(raw_params):
    message = refused(change(raw_params, evaluate__tasks=["boolq", "piqa"], pareto__objective="arc_easy"))
    for text in ("pareto.objective", "'arc_easy'", "response_logprob, boolq, piqa"):
        assert text in message


@pytest.mark.parametrize(
    "content, wanted",
    [
        ({"results": [GOOD_ROW]}, None),
        ({"results": []}, None),
        ({"trials": []}, "KeyError: 'results'"),
        ([GOOD_ROW], "no history"),
        ({"results": [GOOD_ROW | {"bits": "4416"}]}, "'4416' is no string of 4s, 8s and fs"),
        (
            {"results": [GOOD_ROW, {"ratio": 0, "bits": "4484"}]},
            "KeyError: 'accuracy'",
        ),
        ({"results": [GOOD_ROW | {"gold_logprob": None}]}, "gold_logprob None is no number"),
        ({"results": [GOOD_ROW | {"accuracy": "0.5"}]}, "accuracy '0.5' is no number"),
        (
            {"results": [GOOD_ROW | {"response_logprob_stderr": float("nan")}]},
            "response_logprob_stderr nan is no number",
        ),
    ],
)
def test_history_is_checked_when_params_are(raw_params, tmp_path, content, wanted):
    path = tmp_path / "history.json"
    path.write_text(json.dumps(content))
    changed = change(raw_params, search__history=str(path))
    if wanted is None:
        assert checks.parse(changed).search.history == str(path)
        assert params.read_history(str(path)) == content["results"]
    else:
        message = refused(changed)
        assert "search.history" in message and wanted in message


@pytest.mark.parametrize("family", ["gpt2", "gemma", None])
def test_unsupported_family_of_a_folder_is_refused(raw_params, tmp_path, family):
    message = refused(change(raw_params, model__source=model_of(tmp_path, family)))
    for text in ("model.source", repr(family), str(tmp_path), "llama, mistral, qwen2, qwen3", "docs/families.md"):
        assert text in message


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_family_of_a_folder_is_accepted(raw_params, tmp_path, family):
    source = model_of(tmp_path, family)
    assert checks.parse(change(raw_params, model__source=source)).model.source == source


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_document_that_is_no_mapping_is_refused(raw):
    assert "must be a mapping of sections" in refused(raw)


@pytest.mark.parametrize("section, name", [(None, "seed"), ("search", "n_trials"), ("register_", "alias")])
def test_params_are_frozen(default, section, name):
    target = default if section is None else getattr(default, section)
    before = getattr(target, name)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(target, name, 1)
    assert getattr(target, name) == before


def test_lists_become_tuples(default):
    for value in (
        default.evaluate.tasks,
        default.search.seed_bits,
        default.search.references,
        default.prune.structures,
    ):
        assert isinstance(value, tuple)


def test_overrides_replace_values(saved, monkeypatch):
    before = saved.read_text()
    monkeypatch.setenv("QPRUNER_OVERRIDES", json.dumps({"search.n_trials": 77, "seed": 5, "prune.mlp_blocks.first": 1}))
    found = checks.load(saved)
    assert (found.search.n_trials, found.seed, found.prune.mlp_blocks.first) == (77, 5, 1)
    assert saved.read_text() == before
    monkeypatch.delenv("QPRUNER_OVERRIDES")
    assert checks.load(saved).search.n_trials == 12


@pytest.mark.parametrize("key", ["search.n_trails", "nothing.at.all", "seeds"])
def test_unknown_override_is_refused(saved, monkeypatch, key):
    monkeypatch.setenv("QPRUNER_OVERRIDES", json.dumps({key: 1}))
    with pytest.raises(ParamsError, match=f"{key}: unknown key"):
        checks.load(saved)


@pytest.mark.parametrize("value", [None, [1], "text"])
def test_override_of_a_broken_section_is_refused(raw_params, saved, monkeypatch, value):
    saved.write_text(documents.write(change(raw_params, search=value)))
    monkeypatch.setenv("QPRUNER_OVERRIDES", json.dumps({"search.n_trials": 3}))
    with pytest.raises(ParamsError, match="search"):
        checks.load(saved)


@pytest.mark.parametrize("section", ["prune", "quantize", "search", "build", "recover", "data"])
def test_section_without_values_is_one_fault(raw_params, model_folder, section):
    raw = change(raw_params, model__source=f"path:{model_folder}", model__sha256="")  # all that a model is asked, too
    message = refused(change(raw, **{section: None}))
    assert message.count(f"  {section}: ") == 1 and "Traceback" not in message


@pytest.mark.parametrize("content", [b"seed: \xff", None])
def test_file_that_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ParamsError, match=r"params\.yaml (is no valid YAML|cannot be read)"):
        checks.load(path)


def test_missing_file_says_what_to_copy(tmp_path):
    with pytest.raises(ParamsError, match=r"nowhere\.yaml does not exist.*copy presets/default\.yaml"):
        checks.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["seed: [1, 2", "a: b: c", "\t- x"])
def test_invalid_yaml_is_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match="is no valid YAML"):
        checks.load(path)


def test_file_is_named_in_the_message(saved):
    saved.write_text("seed: 1\n")
    with pytest.raises(ParamsError, match=re.escape(f"{saved} has ")):
        checks.load(saved)


def test_flatten_joins_nested_keys(default):
    flat = params.flatten(default.prune, "prune.")
    nested = {"attention_blocks", "mlp_blocks"}
    plain = {f"prune.{name}" for name in params.Prune.model_fields if name not in nested}
    assert flat.keys() == plain | {f"prune.{name}.{end}" for name in nested for end in ("first", "last")}
    assert flat["prune.structures"] == ["attention", "mlp"]
    assert flat["prune.attention_blocks.last"] == -1
    assert params.flatten(default.build) == {"choose": "best", "steps": default.build.steps}


def test_digest_is_a_hash_of_the_sorted_json(default):
    build = f'{{"choose": "best", "steps": {default.build.steps}}}'
    text = f'[{build}, "text", {{"a": [1, 2], "b": null}}, 3]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert params.digest(default.build, "text", {"b": None, "a": [1, 2]}, 3) == expected
    assert params.digest(default.build, "text", {"a": (1, 2), "b": None}, 3) == expected


def test_digest_is_equal_for_equal_params(raw_params, default):
    assert params.digest(checks.parse(raw_params)) == params.digest(default)
    assert re.fullmatch("[0-9a-f]{12}", params.digest(default))


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 43),
        ("prune__ratios", [0.21]),
        ("prune__mlp_blocks", {"first": 1, "last": -1}),
        ("evaluate__tasks", ["piqa", "boolq"]),
        ("search__seed_bits", ["4448"]),
        ("search__memory_budget_gib", 1.0),
        ("quantize__double_quant", True),
        ("register__alias", "other"),
    ],
)
def test_digest_changes_with_any_value(raw_params, default, key, value):
    assert params.digest(checks.parse(change(raw_params, **{key: value}))) != params.digest(default)


def test_digest_tells_order_and_grouping_apart():
    found = [params.digest("a", "b"), params.digest("b", "a"), params.digest("ab"), params.digest(["a", "b"])]
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model:\n  source: hub:a/b@main\n", True),
        ("model: {source: 'hub:a/b@c'}", True),
        ("data:\n  alpaca: 'hub:a/b@main'\n", True),
        ("data:\n  benchmarks: hub # all of them\n", True),
        ("data: { benchmarks: hub }", True),
        (
            "model:\n  source: path:hub\ndata:\n  alpaca: path:x # or hub:a/b@main\n  benchmarks: path:y # or hub\n",
            False,
        ),
        ("model: {source: package:hub==1}", False),
        ("model: 3", False),
        (": : no yaml", False),
        (None, False),
    ],
)
def test_uses_hub_looks_at_the_sources_only(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "params.yaml").write_text(text)
    assert overrides.uses_hub() is expected


def test_missing_file_uses_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert overrides.uses_hub() is False


def test_every_field_is_read_outside_the_params():
    declared_in = {Path(sys.modules[kind.__module__].__file__) for kind in sections()}
    files = [path for path in (ROOT / "pipeline").rglob("*.py") if path not in declared_in]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    unread = {f"{kind.__name__}.{name}" for kind in sections() for name in kind.model_fields if name not in read}
    assert not unread
