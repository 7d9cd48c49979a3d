import random
from itertools import product

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from pipeline.search import pareto, surrogate
from pipeline.search.allocate import Space, raised_of
from pipeline.search.surrogate import Front, Model, Observation

UNITS = 9
SPACE = Space(1000, (11, 7, 13, 9, 10, 8, 12, 6, 10), 3, 1032)
GAINS = np.array([5.0, 1.0, 0.5, 8.0, 0.2, 3.0, 0.1, 0.7, 2.0])


def every(space=SPACE):
    raised = np.array(list(product((False, True), repeat=space.units)))
    return raised[space.feasible(raised)]


def bits(*raised, units=UNITS):
    return tuple(8 if unit in raised else 4 for unit in range(units))


def observed(vectors, gains=GAINS, noise=0.0, stderr=0.05, level=-1.0, seed=0, imported=False):
    generator = np.random.default_rng(seed)
    return [
        Observation(one, level + float(gains @ (np.array(one) == 8)) + noise * generator.normal(), stderr, imported)
        for one in vectors
    ]


def drawn(count, seed=0, space=SPACE):
    generator, seen = random.Random(seed), {(4,) * space.units}
    while len(seen) < count:
        seen.add(space.draw(generator))
    return sorted(seen)


def test_posterior_of_two_observations_is_the_closed_form():
    prior = (2.0, 1.0, 0.0)
    past = [Observation((8, 4, 4), 1.0, 0.3), Observation((4, 8, 8), 2.0, 0.4)]
    model = Model(past, prior)
    level, scored, count, each, weighted, pairs, noise = np.exp(
        np.concatenate([[np.log(10)], model._process.kernel_.theta])
    )
    s = np.array(prior) / np.sqrt(5 / 3)

    def covariance(x, y):
        linear = level + scored * (s @ x) * (s @ y) / 3 + count * x.sum() * y.sum() / 3
        return linear + each * (x @ y) + weighted * (s * x) @ (s * y) + pairs * (x @ y) ** 2

    x, y, new = (np.array(one, dtype=float) for one in ((1, 0, 0), (0, 1, 1), (1, 1, 0)))
    scale = 0.5  # standard deviation of the two scores
    a = covariance(x, x) + noise * (0.3 / scale) ** 2
    d = covariance(y, y) + noise * (0.4 / scale) ** 2
    b = covariance(x, y)
    inverse = np.array([[d, -b], [-b, a]]) / (a * d - b * b)
    to = np.array([covariance(new, x), covariance(new, y)])
    mean = 1.5 + scale * to @ inverse @ np.array([-1.0, 1.0])
    variance = scale**2 * (covariance(new, new) - to @ inverse @ to)
    found, deviation = model.predict(np.array([[True, True, False]]))
    assert found[0] == pytest.approx(mean, rel=1e-5)
    assert deviation[0] == pytest.approx(variance**0.5, rel=1e-4)


def test_lucky_observation_is_shrunk_towards_what_the_others_say():
    past = observed(drawn(30), noise=0.0, stderr=1.0)
    lucky = Observation(past[7].bits, past[7].score + 3.0, 1.0)
    model = Model([*past[:7], lucky, *past[8:]], [0.0] * UNITS)
    mean = model.predict(raised_of([lucky.bits]))[0][0]
    assert abs(mean - past[7].score) < 1.5


@pytest.mark.parametrize(
    "prior", [GAINS, GAINS[::-1], np.zeros(UNITS), -GAINS], ids=["good", "misleading", "missing", "negative"]
)
def test_enough_trials_overrule_any_prior(prior):
    model = Model(observed(drawn(50), noise=0.1, stderr=0.1), prior)
    mean, _ = model.predict(every())
    assert np.corrcoef(mean, every() @ GAINS)[0, 1] > 0.99


def test_good_prior_ranks_units_that_no_trial_has_raised():
    past = observed([bits(), bits(0, 3), bits(1, 2), bits(5)])
    alone = raised_of([bits(8), bits(4)])
    better, worse = Model(past, GAINS).predict(alone)[0]
    assert better > worse + 0.3
    same, as_well = Model(past, [0.0] * UNITS).predict(alone)[0]
    assert same == pytest.approx(as_well)


def test_imported_observations_teach_gains_but_not_the_level():
    taught = observed(drawn(40), level=7.0, imported=True)
    own = observed([bits(), bits(1)])
    mean, _ = Model([*own, *taught], [0.0] * UNITS).predict(every())
    assert np.abs(mean - (every() @ GAINS - 1.0)).mean() < 0.5


@pytest.mark.parametrize("mean, deviation, memory", [(0.5, 0.3, 20), (2.2, 0.4, 45), (-3.0, 0.5, 31), (1.0, 2.0, 5)])
def test_improvement_is_the_integral_over_hypervolumes(mean, deviation, memory):
    members = [(0.0, 10), (1.0, 30), (2.0, 42)]
    front = Front.of(np.array([10, 30, 42, 50]), np.array([0.0, 1.0, 2.0, 1.5]), 60)
    assert front.levels.tolist() == [0, 1, 2]
    before = pareto.hypervolume(members, 0.0, 60)

    def integrand(quality):
        after = pareto.hypervolume([*members, (quality, memory)], 0.0, 60)
        return norm.pdf(quality, mean, deviation) * (after - before)

    width = 8 * deviation
    expected, _ = quad(integrand, mean - width, mean + width, points=[0, 1, 2], limit=400)
    values = (np.array([one]) for one in (mean, deviation, memory))
    assert surrogate.improvement(*values, front)[0] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_improvement_of_a_certain_quality_is_the_gain_of_area():
    front = Front.of(np.array([10, 30]), np.array([0.0, 1.0]), 50)
    found = surrogate.improvement(np.array([2.0, 0.5, -1.0]), np.zeros(3), np.array([20.0, 20.0, 20.0]), front)
    assert found == pytest.approx([2 * 10 + 1 * 20, 0.5 * 10, 0])


@pytest.mark.parametrize("seed", range(6))
def test_proposal_is_the_best_of_all_feasible_vectors(seed):
    past = observed(drawn(12, seed), noise=0.5, stderr=0.5, seed=seed)
    prior = GAINS if seed % 2 else [0.0] * UNITS
    tried = {one.bits for one in past}
    found = surrogate.propose(past, SPACE, prior, tried, random.Random(seed))
    gain = surrogate.acquisition(Model(past, prior), SPACE, raised_of([one.bits for one in past]))
    fresh = np.array([row for row in every() if tuple(np.where(row, 8, 4)) not in tried])
    assert found in SPACE and found not in tried
    assert gain(raised_of([found]))[0] == pytest.approx(gain(fresh).max(), rel=1e-9)


def test_climb_swaps_where_no_flip_helps():
    space = Space(0, (1, 1, 1, 1), 1, None)
    top, height = surrogate.climb(lambda raised: raised @ np.array([1.0, 2, 3, 4]), space, np.eye(4, dtype=bool)[0])
    assert top.tolist() == [False, False, False, True] and height == 4


def test_proposals_walk_through_the_whole_space_then_end():
    space, gains = Space(0, (3, 2, 4, 1), 2, 6), GAINS[:4]
    past = observed([bits(units=4)], gains)
    while (found := surrogate.propose(past, space, gains, {one.bits for one in past}, random.Random(0))) is not None:
        past += observed([found], gains)
    assert len(past) == 10  # of 11 with at most two raised, (8, 4, 8, 4) is too dear
    assert {one.bits for one in past} == {tuple(np.where(row, 8, 4)) for row in every(space)}


def test_proposal_is_repeatable():
    past = observed(drawn(8), noise=0.2)
    first, second = (
        surrogate.propose(past, SPACE, GAINS, {one.bits for one in past}, random.Random(3)) for _ in range(2)
    )
    assert first == second


def test_one_observation_is_enough():
    assert surrogate.propose(observed([bits()]), SPACE, GAINS, {bits()}, random.Random(0)) in SPACE
