import json
import math
from collections import Counter

import pytest
from conftest import ROOT

from pipeline.data import alpaca, fetch, tasks

SAMPLE = ROOT / "data/sample"
TASKS = tuple(tasks.FIELDS)
QUESTION = {
    "boolq": "question", "piqa": "goal", "hellaswag": "ctx_a", "winogrande": "sentence", "arc_easy": "question",
    "arc_challenge": "question", "openbookqa": "question_stem",
}  # fmt: skip


def items(task):
    return [json.loads(line) for line in (SAMPLE / f"benchmarks/{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def gold(task, item):
    if task == "winogrande":
        return item["answer"]
    return item["label"] if "label" in item else item["choices"]["label"].index(item["answerKey"])


def choices(task, item):
    if task == "boolq":
        return ["no", "yes"]
    if "endings" in item:
        return item["endings"]
    if "choices" in item:
        return item["choices"]["text"]
    return [item["sol1"], item["sol2"]] if task == "piqa" else [item["option1"], item["option2"]]


def plain(text):
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


@pytest.fixture(scope="module")
def rows():
    return alpaca.read(SAMPLE / "alpaca.jsonl")


def test_alpaca_has_enough_rows_with_and_without_input(rows):
    assert len(rows) >= 300
    with_input = sum(bool(row["input"]) for row in rows)
    assert min(with_input, len(rows) - with_input) >= 50


def test_alpaca_rows_are_valid_to_fetch(rows):
    assert fetch.alpaca(f"path:{SAMPLE / 'alpaca.jsonl'}") == (rows, [])


def test_alpaca_rows_are_unique(rows):
    assert len({(plain(row["instruction"]), plain(row["input"])) for row in rows}) == len(rows)
    assert len({plain(row["output"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("task", TASKS)
def test_benchmark_has_enough_items_with_every_field(task):
    found = items(task)
    assert len(found) >= 50
    for item in found:
        assert set(tasks.FIELDS[task]) <= set(item)
    assert fetch.benchmark(f"path:{SAMPLE / 'benchmarks'}", task) == (found, [])


@pytest.mark.parametrize("task", TASKS)
def test_benchmark_items_are_unique(task):
    found = items(task)
    assert len({(plain(item[QUESTION[task]]), tuple(choices(task, item))) for item in found}) == len(found)


@pytest.mark.parametrize("task", TASKS)
def test_choices_differ_and_none_is_empty(task):
    for item in items(task):
        found = choices(task, item)
        assert all(choice.strip() for choice in found)
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("task", TASKS)
def test_gold_labels_are_balanced(task):
    found = items(task)
    counts = Counter(gold(task, item) for item in found)
    width = len(choices(task, found[0]))
    assert len(counts) == width == round(1 / tasks.CHANCE[task])
    assert max(counts.values()) <= math.ceil(len(found) / width) + 1


@pytest.mark.parametrize("task", TASKS)
def test_the_longest_choice_is_not_the_giveaway(task):
    found = [item for item in items(task) if len({len(choice) for choice in choices(task, item)}) > 1]
    if task in ("boolq", "winogrande"):
        return
    golds = [int(gold(task, item)) for item in found]
    longest = [
        max(range(len(choices(task, item))), key=lambda i, item=item: len(choices(task, item)[i])) for item in found
    ]
    hits = sum(one == other for one, other in zip(golds, longest, strict=True))
    error = math.sqrt(tasks.CHANCE[task] * (1 - tasks.CHANCE[task]) / len(found))
    assert hits / len(found) <= tasks.CHANCE[task] + 4 * error


def test_winogrande_sentences_have_one_gap():
    assert all(item["sentence"].count("_") == 1 for item in items("winogrande"))


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_among_the_alpaca_rows(rows, task):
    texts = [plain(" ".join(row.values())) for row in rows]
    for item in items(task):
        question = plain(item[QUESTION[task]])
        assert not any(question in text for text in texts), question
