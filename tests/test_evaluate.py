import math
import random
import threading
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_model, write_jsonl
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pipeline.data import definitions, tasks
from pipeline.errors import UserError
from pipeline.params import TASKS
from pipeline.trial import evaluate, trees
from pipeline.trial.assemble import merged
from pipeline.trial.evaluate import SharedPrefixLM
from pipeline.trial.trees import Request, Tree

LIMIT = 6
WEIGHT = "base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"


@pytest.fixture(scope="module")
def loaded():
    return tasks.load(TASKS, ROOT / "data/sample/benchmarks")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def with_bos(tokenizer):
    """The tokenizer as Llama's are: it puts a token in front of every text."""
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=1024,
    )
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return other


def reference(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, device="cpu")


def instances(task, limit=LIMIT):
    task._instances = None
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy


@pytest.mark.parametrize("name", TASKS)
def test_loglikelihoods_equal_lm_evals_own_model(model, tokenizer, loaded, name):
    requests = instances(loaded[name])
    expected = reference(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert_same(SharedPrefixLM(model, tokenizer, 512).loglikelihood(requests), expected)


@pytest.mark.parametrize("name", ["piqa", "winogrande"])
def test_loglikelihoods_agree_where_the_tokenizer_adds_a_token(model, with_bos, loaded, name):
    assert with_bos.encode("a")[0] == 0
    requests = instances(loaded[name])
    expected = reference(model, with_bos).loglikelihood(requests, disable_tqdm=True)
    assert_same(SharedPrefixLM(model, with_bos, 512).loglikelihood(requests), expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3"])
def test_loglikelihoods_agree_for_every_family(tokenizer, loaded, family):
    other = tiny_model(family)
    requests = instances(loaded["hellaswag"], 2) + instances(loaded["winogrande"], 2)
    expected = reference(other, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert_same(SharedPrefixLM(other, tokenizer, 512).loglikelihood(requests), expected)


@pytest.mark.parametrize("name", ["hellaswag", "boolq"])
def test_loglikelihoods_do_not_depend_on_how_attention_is_computed(tokenizer, loaded, name):
    plain = tiny_model()
    plain.set_attn_implementation("eager")  # what trials on a CPU use
    requests = instances(loaded[name], 3)
    expected = reference(tiny_model(), tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert_same(SharedPrefixLM(plain, tokenizer, 512).loglikelihood(requests), expected)


def test_texts_longer_than_the_model_lose_their_beginning(tokenizer, loaded):
    short = tiny_model(max_position_embeddings=40)
    requests = instances(loaded["boolq"], 3) + instances(loaded["piqa"], 3)
    assert max(len(tokenizer.encode(request.args[0])) for request in requests) > 40
    expected = reference(short, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert_same(SharedPrefixLM(short, tokenizer, 512).loglikelihood(requests), expected)


def test_empty_context_stands_for_the_first_token(model, tokenizer):
    requests = [SimpleNamespace(args=("", text)) for text in ("Water boils.", "Water", " and")]
    expected = reference(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert_same(SharedPrefixLM(model, tokenizer, 512).loglikelihood(requests), expected)


def test_greedy_choice_is_recognized(model, tokenizer):
    context = tokenizer.encode("Water boils when it is")
    best = model(torch.tensor([context])).logits[0, -1].argmax().item()
    lm = SharedPrefixLM(model, tokenizer, 512)
    found = lm._loglikelihood_tokens([(None, context, [best]), (None, context, [(best + 1) % 512])])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_random_requests_equal_one_forward_pass_each(model, tokenizer, seed, batch_tokens):
    generator = random.Random(seed)
    asked = []
    for _ in range(12):
        context = [generator.randrange(2, 512) for _ in range(generator.randint(1, 15))]
        for _ in range(generator.randint(1, 4)):
            own = context if generator.random() < 0.7 else context[: generator.randint(1, len(context))] + [7]
            asked.append((None, own, [generator.randrange(2, 5) for _ in range(generator.randint(1, 6))]))
    found = SharedPrefixLM(model, tokenizer, batch_tokens)._loglikelihood_tokens(asked)
    for (_, context, continuation), (value, _) in zip(asked, found, strict=True):
        with torch.no_grad():
            logprob = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        wanted = [logprob[len(context) - 1 + i, token].item() for i, token in enumerate(continuation)]
        assert value == pytest.approx(sum(wanted), abs=1e-4)


@pytest.fixture(scope="module")
def scores(model, tokenizer, loaded):
    return evaluate.run(model, tokenizer, loaded, LIMIT, 512)


def test_accuracies_equal_lm_evals_own_model(model, tokenizer, loaded, scores):
    for task in loaded.values():
        task._instances = None
    every = {"tasks": dict(loaded), "groups": {}, "group_map": {}}
    expected = evaluator.evaluate(reference(model, tokenizer), every, limit=LIMIT, bootstrap_iters=1)["results"]
    for name in TASKS:
        assert scores.accuracy[name] == expected[name][f"{definitions.metric(name)},none"]
        assert scores.stderr[name] == pytest.approx(expected[name][f"{definitions.metric(name)}_stderr,none"])
    assert scores.other.keys() == {
        "piqa_acc_norm", "hellaswag_acc", "arc_easy_acc_norm", "arc_challenge_acc", "openbookqa_acc",
    }  # fmt: skip
    for key, value in scores.other.items():
        name, metric = key.split("_acc")
        assert value == expected[name][f"acc{metric},none"]


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_result_does_not_depend_on_the_batches(model, tokenizer, loaded, scores, batch_tokens):
    other = evaluate.run(model, tokenizer, loaded, LIMIT, batch_tokens)
    assert (other.accuracy, other.other, other.items) == (scores.accuracy, scores.other, scores.items)
    assert other.gold_logprob == pytest.approx(scores.gold_logprob, abs=1e-5)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def workers(monkeypatch):
    """The threads that passes ran in."""
    seen, score = set(), evaluate.score

    def noted(*arguments):
        seen.add(threading.get_ident())
        return score(*arguments)

    monkeypatch.setattr(evaluate, "score", noted)
    return seen


@pytest.mark.parametrize(("cores", "batch_tokens"), [(2, 200), (3, 500), (64, 2000)])
def test_passes_side_by_side_give_the_same_bits(
    model, tokenizer, loaded, threads, workers, cores, batch_tokens, monkeypatch
):
    threads(1)
    expected = evaluate.run(model, tokenizer, loaded, LIMIT, batch_tokens)
    assert workers == {threading.get_ident()}
    workers.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    found = evaluate.run(model, tokenizer, loaded, LIMIT, batch_tokens)
    if cores == len(workers):
        assert found == expected
    else:  # several cores share a product, which may round otherwise
        assert found.accuracy == expected.accuracy
        assert found.gold_logprob == pytest.approx(expected.gold_logprob, abs=1e-6)
    assert threading.get_ident() not in workers and 2 <= len(workers) <= cores


def test_cores_are_shared_out_and_given_back(model, threads):
    threads(5)
    asked = [(None, [5, 6, index], [7]) for index in range(4)]
    lm = SharedPrefixLM(model, None, 1)
    with evaluate.side_by_side(model, 2) as mapped:
        assert list(mapped(lambda _: torch.get_num_threads(), range(2))) == [2, 2]
    assert torch.get_num_threads() == 5
    lm._loglikelihood_tokens(asked)
    assert torch.get_num_threads() == 5


def test_an_error_in_a_pass_is_raised_and_the_cores_are_given_back(model, threads, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory")

    threads(2)
    monkeypatch.setattr(evaluate, "score", fails)
    lm = SharedPrefixLM(model, None, 1)
    with pytest.raises(RuntimeError, match="no memory"):
        lm._loglikelihood_tokens([(None, [5], [6]), (None, [7, 8], [9])])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("quantized", "passes"), [(True, 4), (False, 1)])
def test_quantized_modules_and_single_passes_stay_in_one_thread(threads, quantized, passes):
    config = SimpleNamespace(**({"quantization_config": {}} if quantized else {}))
    threads(2)
    with evaluate.side_by_side(SimpleNamespace(config=config, device=torch.device("cpu")), passes) as mapped:
        assert mapped is map
        assert torch.get_num_threads() == 2


def test_standard_errors_follow_the_formula(scores):
    assert any(scores.stderr.values())
    for name, accuracy in scores.accuracy.items():
        assert scores.stderr[name] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (LIMIT - 1)))


def test_means_weigh_the_tasks_equally(scores):
    assert scores.mean == pytest.approx(fmean(scores.accuracy.values()))
    total = sum(error * error for error in scores.stderr.values())
    assert scores.mean_stderr == pytest.approx(math.sqrt(total) / 7)
    assert scores.items == 7 * LIMIT


def test_one_item_has_no_standard_error(model, tokenizer, loaded):
    found = evaluate.run(model, tokenizer, {"piqa": loaded["piqa"]}, 1, 512)
    assert found.accuracy["piqa"] in (0, 1)
    assert (found.stderr["piqa"], found.mean_stderr, found.items) == (0, 0, 1)


def test_limit_zero_scores_every_item(model, tokenizer, loaded):
    assert evaluate.run(model, tokenizer, {"openbookqa": loaded["openbookqa"]}, 0, 512).items == 64


@pytest.mark.parametrize("name", ["piqa", "hellaswag"])
def test_items_left_out_and_items_scored_make_up_the_whole(model, tokenizer, loaded, name):
    one = {name: loaded[name]}
    count, skip = len(loaded[name].eval_docs), 5
    first, rest, every = (
        evaluate.run(model, tokenizer, one, limit, 512, skip=left_out)
        for limit, left_out in ((skip, 0), (0, skip), (0, 0))
    )
    assert (first.items, rest.items, every.items) == (skip, count - skip, count)
    for figure in ("gold_logprob", "mean"):
        parts = skip * getattr(first, figure) + (count - skip) * getattr(rest, figure)
        assert parts / count == pytest.approx(getattr(every, figure), abs=1e-6)
    assert first.gold_logprob != pytest.approx(rest.gold_logprob, abs=1e-3)


def test_limit_counts_from_the_first_item_that_is_not_left_out(model, tokenizer, loaded):
    one = {"piqa": loaded["piqa"]}
    parts = [evaluate.run(model, tokenizer, one, 3, 512, skip=skip).gold_logprob for skip in (0, 3)]
    assert sum(parts) / 2 == pytest.approx(evaluate.run(model, tokenizer, one, 6, 512).gold_logprob, abs=1e-6)


def test_task_without_items_after_those_left_out_is_refused(model, tokenizer, loaded):
    with pytest.raises(UserError, match=r"piqa: no item left after the first 64; lower evaluate\.limit"):
        evaluate.run(model, tokenizer, {"piqa": loaded["piqa"]}, 3, 512, skip=64)


@pytest.mark.parametrize(
    "given, expected",
    [((10, 0), range(10)), ((10, 3), range(3)), ((10, 3, 8), range(8, 10)), ((10, 0, 8), range(8, 10)),
     ((10, 20), range(10)), ((10, 3, 10), range(10, 10))],
)  # fmt: skip
def test_items_by_hand(given, expected):
    assert evaluate.items(*given) == expected


def test_adapters_count(model, tokenizer, loaded):
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    one = {"piqa": loaded["piqa"]}
    plain = evaluate.run(model, tokenizer, one, LIMIT, 512)
    assert evaluate.run(adapted, tokenizer, one, LIMIT, 512).gold_logprob == pytest.approx(plain.gold_logprob, abs=1e-6)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert abs(evaluate.run(adapted, tokenizer, one, LIMIT, 512).gold_logprob - plain.gold_logprob) > 1e-3


def test_merged_adapters_score_alike_and_leave_the_weights_as_they_were(tokenizer, loaded):
    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny_model(), LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "down_proj"])
    ).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    apart = evaluate.run(adapted, tokenizer, {"piqa": loaded["piqa"]}, LIMIT, 512)
    with merged(adapted):
        together = evaluate.run(adapted, tokenizer, {"piqa": loaded["piqa"]}, LIMIT, 512)
        assert not torch.equal(adapted.state_dict()[WEIGHT], before[WEIGHT])
    assert together.gold_logprob == pytest.approx(apart.gold_logprob, abs=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())
    assert evaluate.run(adapted, tokenizer, {"piqa": loaded["piqa"]}, LIMIT, 512).gold_logprob == apart.gold_logprob


def test_every_item_is_told(model, tokenizer, loaded, scores):
    for name, values in scores.by_item.items():
        assert len(values) == len(evaluate.items(len(loaded[name].eval_docs), LIMIT))
        assert scores.accuracy[name] == pytest.approx(sum(metric for metric, _ in values) / len(values))
    means = [sum(logprob for _, logprob in values) / len(values) for values in scores.by_item.values()]
    assert scores.gold_logprob == pytest.approx(sum(means) / len(means))


@pytest.mark.parametrize("method", ["generate_until", "loglikelihood_rolling"])
def test_other_kinds_of_tasks_are_refused(model, tokenizer, method):
    with pytest.raises(NotImplementedError, match="multiple-choice"):
        getattr(SharedPrefixLM(model, tokenizer, 512), method)([])


def test_tree_mask_by_hand():
    # a tree: two tokens of prefix, two of branch 0, one of branch 1; a second tree of one token; one of padding
    found = trees.tree_mask(torch.tensor([[0, 0, 0, 0, 0, 1, -2]]), torch.tensor([[-1, -1, 0, 0, 1, -1, -1]]))
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert found.int().tolist() == [expected]


def test_tree_mask_of_one_sequence_is_causal():
    whole = torch.full((2, 5), -1)
    assert torch.equal(trees.tree_mask(torch.zeros(2, 5), whole), torch.ones(2, 5, 5).tril().bool())


def test_additive_mask_hides_what_the_boolean_one_hides():
    mask = torch.tensor([[[True, False], [True, True]]])
    weights = (torch.zeros(1, 1, 2, 2) + trees.additive(mask, torch.float32)).softmax(-1)
    assert weights.tolist() == [[[[1.0, 0.0], [0.5, 0.5]]]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_score_does_not_depend_on_the_kind_of_attention(tokenizer, loaded, attention):
    model = tiny_model()
    requests = [one for name in ("hellaswag", "boolq") for one in instances(loaded[name])]
    expected = reference(model, tokenizer).loglikelihood(requests)
    model.set_attn_implementation(attention)
    assert_same(SharedPrefixLM(model, tokenizer, 512).loglikelihood(requests), expected)


@pytest.mark.parametrize(
    "requests, expected",
    [
        ([], []),
        ([((1, 2, 3), 2)], [Tree((0,), 2, 2)]),
        # two continuations of one context
        ([((1, 2, 3, 4, 10, 11), 4), ((1, 2, 3, 4, 20, 21, 22), 4)], [Tree((0, 1), 4, 4 + 1 + 2)]),
        # continuations of a single token feed nothing of their own
        ([((1, 2, 3, 4, 10), 4), ((1, 2, 3, 4, 20), 4)], [Tree((0, 1), 4, 4)]),
        # a single token beside a longer continuation, either way round
        ([((1, 2, 3, 4, 10), 4), ((1, 2, 3, 4, 10, 11), 4)], [Tree((0, 1), 4, 5)]),
        ([((1, 2, 3, 4, 10, 11), 4), ((1, 2, 3, 4, 10), 4)], [Tree((0, 1), 4, 5)]),
        # the same request twice
        ([((1, 2, 3), 2), ((1, 2, 3), 2)], [Tree((0, 1), 2, 2)]),
        # contexts that differ in their last token, as winogrande's
        ([((1, 2, 3, 5, 7, 8, 9), 4), ((1, 2, 3, 6, 7, 8, 9), 4)], [Tree((0, 1), 3, 3 + 3 + 3)]),
        # contexts that differ early share too little
        ([((1, 5, 3, 4, 7, 8), 4), ((1, 6, 3, 4, 7, 8), 4)], [Tree((0,), 5, 5), Tree((1,), 5, 5)]),
        # a first token that all texts begin with is no kinship, nor is what one long context shares with a short one
        (
            [((0, 2, 3, 4, 10), 4), ((0, 2, 3, 4, 11), 4), ((0, 5, 6, 7, 10), 4), ((0, 5, 6, 7, 11), 4)],
            [Tree((0, 1), 4, 4), Tree((2, 3), 4, 4)],
        ),
        ([((0, 2, 10), 2), ((0, 3, 4, 5, 10), 4)], [Tree((0,), 2, 2), Tree((1,), 4, 4)]),
        # two questions
        (
            [((1, 2, 3, 10), 3), ((1, 2, 3, 11), 3), ((9, 8, 7, 12), 3), ((9, 8, 7, 13), 3)],
            [Tree((0, 1), 3, 3), Tree((2, 3), 3, 3)],
        ),
        # only neighbours are grouped
        (
            [((1, 2, 3, 10), 3), ((9, 8, 7, 12), 3), ((1, 2, 3, 11), 3)],
            [Tree((0,), 3, 3), Tree((1,), 3, 3), Tree((2,), 3, 3)],
        ),
    ],
)
def test_trees_by_hand(requests, expected):
    assert trees.trees([Request(*request) for request in requests]) == expected


def test_tree_grows_no_larger_than_its_mask_can_bear():
    primer = tuple(range(150))
    found = trees.trees([Request((*primer, 1000 + index, *range(60), 7), 151) for index in range(100)])
    assert len(found) > 1 and all(tree.size <= 1024 for tree in found)
    assert [index for tree in found for index in tree.requests] == list(range(100))
    long = Request(tuple(range(3000)), 2990)
    assert [tree.size for tree in trees.trees([long])] == [2999]


@pytest.mark.parametrize("family, changes", [("mistral", {"sliding_window": 8}), ("gemma3_text", {}), ("gemma2", {})])
@pytest.mark.parametrize("attention", ["eager", None])
def test_text_beyond_a_sliding_window_is_scored_as_alone(tokenizer, family, changes, attention):
    model = tiny_model(family, **changes)
    if attention:
        model.set_attn_implementation(attention)  # what trials on a CPU use
    context = list(range(5, 25))
    asked = [(None, context, [7, 8]), (None, context, [9, 10, 11]), (None, [3, 4], [9])]
    found = SharedPrefixLM(model, tokenizer, 512)._loglikelihood_tokens(asked)
    for (_, context, continuation), (value, _) in zip(asked, found, strict=True):
        with torch.no_grad():
            logprob = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        wanted = [logprob[len(context) - 1 + i, token].item() for i, token in enumerate(continuation)]
        assert value == pytest.approx(sum(wanted), abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 256, 600, 10_000])
def test_batches_pack_each_tree_once_into_rows_that_hold_it(batch_tokens):
    generator = random.Random(0)
    every = [Tree((index, -1), 4, generator.randint(4, 700)) for index in range(60)]
    found = list(trees.batches(every, batch_tokens))
    assert sorted(tree.requests[0] for _, rows in found for row in rows for tree in row) == list(range(60))
    for length, rows in found:
        assert length in (128, 256, 512, 1024)
        assert len(rows) == 1 or len(rows) * length <= batch_tokens
        assert all(length // 2 < max(tree.size for tree in row) or length == 128 for row in rows)
        assert all(sum(tree.size for tree in row) <= length for row in rows)


def softmax(values, index):
    return values[index] - math.log(sum(math.exp(value) for value in values))


@pytest.mark.parametrize(
    "metric, multiple_input, gold, values",
    [
        ("acc", 0, 1, [-1.0, -2.0, -0.5]),
        ("acc", 0, "bb", [-1.0, -2.0, -0.5]),
        ("acc_norm", 0, 1, [-1.0, -2.0 / 2, -0.5 / 2]),
        ("acc_bytes", 0, 1, [-1.0, -2.0 / 2, -0.5 / 3]),
        ("acc_norm", 0, "1", None),
        ("acc", 2, 1, [-1.0, -2.0, -0.5]),
        ("acc", 0, [1], [-1.0, -2.0, -0.5]),
    ],
)
def test_gold_logprob_by_hand(metric, multiple_input, gold, values):
    choices = ["a", "bb", "é" + "c"]  # 1, 2 and 2 characters; 1, 2 and 3 bytes
    task = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        multiple_input=multiple_input,
        doc_to_choice=lambda document: choices,
        doc_to_text=lambda document: document["gold"] if multiple_input else "the question",
        doc_to_target=lambda document: "the ending" if multiple_input else document["gold"],
    )
    sample = {"doc": {"gold": gold}, "filtered_resps": [(-1.0, False), (-2.0, False), (-0.5, True)]}
    if values is None:
        with pytest.raises(ValueError):
            evaluate.gold_logprob(task, sample, metric)
        return
    assert evaluate.gold_logprob(task, sample, metric) == pytest.approx(softmax(values, 1))


@pytest.mark.parametrize("name", TASKS)
def test_gold_logprob_of_a_run_equals_one_from_plain_forward_passes(model, tokenizer, loaded, name):
    task = loaded[name]
    found = evaluate.run(model, tokenizer, {name: task}, 2, 512)
    requests = instances(task, 2)
    width = len(requests) // 2
    logprobs = []
    for start in (0, width):
        values = []
        for request in requests[start : start + width]:
            context, continuation = request.args
            tokens = tokenizer.encode(context + continuation)
            first = len(tokenizer.encode(context))
            with torch.no_grad():
                logprob = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            value = sum(logprob[i - 1, tokens[i]].item() for i in range(first, len(tokens)))
            length = len(continuation[1:]) if definitions.metric(name) == "acc_norm" else 1
            values.append(value / length)
        document = requests[start].doc
        gold = task.doc_to_text(document) if name == "winogrande" else int(task.doc_to_target(document))
        logprobs.append(softmax(values, gold))
    assert found.gold_logprob == pytest.approx(fmean(logprobs), abs=1e-4)
    assert found.gold_logprob_stderr == pytest.approx(abs(logprobs[0] - logprobs[1]) / 2, abs=1e-4)


def test_error_of_the_mean_gold_logprob_joins_those_of_the_tasks(model, tokenizer, loaded):
    both = evaluate.run(model, tokenizer, loaded, LIMIT, 512)
    alone = [evaluate.run(model, tokenizer, {name: loaded[name]}, LIMIT, 512) for name in loaded]
    expected = math.sqrt(sum(one.gold_logprob_stderr**2 for one in alone)) / len(alone)
    assert both.gold_logprob_stderr == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("values, expected", [([-1.0], 0.0), ([-1.0, -3.0], 1.0), ([1.0, 2.0, 3.0, 4.0], 5 / 12)])
def test_squared_error_of_a_mean_by_hand(values, expected):
    assert evaluate.squared_error(values) == pytest.approx(expected)


def test_items_that_trials_saw_are_left_out_unless_none_would_be_left(loaded):
    fewest = min(len(task.eval_docs) for task in loaded.values())
    assert evaluate.seen(loaded, fewest - 1) == fewest - 1
    assert evaluate.seen(loaded, fewest) == 0
    assert evaluate.seen(loaded, 0) == 0


def test_task_that_lm_eval_defines_with_examples_is_asked_without(model, tokenizer, tmp_path, monkeypatch):
    name = "leaderboard_bbh_boolean_expressions"
    assert definitions.settings(name)["num_fewshot"] == 3
    questions = {"True and True is": "True", "not True is": "False", "True or False is": "True", "not False is": "True"}
    items = [{"input": question, "target": answer} for question, answer in questions.items()]
    write_jsonl(tmp_path / f"{name}.jsonl", items)
    asked, own = [], SharedPrefixLM.loglikelihood

    def noted(self, requests, **options):
        asked.extend(request.args for request in requests)
        return own(self, requests, **options)

    monkeypatch.setattr(SharedPrefixLM, "loglikelihood", noted)
    assert evaluate.run(model, tokenizer, tasks.load([name], tmp_path), 0, 512).items == 4
    prompt = "Evaluate the result of a random Boolean expression.Q: {}\nA:"  # the definition's, without a blank
    assert asked == [(prompt.format(one), f" {choice}") for one in questions for choice in ("False", "True")]
