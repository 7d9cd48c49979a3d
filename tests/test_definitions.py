import math
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from conftest import ROOT, tiny_model, write_jsonl
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from pipeline import checks, params
from pipeline.data import definitions, fetch, tasks
from pipeline.data.definitions import DefinitionError
from pipeline.params import ParamsError
from pipeline.trial import evaluate

ITEMS = {
    "sciq": [
        {"question": "What do bees make?", "support": "Bees fill their combs with honey.", "correct_answer": "honey",
         "distractor1": "silk", "distractor2": "milk", "distractor3": "salt"},
        {"question": "What does ice become?", "support": "", "correct_answer": "water",
         "distractor1": "iron", "distractor2": "wood", "distractor3": "glass"},
        {"question": "Where do roots grow?", "support": "Roots hold a plant.", "correct_answer": "in the ground",
         "distractor1": "in the air", "distractor2": "on the moon", "distractor3": "on a plate"},
    ],
    "copa": [
        {"premise": "The glass fell off the table.", "choice1": "It broke.", "choice2": "It sang.",
         "question": "effect", "idx": 0, "label": 0},
        {"premise": "The man wore a coat.", "choice1": "It was hot.", "choice2": "It was cold.",
         "question": "cause", "idx": 1, "label": 1},
    ],
    "mmlu_anatomy": [
        {"question": "Where is the heart?", "subject": "anatomy", "choices": ["foot", "chest", "hand", "ear"],
         "answer": 1},
    ],
    "lambada_openai": [
        {"text": "She opened her umbrella because of the rain"},
        {"text": "He poured the hot tea into the cup"},
        {"text": "At night the sky is full of stars"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("items")
    for name, items in ITEMS.items():
        write_jsonl(found / f"{name}.jsonl", items)
    return found


@pytest.fixture(scope="module")
def loaded(folder):
    return tasks.load(ITEMS, folder)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    "task, file",
    [
        ("boolq", "super_glue/boolq/default.yaml"),
        ("copa", "super_glue/copa/default.yaml"),
        ("lambada_openai", "lambada/lambada_openai.yaml"),
        ("mmlu_anatomy", "mmlu/default/mmlu_anatomy.yaml"),
    ],
)
def test_definition_is_found_by_its_name(task, file):
    assert definitions.path(task) == definitions.folder() / file


def test_the_sevens_files_are_those_of_the_index():
    for task in params.TASKS:
        assert definitions._index()[task] == ("task", definitions.path(task))


def test_included_settings_are_overlaid_by_own():
    found = definitions.settings("mmlu_anatomy")
    assert (found["dataset_path"], found["dataset_name"]) == ("cais/mmlu", "anatomy")
    assert found["output_type"] == "multiple_choice"


@pytest.mark.parametrize(
    "task, metric",
    [
        ("boolq", "acc"),
        ("hellaswag", "acc_norm"),
        ("arc_easy", "acc"),  # which lists acc_norm too
        ("sciq", "acc"),
        ("lambada_openai", "acc"),  # which lists perplexity first
        ("leaderboard_bbh_navigate", "acc_norm"),
        ("webqs", "exact_match"),
    ],
)
def test_metric_is_the_papers_or_accuracy_or_the_first_mean(task, metric):
    assert definitions.metric(task) == metric


@pytest.mark.parametrize(
    "task, wanted",
    [
        ("scig", ["ships no task 'scig'", "did you mean sciq", "boolq, piqa"]),
        ("gsm8k", ["'gsm8k'", "the text a model writes", "generate_until", "multiple_choice or loglikelihood"]),
        ("wikitext", ["'wikitext'", "perplexity of whole texts", "loglikelihood_rolling"]),
        ("squadv2", ["'squadv2'", "code of its own"]),
        ("mmlu", ["'mmlu' is a group", "name the tasks in it"]),
        ("cola", ["'cola' reports mcc", "no accuracy"]),
        ("crows_pairs_english", ["likelihood_diff, pct_stereotype", "no accuracy"]),
    ],
)
def test_task_that_cannot_be_run_is_refused_with_the_other_faults(raw_params, task, wanted):
    with pytest.raises(DefinitionError) as caught:
        definitions.check(task)
    raw_params["evaluate"]["tasks"] = ["boolq", task, "sciq"]
    raw_params["data"]["benchmarks"], raw_params["seed"] = "hub", "forty"
    with pytest.raises(ParamsError) as refused:
        checks.parse(raw_params)
    lines = str(refused.value).splitlines()
    assert lines[0] == "params.yaml has 2 faults:"
    (line,) = [line for line in lines if line.startswith("  evaluate.tasks.1: ")]
    for text in wanted:
        assert text in str(caught.value) and text in line


def test_checking_a_task_does_not_import_lm_eval():
    code = """
import sys
from pipeline.data import definitions
definitions.check("sciq")
assert not {"lm_eval", "torch"} & {*sys.modules}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_objective_may_be_any_task_that_is_measured(raw_params):
    raw_params["data"]["benchmarks"] = "hub"
    raw_params["evaluate"]["tasks"], raw_params["pareto"]["objective"] = ["piqa", "sciq"], "sciq"
    assert checks.parse(raw_params).pareto.objective == "sciq"


def test_requests_are_made_of_the_raw_fields(loaded):
    def pairs(name):
        task = loaded[name]
        task._instances = None
        task.build_all_requests(limit=1, rank=0, world_size=1)
        return [instance.args for instance in task.instances]

    question = "Bees fill their combs with honey.\nQuestion: What do bees make?\nAnswer:"
    assert pairs("sciq") == [(question, f" {choice}") for choice in ("silk", "milk", "salt", "honey")]
    assert pairs("lambada_openai") == [("She opened her umbrella because of the", " rain")]
    assert [choice for _, choice in pairs("mmlu_anatomy")] == [" A", " B", " C", " D"]


def test_scores_equal_lm_evals_own_model(model, tokenizer, loaded):
    found = evaluate.run(model, tokenizer, loaded, 0, 256)
    for task in loaded.values():
        task._instances = None
    reference = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
    expected = evaluator.evaluate(
        reference, {"tasks": dict(loaded), "groups": {}, "group_map": {}}, bootstrap_iters=1
    )  # fmt: skip
    for name in ITEMS:
        assert found.accuracy[name] == expected["results"][name]["acc,none"]
    assert found.items == sum(map(len, ITEMS.values()))
    assert "sciq_acc_norm" in found.other and "lambada_openai_perplexity" not in found.other
    logprobs = {}
    for name, gold in (("sciq", [3, 3, 3]), ("copa", [0, 1]), ("mmlu_anatomy", [1])):
        values = [[pair[0] for pair in sample["filtered_resps"]] for sample in expected["samples"][name]]
        logprobs[name] = fmean(
            row[index] - math.log(sum(math.exp(value) for value in row))
            for row, index in zip(values, gold, strict=True)
        )
    logprobs["lambada_openai"] = fmean(
        sample["filtered_resps"][0][0] for sample in expected["samples"]["lambada_openai"]
    )
    assert found.gold_logprob == pytest.approx(fmean(logprobs.values()), abs=1e-4)


def test_gold_logprob_without_choices_is_the_likelihood_of_the_last_word(model, tokenizer, loaded):
    found = evaluate.run(model, tokenizer, {"lambada_openai": loaded["lambada_openai"]}, 0, 256)
    values = []
    for item in ITEMS["lambada_openai"]:
        context, _, word = item["text"].rpartition(" ")
        tokens, start = tokenizer.encode(item["text"]), len(tokenizer.encode(context))
        assert tokenizer.decode(tokens[start:]) == f" {word}"
        with torch.no_grad():
            logprob = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        values.append(sum(float(logprob[i - 1, tokens[i]]) for i in range(start, len(tokens))))
    assert found.gold_logprob == pytest.approx(fmean(values), abs=1e-4)


def test_fetch_takes_any_tasks_items_as_they_are(folder):
    for name, items in ITEMS.items():
        assert fetch.benchmark(f"path:{folder}", name) == (items, [])


@pytest.mark.parametrize(
    "task, lost, source", [("sciq", "support", "allenai/sciq"), ("lambada_openai", "text", "EleutherAI/lambada_openai")]
)
def test_items_that_a_definition_cannot_ask_are_refused(tmp_path, task, lost, source):
    items = [dict(item) for item in ITEMS[task]]
    for item in items:
        item["other"] = item.pop(lost)
    write_jsonl(tmp_path / f"{task}.jsonl", items)
    with pytest.raises(fetch.FetchError, match=rf"{task}\.jsonl: lm-eval's .*'{lost}'.*raw fields of {source}"):
        fetch.benchmark(f"path:{tmp_path}", task)


def test_missing_items_of_another_task_name_their_data_set(tmp_path):
    with pytest.raises(fetch.FetchError, match=r"sciq\.jsonl does not exist.*fields: those of allenai/sciq"):
        fetch.benchmark(f"path:{tmp_path}", "sciq")


def test_items_from_a_hub_are_the_split_that_lm_eval_scores(monkeypatch, tmp_path):
    import datasets

    asked = []

    def stand_in(path, name, **options):
        asked.append((path, name, options))
        return ITEMS["mmlu_anatomy"]

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", stand_in)
        patched.setattr(tasks, "faults", lambda task, items: [""] * len(items))
        assert fetch.benchmark("hub", "mmlu_anatomy") == (ITEMS["mmlu_anatomy"], [])
    assert asked == [("cais/mmlu", "anatomy", {"split": "test"})]


def test_data_set_options_go_along_but_remote_code_does_not():
    assert tasks.hub_source("arithmetic_1dc").options.keys() == {"data_files"}
    assert "trust_remote_code" in definitions.settings("xnli_va")["dataset_kwargs"]
    assert tasks.hub_source("xnli_va").options == {}


def test_items_of_a_definition_made_by_code_must_be_local():
    with pytest.raises(DefinitionError, match=r"names no data set; use path:<folder> with cieacova_choice\.jsonl"):
        tasks.hub_source("cieacova_choice")


def test_no_bar_of_lm_evals_is_shown_and_ours_are(folder):
    code = f"""
from pipeline.__main__ import _quiet_environment
_quiet_environment()
from pipeline import console
from pipeline.data import tasks
tasks.load(["sciq"], {str(folder)!r})["sciq"].build_all_requests(rank=0, world_size=1)
list(console.progress([1], "ours"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert [
        line for line in done.stderr.replace("\r", "\n").splitlines() if "it/s" in line and "ours" not in line
    ] == []
    assert "ours: 100%" in done.stderr
