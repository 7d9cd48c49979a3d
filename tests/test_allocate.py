import random
from dataclasses import replace
from itertools import product

import pytest

from pipeline.bits import Vector
from pipeline.search import SearchError
from pipeline.search.allocate import Space, Spaces

COSTS = (5, 3, 8, 1, 4)
SIZES = (2, 2, 2, 12, 4)  # parameters


def predict(bits):
    return 100 + sum(cost for cost, width in zip(COSTS, bits, strict=True) if width == 8)


def space(max_eights=5, budget=None, deltas=COSTS):
    return Space(100, (tuple(deltas),), max_eights, budget)


def every():
    return list(product((4, 8), repeat=len(COSTS)))


def eights(bits):
    return {index for index, width in enumerate(bits) if width == 8}


def feasible(limit, budget):
    return {bits for bits in every() if len(eights(bits)) <= limit and (budget is None or predict(bits) <= budget)}


LIMITS = [(limit, budget) for limit in (0, 1, 2, 5) for budget in (None, 100, 104, 109)]
spaces = pytest.mark.parametrize("limit, budget", LIMITS)


def importances(count=6):
    generator = random.Random(7)
    return [[generator.random() for _ in COSTS] for _ in range(count)]


def test_of_measures_an_exact_linear_model():
    found = Space.of(predict, 5, 0.5, None)
    assert (found.base, found.deltas, found.max_raised, found.units) == (100, (COSTS,), 2, 5)
    for bits in every():
        assert found.memory(bits) == predict(bits)


def test_of_asks_once_a_unit_and_once_for_the_base():
    asked = []
    Space.of(lambda bits: asked.append(bits) or 1, 4, 1.0, None)
    assert len(asked) == len(set(asked)) == 5


@pytest.mark.parametrize(
    "units, fraction, expected", [(28, 0.25, 7), (30, 0.25, 7), (10, 0.3, 3), (100, 0.29, 29), (5, 0.0, 0), (5, 1.0, 5)]
)
def test_most_units_at_8_bits_is_the_floor_of_the_fraction(units, fraction, expected):
    assert Space.of(lambda bits: 0, units, fraction, None).max_raised == expected


def test_budget_below_the_base_is_refused():
    with pytest.raises(SearchError) as caught:
        Space.of(lambda bits: 3 * 2**30, 4, 1.0, 2**30)
    for text in ("search.memory_budget_gib", "3.000 GiB", "budget of 1.000", "raise it", "micro_batch_size"):
        assert text in str(caught.value)


def test_budget_equal_to_the_base_is_accepted_where_no_unit_is_to_be_raised():
    assert Space.of(predict, 5, 0.0, 100).allocate([1] * 5) == (4,) * 5


@pytest.mark.parametrize(
    "fraction, budget, average, wanted",
    [
        (1.0, 100, None, "memory_budget_gib leaves 0.0 MiB"),
        (0.15, None, None, "less than one unit"),
        (1.0, None, 4.3, "average_bits is 4.3 and the smallest unit alone makes 4.364"),
        (1.0, 102, 4.5, "memory_budget_gib forbids those that search.average_bits would allow"),
    ],
)
def test_limits_that_forbid_every_raise_are_refused_by_name(fraction, budget, average, wanted):
    with pytest.raises(SearchError, match="search.max_8bit_fraction is .* not one of the 5 units") as caught:
        Space.of(predict, 5, fraction, budget, SIZES, average)
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    "limit, budget, average", list(product((1, 2, 5), (None, 104, 109), (None, 4.0, 4.5, 4.8, 5.5, 8.0)))
)
def test_every_limit_holds_at_once(limit, budget, average):
    found = Space(100, (COSTS,), limit, budget, SIZES, average)

    def mean(bits):
        return sum(size * width for size, width in zip(SIZES, bits, strict=True)) / sum(SIZES)

    expected = {bits for bits in feasible(limit, budget) if average is None or mean(bits) <= average}
    assert {bits for bits in every() if bits in found} == expected
    levels = found.levels(every())
    assert found.feasible(levels).tolist() == [bits in expected for bits in every()]
    assert found.memories(levels).tolist() == [predict(bits) for bits in every()]
    assert found.ceiling >= max(predict(bits) for bits in expected)
    for importance in importances(2):
        order = sorted(range(5), key=lambda index: -importance[index])
        assert found.allocate(importance) == max(expected, key=lambda bits: [bits[index] for index in order])
        assert all(found.repair(bits, importance) in expected for bits in every())
    generator = random.Random(0)
    assert {found.draw(generator) for _ in range(50)} <= expected


@spaces
def test_contains_agrees_with_brute_force(limit, budget):
    found = space(limit, budget)
    assert {bits for bits in every() if bits in found} == feasible(limit, budget)


@pytest.mark.parametrize(
    "limit, budget, expected",
    [
        (2, None, (4, 8, 4, 4, 8)),
        (5, None, (8, 8, 8, 8, 8)),
        (5, 108, (4, 8, 4, 8, 8)),  # 4 + 3 fit, 8 and 5 do not, 1 does
        (2, 108, (4, 8, 4, 4, 8)),
        (0, None, (4, 4, 4, 4, 4)),
    ],
)
def test_allocate_by_hand(limit, budget, expected):
    assert space(limit, budget).allocate([0.2, 0.8, 0.3, 0.1, 0.9]) == expected


@spaces
def test_allocate_is_the_first_feasible_vector_in_order_of_importance(limit, budget):
    for importance in importances():
        order = sorted(range(5), key=lambda index: -importance[index])
        best = max(feasible(limit, budget), key=lambda bits: [bits[index] for index in order])
        assert space(limit, budget).allocate(importance) == best


def test_allocate_breaks_ties_by_position():
    assert space(2).allocate([1, 1, 1, 1, 1]) == (8, 8, 4, 4, 4)


@pytest.mark.parametrize(
    "limit, budget, bits, expected",
    [
        (2, None, (8, 8, 8, 4, 8), (4, 8, 4, 4, 8)),
        (5, 107, (8, 8, 8, 4, 8), (4, 8, 4, 4, 8)),
        (5, 106, (4, 8, 4, 4, 8), (4, 4, 4, 4, 8)),
        (2, None, (4, 4, 8, 8, 4), (4, 4, 8, 8, 4)),
    ],
)
def test_repair_by_hand(limit, budget, bits, expected):
    assert space(limit, budget).repair(bits, [0.2, 0.8, 0.3, 0.1, 0.9]) == expected


@spaces
def test_repair_gives_up_no_more_than_the_least_important(limit, budget):
    allowed = feasible(limit, budget)
    for importance, bits in product(importances(3), every()):
        fixed = space(limit, budget).repair(bits, importance)
        kept, dropped = eights(fixed), eights(bits) - eights(fixed)
        assert fixed in allowed
        assert kept <= eights(bits)
        assert all(importance[low] < importance[high] for low in dropped for high in kept)
        if dropped:
            last = max(dropped, key=lambda index: importance[index])
            assert tuple(8 if index in kept | {last} else 4 for index in range(5)) not in allowed


@spaces
def test_draw_reaches_every_feasible_vector_and_no_other(limit, budget):
    generator = random.Random(3)
    found = {space(limit, budget).draw(generator) for _ in range(3000)}
    assert found - {(4,) * 5} == feasible(limit, budget) - {(4,) * 5}


def test_draw_raises_each_number_of_units_evenly():
    generator = random.Random(0)
    counts = [len(eights(space(4).draw(generator))) for _ in range(4000)]
    assert set(counts) == {1, 2, 3, 4}
    for number in (1, 2, 3, 4):
        assert counts.count(number) == pytest.approx(1000, abs=120)


def test_draw_is_repeatable():
    first, second = (
        [space(3).draw(generator) for _ in range(20)] for generator in (random.Random(9), random.Random(9))
    )
    assert first == second


def test_unseen_gives_the_vector_itself_if_it_is_new():
    assert space().unseen({(4,) * 5}, random.Random(0), near=(8, 4, 8, 4, 4)) == (8, 4, 8, 4, 4)


@spaces
def test_unseen_gives_a_feasible_neighbour_of_a_tried_vector(limit, budget):
    allowed = feasible(limit, budget)
    for near, seed in product(allowed, range(3)):
        neighbours = {bits for bits in allowed if len(eights(bits) ^ eights(near)) == 1}
        found = space(limit, budget).unseen({near}, random.Random(seed), near=near)
        assert found in neighbours or (not neighbours and found is None)


def test_unseen_looks_further_when_all_neighbours_were_tried():
    near = (4,) * 5
    seen = {bits for bits in every() if len(eights(bits)) <= 1}
    assert len(eights(space().unseen(seen, random.Random(1), near=near))) >= 2


@pytest.mark.parametrize("limit, budget", [(2, None), (3, 109), (5, None)])
def test_unseen_walks_through_the_whole_space_then_gives_none(limit, budget):
    seen, generator = {(4,) * 5}, random.Random(5)
    while (found := space(limit, budget).unseen(seen, generator)) is not None:
        assert found not in seen
        seen.add(found)
    assert seen == feasible(limit, budget)


def test_per_byte_divides_by_what_a_unit_costs():
    assert space(deltas=(5, 2, 0)).per_byte([10, -3, 4]) == [2, -1.5, 4]  # what costs nothing counts as one byte


def test_reach_is_a_tenth_beyond_the_dearest_vector():
    one = Space(base=1000, deltas=((10, 30, 20),), max_raised=2, budget=None)
    assert Spaces({0.2: one}, {}).reach == pytest.approx(1.1 * 50)
    assert Spaces({0.2: replace(one, budget=1040)}, {}).reach == pytest.approx(1.1 * 40)
    assert Spaces({0.0: one, 0.5: replace(one, base=700)}, {}).reach == pytest.approx(1.1 * 350)


# --- three widths ------------------------------------------------------------------------------------------------

THREE = (4, 8, 16)
DEAR = (12, 9, 20, 4, 10)  # bytes at 16 bits


def peak(bits):
    cost = {4: lambda unit: 0, 8: lambda unit: COSTS[unit], 16: lambda unit: DEAR[unit]}
    return 100 + sum(cost[width](unit) for unit, width in enumerate(bits))


@pytest.mark.parametrize("fraction, budget, average", list(product((0.4, 1.0), (None, 115, 130), (None, 5.0, 9.0))))
def test_limits_over_three_widths_agree_with_brute_force(fraction, budget, average):
    found = Space.of(peak, 5, fraction, budget, SIZES, average, THREE)
    vectors = list(product(THREE, repeat=5))

    def allowed(bits):
        mean = sum(size * width for size, width in zip(SIZES, bits, strict=True)) / sum(SIZES)
        few = sum(width > 4 for width in bits) <= int(5 * fraction)
        return few and (budget is None or peak(bits) <= budget) and (average is None or mean <= average)

    expected = [allowed(bits) for bits in vectors]
    assert found.feasible(found.levels(vectors)).tolist() == expected
    assert found.memories(found.levels(vectors)).tolist() == [peak(bits) for bits in vectors]
    assert [found.bits(row) for row in found.levels(vectors)] == vectors
    generator = random.Random(2)
    drawn = {found.draw(generator) for _ in range(4000)}
    assert drawn <= {bits for bits, fits in zip(vectors, expected, strict=True) if fits}
    assert found.ceiling >= max(peak(bits) for bits in drawn)


# --- several ratios ----------------------------------------------------------------------------------------------


def several(budget=None):
    spaces = {ratio: Space(base, (COSTS,), 5, None) for ratio, base in ((0.5, 60), (0.0, 140), (0.2, 100))}
    return Spaces.within(spaces, budget)


def test_ratios_that_exceed_the_budget_are_left_out_by_name():
    assert several().ratios == [0.0, 0.2, 0.5] and several().too_large == {}
    fitting = several(105)
    assert fitting.ratios == [0.2, 0.5] and fitting.too_large == {0.0: 140}
    assert Vector(0.2, (4, 8, 4, 8, 4)) in fitting  # 104
    assert Vector(0.2, (8, 8, 4, 4, 4)) not in fitting and Vector(0.0, (4,) * 5) not in fitting
    assert fitting.smallest() == Vector(0.5, (4,) * 5) and fitting.memory(Vector(0.5, (8, 4, 4, 4, 4))) == 65


def test_budget_below_the_smallest_model_names_its_size():
    spaces = {0.2: Space(3 * 2**30, (COSTS,), 5, None), 0.5: Space(2 * 2**30, (COSTS,), 5, None)}
    with pytest.raises(SearchError, match="0.5 pruned .* 2.000 GiB, more than the budget of 1.000; .*prune.ratios"):
        Spaces.within(spaces, 2**30)


def test_unseen_vectors_of_all_ratios_are_found_then_none():
    spaces, generator = several(105), random.Random(0)
    seen = {spaces.smallest()}  # which no draw gives
    while (vector := spaces.unseen(seen, generator)) is not None:
        assert vector in spaces and vector not in seen
        seen.add(vector)
    assert {vector.ratio for vector in seen} == {0.2, 0.5}
    assert len(seen) == 32 + sum(predict(bits) <= 105 for bits in every())
