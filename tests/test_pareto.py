import random
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest

from pipeline.search import SearchError, pareto
from pipeline.search.pareto import Point
from pipeline.search.surrogate import Belief


def point(score, memory, run_id="a", **changes):
    values = {
        "run_id": run_id, "name": f"trial {run_id}", "method": "sampler", "bits": "4484", "score": score,
        "stderr": 0.05, "memory": memory, "source": "predicted", "reference": False, "metrics": {},
    }  # fmt: skip
    return Point(**values | changes)


def cloud(seed, count=25, most=12):
    generator = random.Random(seed)
    return [point(generator.randrange(most), generator.randrange(most), f"{index:02}") for index in range(count)]


def fake_run(status="FINISHED", stage="trial", **metrics):
    every = {"accuracy": 0.5, "accuracy_stderr": 0.02, "peak_memory_bytes": 1e9, "boolq": 0.6, "boolq_stderr": 0.1}
    return SimpleNamespace(
        status=status,
        run_id="f" * 32,
        name="trial 3: 50.0 %",
        metrics=every | metrics,
        tags={
            "method": "random",
            "stage": stage,
            "memory_source": "predicted",
            "name": "trial 3",
            "bits": "4488",
            "ratio": "0.3",
        },  # fmt: skip
        params={"bits": "4 4 8 8"},
    )


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ((0.6, 10), (0.5, 10), True),
        ((0.5, 9), (0.5, 10), True),
        ((0.6, 9), (0.5, 10), True),
        ((0.5, 10), (0.5, 10), False),
        ((0.6, 11), (0.5, 10), False),
        ((0.4, 9), (0.5, 10), False),
        ((0.5, 11), (0.5, 10), False),
        ((0.4, 10), (0.5, 10), False),
        ((0.4, 11), (0.5, 10), False),
    ],
)
def test_dominance_truth_table(one, other, expected):
    assert pareto.dominates(point(*one), point(*other)) is expected


def test_front_by_hand():
    every = [
        point(5, 5, "a"),
        point(7, 9, "b"),
        point(6, 9, "c"),
        point(4, 4, "d"),
        point(4, 6, "e"),
        point(7, 12, "f"),
    ]
    assert [one.run_id for one in pareto.front(every)] == ["d", "a", "b"]


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_nothing_dominates(seed):
    every = cloud(seed)
    members = pareto.front(every)
    expected = {
        one.run_id
        for one in every
        if not any((o.score >= one.score and o.memory < one.memory) or (o.score > one.score and o.memory <= one.memory)
                   for o in every)
    }  # fmt: skip
    assert {one.run_id for one in members} == expected
    assert [one.memory for one in members] == sorted(one.memory for one in members)


def test_front_keeps_duplicates():
    every = [point(0.5, 10, "b"), point(0.5, 10, "a"), point(0.4, 12, "c")]
    assert [one.run_id for one in pareto.front(every)] == ["a", "b"]


def test_front_of_equal_points_is_all_of_them():
    assert len(pareto.front([point(0.5, 10, str(index)) for index in range(4)])) == 4


@pytest.mark.parametrize("every", [[], [point(0.1, 1)]], ids=["empty", "single"])
def test_front_of_none_or_one_is_itself(every):
    assert pareto.front(every) == every


@pytest.mark.parametrize(
    "members, expected",
    [
        ([], 0),
        ([(5, 4)], 5 * 6),
        ([(5, 4), (7, 8)], 5 * 6 + 2 * 2),
        ([(7, 8), (5, 4)], 5 * 6 + 2 * 2),
        ([(5, 4), (5, 4)], 5 * 6),
        ([(5, 4), (4, 6)], 5 * 6),
        ([(5, 10)], 0),
        ([(5, 12)], 0),
        ([(0, 4), (-1, 2)], 0),
    ],
)
def test_hypervolume_by_hand(members, expected):
    assert pareto.hypervolume(members, 0, 10) == expected


@pytest.mark.parametrize("seed", range(5))
def test_hypervolume_counts_the_dominated_cells(seed):
    every, worst_score, worst_memory = cloud(seed, count=8), 2, 10
    cells = sum(
        any(one.score >= score + 1 and one.memory <= memory for one in every)
        for score, memory in product(range(worst_score, 12), range(worst_memory))
    )
    for points in (every, pareto.front(every)):
        pairs = [(one.score, one.memory) for one in points]
        assert pareto.hypervolume(pairs, worst_score, worst_memory) == pytest.approx(cells)


def test_growth_by_hand():
    unit = 2**30
    trials = [(1.0, 10 * unit), (3.0, 14 * unit), (2.0, 15 * unit), (4.0, 30 * unit), (2.0, 12 * unit)]
    # From (1, 10 GiB), up to 10 + 10 GiB: nothing; 2 x 6; dominated; beyond reach; 1 x 2 more between 12 and 14.
    assert pareto.growth(trials, 10 * unit) == [0.0, 12.0, 12.0, 12.0, 14.0]
    assert pareto.growth(trials, 10 * unit, 3) == [12.0, 14.0]
    assert pareto.growth([], 10 * unit) == []


def test_best_is_highest_score_then_least_memory():
    members = [point(0.4, 1, "a"), point(0.6, 9, "b"), point(0.6, 7, "c"), point(0.5, 2, "d")]
    assert pareto.best(members).run_id == "c"


def test_best_goes_by_expected_score_where_the_members_were_judged():
    members = [
        point(0.9, 9, "lucky", expected=0.5),
        point(0.7, 7, "sound", expected=0.6),
        point(0.6, 5, "as_good_for_less", expected=0.6),
    ]
    assert pareto.best(members).run_id == "as_good_for_less"


def test_errors_and_probabilities_are_those_of_paired_trials():
    rows = [[40.0, 10], [10.0, 10]]  # losses; of two rows drawn from them: both, or one of them twice
    records = [{"by_row": rows}, {"by_row": [[39.0, 10], [11.0, 10]]}, {"by_row": [[30.0, 10], [5.0, 10]]}]
    every = [point(-2.5, 5, "low"), point(-2.5, 9, "high"), point(-1.75, 1, "reference", reference=True)]
    low, high, reference = pareto.compared(every, records, "response_logprob")
    # the trials are 0.1, 0 or -0.1 apart, and the reference 0.95, 0.75 or 0.55 above their mean
    assert (low.paired, high.paired) == pytest.approx((0.05 * 0.5**0.5,) * 2, abs=2e-3)
    assert low.probability == 1 and high.probability == pytest.approx(0.25, abs=0.03)  # equal is no better
    assert reference.probability is None and reference.paired == pytest.approx(0.2 * 0.5**0.5, abs=0.005)
    assert pareto.compared([], [], "response_logprob") == []


def test_judged_member_expects_what_all_trials_say():
    generator = random.Random(0)
    vectors = ["".join("8" if generator.random() < 0.3 else "4" for _ in range(8)) for _ in range(40)]
    trials = [
        point(-1 + 0.1 * bits[:4].count("8"), 10 + bits.count("8"), f"{index:02}", bits=bits, stderr=0.1)
        for index, bits in enumerate(dict.fromkeys(["4" * 8, *vectors]))
    ]
    lucky = replace(trials[-1], score=trials[-1].score + 0.5)
    trials[-1] = lucky
    believed = {0.0: Belief(0.0, ((0.0,) * 8,))}
    members = pareto.judge(pareto.front(trials), trials, believed)
    (judged,) = [one for one in members if one.run_id == lucky.run_id]
    assert judged.score == lucky.score
    assert judged.expected < lucky.score - 0.2
    assert pareto.judge([], trials, believed) == []


def test_best_of_none_says_what_to_run():
    with pytest.raises(SearchError, match="front is empty.*mlflow run"):
        pareto.best([])


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED", "SCHEDULED"])
def test_points_leave_out_unfinished_runs(status):
    found = pareto.points([fake_run(status), fake_run(), fake_run(status)], "accuracy")
    assert len(found) == 1


def test_points_leave_out_runs_without_the_objective():
    assert pareto.points([fake_run()], "piqa") == []


@pytest.mark.parametrize(
    "objective, score, stderr, stage", [("accuracy", 0.5, 0.02, "trial"), ("boolq", 0.6, 0.1, "reference")]
)
def test_points_carry_what_the_run_holds(objective, score, stderr, stage):
    run = fake_run(stage=stage)
    (found,) = pareto.points([run], objective)
    assert found == Point(
        "f" * 32, "trial 3", "random", "4488", score, stderr, 10**9, "predicted", stage == "reference", run.metrics, 0.3
    )
