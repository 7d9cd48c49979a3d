import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from pipeline.bits import Vector
from pipeline.search import acquire, pareto
from pipeline.search.acquire import Front
from pipeline.search.allocate import Space, Spaces
from pipeline.search.surrogate import Belief, Model, Observation

UNITS = 9
RATIO = 0.2
SPACE = Space(1000, ((11, 7, 13, 9, 10, 8, 12, 6, 10),), 3, 1032)
SPACES = Spaces({RATIO: SPACE}, {})
GAINS = np.array([5.0, 1.0, 0.5, 8.0, 0.2, 3.0, 0.1, 0.7, 2.0])


def believed(gains):
    return {RATIO: Belief(0.0, (tuple(gains),))}


def every(space=SPACE):
    """Return the levels of all feasible vectors."""
    levels = np.array(list(product(range(space.top + 1), repeat=space.units)))
    return levels[space.feasible(levels)]


def vectors(levels, space=SPACE, ratio=RATIO):
    return [Vector(ratio, space.bits(row)) for row in levels]


def bits(*raised, units=UNITS):
    return tuple(8 if unit in raised else 4 for unit in range(units))


def observed(vectors, gains=GAINS, noise=0.0, stderr=0.05, level=-1.0, seed=0, imported=False, ratio=RATIO):
    generator = np.random.default_rng(seed)
    return [
        Observation(
            Vector(ratio, one),
            level + float(gains @ (np.array(one) == 8)) + noise * generator.normal(),
            stderr,
            imported,
        )
        for one in vectors
    ]


def drawn(count, seed=0, space=SPACE):
    generator, seen = random.Random(seed), {(4,) * space.units}
    while len(seen) < count:
        seen.add(space.draw(generator))
    return sorted(seen)


def test_posterior_of_two_observations_is_the_closed_form():
    prior = (2.0, 1.0, 0.0)
    past = [Observation(Vector(RATIO, (8, 4, 4)), 1.0, 0.3), Observation(Vector(RATIO, (4, 8, 8)), 2.0, 0.4)]
    model = Model(past, believed(prior))
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
    found, deviation = model.predict([Vector(RATIO, (8, 8, 4))])
    assert found[0] == pytest.approx(mean, rel=1e-5)
    assert deviation[0] == pytest.approx(variance**0.5, rel=1e-4)


def test_lucky_observation_is_shrunk_towards_what_the_others_say():
    past = observed(drawn(30), noise=0.0, stderr=1.0)
    lucky = Observation(past[7].vector, past[7].score + 3.0, 1.0)
    model = Model([*past[:7], lucky, *past[8:]], believed([0.0] * UNITS))
    mean = model.predict([lucky.vector])[0][0]
    assert abs(mean - past[7].score) < 1.5


@pytest.mark.parametrize(
    "prior", [GAINS, GAINS[::-1], np.zeros(UNITS), -GAINS], ids=["good", "misleading", "missing", "negative"]
)
def test_enough_trials_overrule_any_prior(prior):
    model = Model(observed(drawn(50), noise=0.1, stderr=0.1), believed(prior))
    mean, _ = model.predict(vectors(every()))
    assert np.corrcoef(mean, every() @ GAINS)[0, 1] > 0.99


def test_good_prior_ranks_units_that_no_trial_has_raised():
    past = observed([bits(), bits(0, 3), bits(1, 2), bits(5)])
    alone = [Vector(RATIO, bits(8)), Vector(RATIO, bits(4))]
    better, worse = Model(past, believed(GAINS)).predict(alone)[0]
    assert better > worse + 0.3
    same, as_well = Model(past, believed([0.0] * UNITS)).predict(alone)[0]
    assert same == pytest.approx(as_well)


def test_imported_observations_teach_gains_but_not_the_level():
    taught = observed(drawn(40), level=7.0, imported=True)
    own = observed([bits(), bits(1)])
    mean, _ = Model([*own, *taught], believed([0.0] * UNITS)).predict(vectors(every()))
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
    assert acquire.improvement(*values, front)[0] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_improvement_of_a_certain_quality_is_the_gain_of_area():
    front = Front.of(np.array([10, 30]), np.array([0.0, 1.0]), 50)
    found = acquire.improvement(np.array([2.0, 0.5, -1.0]), np.zeros(3), np.array([20.0, 20.0, 20.0]), front)
    assert found == pytest.approx([2 * 10 + 1 * 20, 0.5 * 10, 0])


@pytest.mark.parametrize("seed", range(6))
def test_proposal_is_the_best_of_all_feasible_vectors(seed):
    past = observed(drawn(12, seed), noise=0.5, stderr=0.5, seed=seed)
    prior = believed(GAINS if seed % 2 else [0.0] * UNITS)
    tried = {one.vector for one in past}
    found = acquire.propose(past, SPACES, prior, tried, random.Random(seed))
    gain = acquire.acquisition(Model(past, prior), SPACES, [one.vector for one in past])
    fresh = np.array([row for row in every() if Vector(RATIO, SPACE.bits(row)) not in tried])
    assert found in SPACES and found not in tried
    assert gain(RATIO, SPACE.levels([found.bits]))[0] == pytest.approx(gain(RATIO, fresh).max(), rel=1e-9)


def test_climb_swaps_where_no_flip_helps():
    space = Space(0, ((1, 1, 1, 1),), 1, None)
    top, height = acquire.climb(lambda levels: levels @ np.array([1.0, 2, 3, 4]), space, np.eye(4, dtype=int)[0])
    assert top.tolist() == [0, 0, 0, 1] and height == 4


def test_climb_takes_the_width_that_pays():
    """Two units may be raised; a unit at 16 bits costs as much as two at 8."""
    space = Space(0, ((1, 1, 1), (2, 2, 2)), 3, 2, widths=(4, 8, 16))
    worth = np.array([[0, 1.0, 5.0], [0, 2.0, 2.5], [0, 1.5, 1.6]])
    top, height = acquire.climb(lambda levels: worth[range(3), levels].sum(axis=1), space, np.zeros(3, dtype=int))
    assert top.tolist() == [2, 0, 0] and height == 5


def test_proposals_walk_through_the_whole_space_then_end():
    space, gains = Space(0, ((3, 2, 4, 1),), 2, 6), GAINS[:4]
    spaces = Spaces({RATIO: space}, {})
    past = observed([bits(units=4)], gains)
    while True:
        tried = {one.vector for one in past}
        found = acquire.propose(past, spaces, believed(gains), tried, random.Random(0))
        if found is None:
            break
        past += observed([found.bits], gains)
    assert len(past) == 10  # of 11 with at most two raised, (8, 4, 8, 4) is too dear
    assert {one.vector for one in past} == set(vectors(every(space), space))


def test_proposal_is_repeatable():
    past = observed(drawn(8), noise=0.2)
    first, second = (
        acquire.propose(past, SPACES, believed(GAINS), {one.vector for one in past}, random.Random(3)) for _ in range(2)
    )
    assert first == second


def test_one_observation_is_enough():
    start = Vector(RATIO, bits())
    assert acquire.propose(observed([bits()]), SPACES, believed(GAINS), {start}, random.Random(0)) in SPACES


# --- several ratios ----------------------------------------------------------------------------------------------

LEVELS = {0.0: -1.0, 0.2: -3.0, 0.5: -20.0}
JOINT = Spaces({ratio: replace(SPACE, base=1000 - int(400 * ratio), budget=None) for ratio in LEVELS}, {})


def beliefs(gains=GAINS, shift=0.0):
    return {ratio: Belief(level + shift, (tuple(gains),)) for ratio, level in LEVELS.items()}


def of(ratio, *raised):
    return observed([bits(*raised)], level=LEVELS[ratio], ratio=ratio)[0]


def test_trials_at_one_ratio_teach_the_gains_at_another():
    taught = [of(0.0), *(of(0.0, unit) for unit in range(UNITS)), of(0.0, 0, 3), of(0.2)]
    model = Model(taught, beliefs(np.zeros(UNITS)))
    there = model.predict([Vector(0.2, bits(unit)) for unit in range(UNITS)])[0]
    assert np.corrcoef(there, GAINS)[0, 1] > 0.95
    assert there[3] - there[6] > 3


def test_belief_extends_what_two_ratios_taught_to_a_third():
    model = Model([of(0.0), of(0.0, 3), of(0.2)], beliefs())
    means = model.predict([Vector(ratio, bits()) for ratio in LEVELS])[0]
    assert means[0] > means[1] > means[2] + 1


def test_trials_overrule_a_belief_that_orders_ratios_wrongly():
    wrong = {ratio: Belief(-level, (tuple(GAINS),)) for ratio, level in LEVELS.items()}
    past = [of(ratio, *raised) for ratio in LEVELS for raised in ((), (0,), (3,), (5,))]
    means = Model(past, wrong).predict([Vector(ratio, bits(8)) for ratio in LEVELS])[0]
    assert means[0] > means[1] > means[2]
    assert means == pytest.approx([level + GAINS[8] for level in LEVELS.values()], abs=1.0)


def test_proposal_is_the_best_of_all_ratios():
    past = [of(0.5), of(0.0), of(0.2), of(0.2, 3), of(0.0, 0)]
    tried = {one.vector for one in past}
    found = acquire.propose(past, JOINT, beliefs(), tried, random.Random(0))
    gain = acquire.acquisition(Model(past, beliefs()), JOINT, [one.vector for one in past])
    best = {}
    for ratio, space in JOINT.at.items():
        fresh = np.array([row for row in every(space) if Vector(ratio, space.bits(row)) not in tried])
        best[ratio] = gain(ratio, fresh).max()
    assert gain(found.ratio, JOINT.at[found.ratio].levels([found.bits]))[0] == pytest.approx(max(best.values()))
    assert best[found.ratio] == max(best.values())


# --- vectors that are tried now ----------------------------------------------------------------------------------


def test_expected_vectors_leave_means_and_lower_deviations_as_conditioning_does():
    model = Model(observed(drawn(10), noise=0.1), believed(GAINS))
    pending = [Vector(RATIO, one) for one in (bits(0, 3), bits(3, 5))]
    asked = [*vectors(every())[::7], *pending]
    at, hot = np.zeros(len(asked), int), np.array([model._hot(vector.bits) for vector in asked])
    _, covariance = model._process.predict(model._inputs(at, hot), return_cov=True)  # of qualities, without noise
    noise = model._process.kernel_.k2.k1.constant_value * (0.05 / model._scale) ** 2  # the learnt share of 0.05
    cross, inner = covariance[:, -2:], covariance[-2:, -2:] + noise * np.eye(2)
    expected = np.diag(covariance) - (cross @ np.linalg.inv(inner) * cross).sum(axis=1)
    before, after = model.predict(asked), model.expecting(pending).predict(asked)
    np.testing.assert_allclose(after[0], before[0], atol=1e-4)
    np.testing.assert_allclose(after[1], np.sqrt(expected) * model._scale, rtol=1e-3, atol=1e-4)
    assert (after[1] < before[1]).all() and after[1][-1] < 0.8 * before[1][-1]
    np.testing.assert_array_equal(model.predict(asked), before)  # the model itself learnt nothing


def test_pending_vectors_count_on_the_front_as_expected():
    """What only repeats the gain of a vector that is tried now is not proposed."""
    known = observed(drawn(12))
    first = acquire.propose(known, SPACES, believed(GAINS), {one.vector for one in known}, random.Random(0))
    seen = {one.vector for one in known} | {first}
    second = acquire.propose(known, SPACES, believed(GAINS), seen, random.Random(0), [first])
    unaware = acquire.propose(known, SPACES, believed(GAINS), seen, random.Random(0))
    model = Model(known, believed(GAINS)).expecting([first])
    gain = acquire.acquisition(model, SPACES, [*(one.vector for one in known), first])

    def value(vector):
        return gain(RATIO, SPACE.levels([vector.bits]))[0]

    assert value(second) == max(value(vector) for vector in vectors(every()) if vector not in seen)
    assert value(second) >= value(unaware)
