"""Tasks beside the search: generated answers, groups, examples, perplexity of a text; all as lm-eval's own model."""

import math

import pytest
import torch
from conftest import tiny_model, write_jsonl
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from pipeline import checks
from pipeline.data import definitions, fetch, further
from pipeline.data.definitions import DefinitionError
from pipeline.data.fetch import FetchError, Sources
from pipeline.params import ParamsError
from pipeline.trial import further as beside
from pipeline.trial.further import Further, GeneratingLM

# In GSM8K's fields and form, written for this project.
GSM8K = [
    {"question": f"A baker sells {n} loaves in the morning and {m} in the evening. How many loaves does she sell?",
     "answer": f"In the morning she sells {n} and in the evening {m}.\nTogether these are {n} + {m} = "
               f"<<{n}+{m}={n + m}>>{n + m} loaves.\n#### {n + m}"}
    for n, m in ((12, 7), (30, 15), (8, 9), (21, 4), (5, 60), (17, 17))
]  # fmt: skip
ANATOMY = [
    {"question": f"Where is the {part}?", "subject": "anatomy", "choices": ["foot", "chest", "hand", "head"],
     "answer": answer}
    for part, answer in (("heart", 1), ("thumb", 2), ("ear", 3), ("heel", 0))
]  # fmt: skip
TEXT = "The river is wide, and nobody has crossed it in winter. " * 12
FEW = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("items")
    for name, items in {"gsm8k": GSM8K, "mmlu_anatomy": ANATOMY}.items():
        write_jsonl(found / f"{name}.jsonl", items[:3])
        write_jsonl(found / f"{name}.fewshot.jsonl", items[3:])
    write_jsonl(found / "text.jsonl", [{"text": TEXT}])
    return found


@pytest.fixture
def short_answers(monkeypatch):
    """A random model never ends an answer; lm-eval's limit of 256 tokens would take long."""
    monkeypatch.setattr(HFLM, "max_gen_toks", 6)


def reference(model, tokenizer, loaded, **changes):
    for task in loaded["tasks"].values():
        task._instances = None
        task.set_fewshot_seed(1234)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, **changes)
    return evaluator.evaluate(lm, dict(loaded), bootstrap_iters=0)


def test_generated_answers_with_examples_are_judged_as_by_lm_evals_own_model(tokenizer, folder, short_answers):
    model, loaded = tiny_model(seed=3), further.load(["gsm8k"], folder, FEW)
    asked, shown = [], []
    figures = beside.run(model, tokenizer, Further(loaded, 0), 256, lambda parts: shown.append(len(parts)) or parts)
    said = [request.resps[0] for request in loaded["tasks"]["gsm8k"].instances]
    expected = reference(model, tokenizer, loaded)
    theirs = loaded["tasks"]["gsm8k"].instances
    for request in theirs:
        asked.append(request.args[0])
        assert request.args[0].count("Question:") == FEW + 1 and request.args[0].count("####") == FEW
    assert said == [request.resps[0] for request in theirs] and len({*said}) > 1
    assert shown == [2]  # three items in batches of two rows of 128 tokens
    for rule in ("strict-match", "flexible-extract"):
        assert figures[f"gsm8k_exact_match_{rule}"] == expected["results"]["gsm8k"][f"exact_match,{rule}"]
    assert all(item["answer"] not in text for item, text in zip(GSM8K, asked, strict=False))


def test_right_answers_are_counted(tokenizer, folder, monkeypatch):
    said = iter(["So it is 19.\n#### 19", "#### 45", "It is 17 loaves."])
    monkeypatch.setattr(GeneratingLM, "generate_until", lambda self, requests: [next(said) for _ in requests])
    loaded = further.load(["gsm8k"], folder, 0)
    figures = beside.run(tiny_model(), tokenizer, Further(loaded, 0), 256)
    assert figures["gsm8k_exact_match_strict-match"] == pytest.approx(2 / 3)
    assert figures["gsm8k_exact_match_flexible-extract"] == 1
    assert figures["gsm8k_exact_match_stderr_flexible-extract"] == 0


def test_multiple_choice_with_examples_equals_lm_evals_own_model(tokenizer, folder):
    model, loaded = tiny_model(), further.load(["mmlu_anatomy"], folder, 1)
    figures = beside.run(model, tokenizer, Further(loaded, 0), 512)
    ours = [request.resps[0] for request in loaded["tasks"]["mmlu_anatomy"].instances]
    expected = reference(model, tokenizer, loaded)
    theirs = loaded["tasks"]["mmlu_anatomy"].instances
    assert ANATOMY[3]["question"] in theirs[0].args[0]  # its sampler takes the first example
    for (value, greedy), request in zip(ours, theirs, strict=True):
        assert value == pytest.approx(request.resps[0][0], abs=1e-4) and greedy == request.resps[0][1]
    assert figures["mmlu_anatomy_acc"] == expected["results"]["mmlu_anatomy"]["acc,none"]


def test_limit_takes_the_first_items(tokenizer, folder):
    loaded = further.load(["mmlu_anatomy"], folder, 0)
    beside.run(tiny_model(), tokenizer, Further(loaded, 2), 512)
    assert [request.doc_id for request in loaded["tasks"]["mmlu_anatomy"].instances] == [0] * 4 + [1] * 4


def test_groups_means_are_lm_evals(tokenizer, tmp_path):
    sizes = {"wmdp_bio": 2, "wmdp_chem": 4, "wmdp_cyber": 3}
    assert definitions.expanded("wmdp")[0] == [*sizes]
    for name, size in sizes.items():
        write_jsonl(tmp_path / f"{name}.jsonl", ANATOMY[:size])
    model, loaded = tiny_model(seed=2), further.load(["wmdp"], tmp_path, 0)
    figures = beside.run(model, tokenizer, Further(loaded, 0), 2048)
    assert figures.keys() >= {"wmdp_acc"}
    expected = reference(model, tokenizer, loaded)["results"]
    assert figures["wmdp_acc"] == pytest.approx(expected["wmdp"]["acc,none"])
    weighted = sum(expected[name]["acc,none"] * size for name, size in sizes.items())
    assert figures["wmdp_acc"] == pytest.approx(weighted / sum(sizes.values()))


def test_group_of_groups_and_tag_stand_for_their_tasks():
    tasks, groups = definitions.expanded("mmlu")
    assert len(tasks) == len({*tasks}) == 57
    assert [group["group"] for group in groups] == [
        "mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"
    ]  # fmt: skip
    assert definitions.expanded("mmlu_stem_tasks") == (sorted(definitions.expanded("mmlu_stem")[0]), [])
    assert definitions.expanded("boolq") == (["boolq"], [])


@pytest.mark.parametrize("window", [1024, 40])
def test_perplexity_of_a_text_is_lm_evals_and_that_of_full_logits(tokenizer, folder, monkeypatch, window):
    monkeypatch.setattr(beside, "WINDOW", window)
    model, loaded = tiny_model(), further.load([], folder, None, text=True)
    figures = beside.run(model, tokenizer, Further(loaded, 0), 512)
    expected = reference(model, tokenizer, loaded, max_length=window)["results"]["text"]
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert figures[f"text_{metric}"] == pytest.approx(expected[f"{metric},none"], rel=1e-4)
    tokens = tokenizer.encode(TEXT)
    if window < len(tokens):
        return
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id, *tokens[:-1]]])).logits[0].log_softmax(-1)
    total = logits.gather(1, torch.tensor(tokens)[:, None]).sum().item()
    assert figures["text_perplexity"] == pytest.approx(math.exp(-total / len(tokens)), rel=1e-4)


def test_answers_that_may_not_fit_the_model_are_refused(tokenizer, folder):
    loaded = further.load(["gsm8k"], folder, 0)
    with pytest.raises(beside.UserError, match="gsm8k lets a model write 256 tokens, and this one holds 200"):
        beside.run(tiny_model(max_position_embeddings=200), tokenizer, Further(loaded, 0), 256)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("gsm8k", None),
        ("mmlu", None),
        ("wikitext", None),
        ("ifeval", None),
        ("gsm8q", "did you mean gsm8k"),
        ("squadv2", "code of its own"),
        ("humaneval", "runs code that the model writes"),
        ("openllm", "changes the settings of its tasks"),
    ],
)
def test_task_that_cannot_be_run_says_why(name, wanted):
    if wanted is None:
        definitions.check_further(name)
        return
    with pytest.raises(DefinitionError, match=wanted):
        definitions.check_further(name)


def refused(raw):
    with pytest.raises(ParamsError) as caught:
        checks.parse(raw)
    return str(caught.value)


def test_params_name_what_further_tasks_lack(raw_params, folder):
    raw_params["evaluate"] |= {"further": ["gsm8k", "trivia", "boolq"], "text": "path:no/such.txt"}
    message = refused(raw_params)
    for text in ("evaluate.further.1: ", "'trivia'", "evaluate.further.2: 'boolq' asks boolq", "evaluate.text"):
        assert text in message
    assert "has no gsm8k.jsonl, gsm8k.fewshot.jsonl" in message
    raw_params["evaluate"] |= {"further": ["gsm8k"], "text": None, "num_fewshot": 0}
    assert "has no gsm8k.jsonl, which" in refused(raw_params)
    raw_params["data"]["benchmarks"] = "hub"
    assert checks.parse(raw_params).evaluate.further == ("gsm8k",)


def test_items_examples_and_text_are_fetched_together(tmp_path, monkeypatch, model_folder, folder):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Add.", "input": "", "output": "3"}] * 2)
    (tmp_path / "book.txt").write_text(TEXT)
    given = {"further": ("gsm8k",), "text": "path:book.txt"}
    told = (f"path:{model_folder}", "path:rows.jsonl", f"path:{folder}", ("mmlu_anatomy",), 1)
    with pytest.raises(FetchError, match="has 3 examples and evaluate.num_fewshot shows 5"):
        fetch.run(Sources(*told, **given))
    assert not fetch.BENCHMARKS.exists()
    fetch.run(Sources(*told, **given, num_fewshot=FEW))
    names = {path.name for path in fetch.BENCHMARKS.iterdir()}
    assert names >= {"gsm8k.jsonl", "gsm8k.fewshot.jsonl", "text.jsonl", "mmlu_anatomy.jsonl"}
    loaded = further.load(["gsm8k"], fetch.BENCHMARKS, FEW, text=True)
    assert set(loaded["tasks"]) == {"gsm8k", "text"}
    assert Further(loaded, 0).measured({"gsm8k_exact_match_strict-match": 1.0}) is False


def test_examples_are_the_same_for_each_model(tokenizer, folder, monkeypatch):
    monkeypatch.setattr(GeneratingLM, "generate_until", lambda self, requests: ["" for _ in requests])
    loaded, asked = further.load(["gsm8k"], folder, FEW), []
    for seed in (0, 1):
        beside.run(tiny_model(seed=seed), tokenizer, Further(loaded, 0), 256)
        asked.append([request.args[0] for request in loaded["tasks"]["gsm8k"].instances])
    assert asked[0] == asked[1]
