"""Trials compared item by item: by hand, against formulas for paired means, and what other items could change."""

import itertools

import numpy as np
import pytest

from pipeline.search import paired
from pipeline.trial.result import Result
from tests.fixtures.searches import result

RECORD = {
    "by_item": {"piqa": [(1.0, -0.2), (0.0, -0.6)], "arc_easy": [(1.0, -0.1), (1.0, -0.3), (0.0, -0.8)]},
    "by_row": [(20.0, 10), (10.0, 20)],
}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("response_logprob", -1.0),  # 30 nats of 30 tokens
        ("gold_logprob", -0.4),  # both tasks' means
        ("accuracy", (1 / 2 + 2 / 3) / 2),
        ("arc_easy", 2 / 3),
    ],
)
def test_score_is_the_objective(objective, expected):
    assert paired.score(paired.strata(RECORD, objective)) == pytest.approx(expected)


def drawn(items, seed, count=3):
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 1, items)
    return [[np.column_stack([common + generator.normal(0, 0.1, items), np.ones(items)])] for _ in range(count)]


def test_difference_has_the_error_of_paired_means():
    one, other, _ = drawn(200, 1)
    apart = one[0][:, 0] - other[0][:, 0]
    found, error = paired.difference(one, other)
    assert found == pytest.approx(apart.mean())
    assert error == pytest.approx(apart.std() / len(apart) ** 0.5, rel=0.06)
    assert error < 0.3 * one[0][:, 0].std() / len(apart) ** 0.5  # far below the error of one score
    assert paired.difference(one, one) == (0, 0)


def test_error_of_a_ratio_is_that_of_its_residuals():
    generator = np.random.default_rng(4)
    weights = generator.integers(5, 50, 300).astype(float)
    sums = weights * generator.normal(-2, 0.5, 300)
    mean = sums.sum() / weights.sum()
    expected = ((sums - mean * weights) ** 2).sum() ** 0.5 / weights.sum()
    assert paired.redrawn([[np.column_stack([sums, weights])]])[:, 0].std() == pytest.approx(expected, rel=0.06)


def test_strata_are_drawn_each_by_itself():
    trials = [paired.strata(RECORD, "accuracy")]
    by_chance = {
        (sum(first) / 2 + sum(second) / 3) / 2
        for first in itertools.product((1, 0), repeat=2)
        for second in itertools.product((1, 1, 0), repeat=3)
    }
    scores = paired.redrawn(trials)[:, 0]
    assert {round(one, 9) for one in scores} == {round(one, 9) for one in by_chance}
    assert scores.mean() == pytest.approx(paired.score(trials[0]), abs=0.02)


def test_every_trial_gets_the_same_items_whatever_the_block_of_draws(monkeypatch):
    one, other, _ = drawn(50, 2)
    whole = paired.redrawn([one, other, one], draws=250)
    assert whole.shape == (250, 3) and np.array_equal(whole[:, 0], whole[:, 2])
    monkeypatch.setattr(paired, "_AT_ONCE", 7)
    assert np.allclose(paired.redrawn([one, other, one], draws=250), whole)


def test_trials_of_other_items_are_refused():
    with pytest.raises(ValueError):
        paired.redrawn([drawn(50, 2)[0], drawn(40, 2)[0]])
    with pytest.raises(ValueError):
        paired.redrawn([paired.strata(RECORD, "accuracy"), paired.strata(RECORD, "piqa")])


def test_errors_leave_out_what_trials_share():
    scores = np.array([[0.0], [1.0], [2.0], [5.0]]) + np.array([0.0, 1.0, 5.0])
    assert np.allclose(paired.errors(scores, [True, True, True]), 0)
    scores[:, 0] += [1, -1, 1, -1]
    assert np.allclose(paired.errors(scores, [True, True, False]), [0.5, 0.5, 0.5])
    assert np.allclose(paired.errors(scores, [False] * 3), scores.std(axis=0))


def test_undominated_share_is_that_of_dominance_in_each_draw():
    generator = np.random.default_rng(3)
    scores = generator.integers(0, 4, (300, 6)).astype(float)
    memories = [3, 1, 2, 2, 5, 3]

    def dominated(draw, index):
        return any(
            (a >= draw[index] and m <= memories[index]) and (a > draw[index] or m < memories[index])
            for a, m in zip(draw, memories, strict=True)
        )

    expected = [1 - np.mean([dominated(draw, index) for draw in scores]) for index in range(6)]
    assert np.allclose(paired.undominated(scores, memories), expected)


def test_a_trials_record_survives_json():
    import json

    found = result((4, 8, 4, 4, 4, 4, 4, 4))
    assert Result.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert json.loads(json.dumps(found.record)) == {
        "by_item": {"piqa": [[1.0, -0.5], [0.0, -1.5]]},
        "by_row": [[20.0, 10], [30.0, 12]],
    }
