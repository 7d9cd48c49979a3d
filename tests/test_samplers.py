import dataclasses
import json
import random
from itertools import product

import numpy as np
import pandas as pd
import pytest

from benchmarks import contenders, landscapes, record, samplers, services
from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.search.allocate import Space, Spaces
from pipeline.search.surrogate import Observation


@pytest.fixture(scope="module")
def landscape():
    return landscapes.synthetic(0.01, seed=3, units=8)


@pytest.fixture(scope="module")
def joint():
    return landscapes.joint(0.01, seed=3, units=6)


def levels_of(units, *raised):
    levels = np.zeros((1, units), dtype=int)
    levels[0, list(raised)] = 1
    return levels


def test_landscape_is_additive_with_pairs(landscape, joint):
    for ground, units in ((landscape, 8), (joint, 6)):
        for ratio, gains in ground.additive.items():
            pairs = ground.pairs
            expected = gains[1] + gains[4] + gains[5] + pairs[1, 4] + pairs[1, 5] + pairs[4, 5]
            raised = ground.quality(ratio, levels_of(units, 1, 4, 5))[0]
            assert raised - ground.quality(ratio, levels_of(units))[0] == pytest.approx(expected)


def every(ground):
    return [
        Vector(ratio, bits)
        for ratio, space in ground.spaces.at.items()
        for bits in product((4, 8), repeat=space.units)
        if bits in space
    ]


def test_best_known_hypervolume_is_nearly_that_of_all_vectors(landscape, joint):
    assert landscape.best() == pytest.approx(landscape.hypervolume(every(landscape)), rel=0.02)
    assert joint.best() == pytest.approx(joint.hypervolume(every(joint)), rel=0.001)


def test_hypervolume_of_several_ratios_begins_at_the_smallest_model(joint):
    smallest, largest = joint.spaces.smallest(), Vector(0.0, (4,) * 6)
    assert smallest.ratio == 0.5 and joint.hypervolume([smallest]) == 0
    height = landscapes.LEVELS[0.0][0] - landscapes.LEVELS[0.5][0]
    width = joint.spaces.base + joint.spaces.reach - joint.spaces.memory(largest)
    assert joint.hypervolume([smallest, largest]) == pytest.approx(height * width)
    part = joint.only([0.2])
    assert part.spaces.ratios == [0.2] and part.best() < joint.best()


@pytest.mark.parametrize("name", contenders.SAMPLERS)
def test_every_sampler_proposes_new_feasible_vectors(joint, name):
    priors = joint.told("good", 0)
    spaces = Spaces({ratio: dataclasses.replace(joint.spaces.at[ratio], max_raised=3) for ratio in (0.0, 0.5)}, {})
    contenders.quiet()
    ask = contenders.SAMPLERS[name](spaces, priors, 0)
    past = [Observation(spaces.smallest(), joint.quality_of(spaces.smallest()), 0.01)]
    for _ in range(2):
        vector = ask(past)
        assert vector in spaces and vector not in {seen.vector for seen in past}
        past.append(Observation(vector, joint.quality_of(vector), 0.01))


def test_excess_is_zero_or_less_for_feasible_vectors_only():
    space = Space(100, ((5, 3, 8),), 2, 110)
    for bits in product((4, 8), repeat=3):
        assert (contenders.excess(space, Vector(0.2, bits)) <= 0) == (bits in space)
    assert contenders.binds(space) and not contenders.binds(Space(100, ((5, 3, 8),), 3, None))


def test_replay_of_one_ratio_begins_as_the_search_does(joint):
    curve, _ = samplers.replay(joint, "random:none@0.2", 0, 5)
    assert curve[0] == pytest.approx(joint.hypervolume([Vector(0.2, (4,) * 6)])) and curve == sorted(curve)
    assert len(curve) == 5 and curve[-1] <= joint.hypervolume(every(joint.only([0.2])))
    whole, _ = samplers.replay(joint, "random:good", 0, 4)
    starts = [joint.spaces.smallest(), Vector(0.0, (4,) * 6), Vector(0.0, (8,) * 6), Vector(0.2, (4,) * 6)]
    assert whole == [pytest.approx(joint.hypervolume(starts[:n])) for n in range(1, 5)]


def test_search_that_is_told_another_quality_is_judged_by_this_one(landscape, monkeypatch):
    pasts = []

    def watched(spaces, priors, seed):
        ask = contenders.drawn(spaces, priors, seed)
        return lambda past, pending=(): (pasts.append(list(past)), ask(past))[1]

    monkeypatch.setitem(contenders.SAMPLERS, "random", watched)
    other = dataclasses.replace(landscape, levels={landscapes.ALONE: 50.0})
    told, _ = samplers.replay(landscape, "random:good", 0, 6, other)
    for seen in pasts[-1]:
        assert seen.score == pytest.approx(other.quality_of(seen.vector), abs=0.05)
    assert told == samplers.replay(landscape, "random:good", 0, 6)[0]
    assert pasts[-1][0].score == pytest.approx(0, abs=0.05)


def test_priors_of_each_kind(joint):
    true = joint.priors
    assert joint.told("good", 0) == dict(true)
    kinds = {kind: joint.told(kind, 1) for kind in ("none", "shuffled", "reversed")}
    for ratio, prior in true.items():
        assert set(kinds["none"][ratio].sensitivity) == {kinds["none"][ratio].distance} == {0.0}
        shuffled = kinds["shuffled"][ratio].sensitivity
        assert sorted(shuffled) == sorted(prior.sensitivity) and shuffled != prior.sensitivity
        turned = kinds["reversed"][ratio].sensitivity
        assert np.argsort(turned).tolist() == np.argsort(prior.sensitivity)[::-1].tolist()
    distances = [prior.distance for prior in true.values()]
    misled = [prior.distance for prior in kinds["reversed"].values()]
    assert np.argsort(misled).tolist() == np.argsort(distances)[::-1].tolist() and sorted(misled) == sorted(distances)


def test_quartiles_and_report_by_hand():
    rows = [("", "a", seed, trial, value, 0.5) for seed, value in enumerate((0.9, 0.95, 1.0)) for trial in range(1, 11)]
    table = pd.DataFrame(rows, columns=list(samplers.COLUMNS))
    assert samplers.report(table, 10).splitlines()[2] == "| a | 3 | 0.950 (0.925 to 0.975) | 1 | 0.50 |"


@pytest.mark.parametrize(
    "arm, name",
    [
        ("ours:good", "this project"),
        ("ours:good:1@0.2", "this project, 1 random start, 20 % pruned alone"),
        ("gp:none:5", "Gaussian process (Optuna), no priors, 5 random starts"),
    ],
)
def test_arms_are_named_in_words(arm, name):
    assert samplers.label(arm) == name


def test_arm_that_is_none_is_refused():
    with pytest.raises(ValueError, match="write sampler:prior.*nsga2"):
        samplers.Arm.parse("ours:best")


def test_share_of_raised_units_may_be_limited(joint):
    limited = joint.within(0.5)
    assert all(space.max_raised == 3 for space in limited.spaces.at.values()) and "3 of 6" in limited.about
    assert limited.hypervolume(every(limited)) <= joint.hypervolume(every(joint))


def test_arms_replayed_apart_come_together(landscape, tmp_path, capsys):
    samplers.main(landscape, 2, 6, ["random:none"], tmp_path, 1)
    samplers.main(landscape, 1, 6, ["random:good"], tmp_path, 1)
    kept = pd.read_csv(tmp_path / "samplers.csv")
    assert kept.groupby("arm")["seed"].nunique().to_dict() == {"random:good": 1, "random:none": 2}
    samplers.main(landscape, 1, 6, ["random:none"], tmp_path, 1)
    assert len(pd.read_csv(tmp_path / "samplers.csv")) == 12
    assert (tmp_path / "samplers.png").stat().st_size > 1000
    samplers.main(dataclasses.replace(landscape, about="another"), 1, 6, ["random:good"], tmp_path, 1)
    assert set(pd.read_csv(tmp_path / "samplers.csv")["landscape"]) == {"another"}


def test_recorded_landscape_is_fitted_again(tmp_path, default):
    true = landscapes.joint(0.0, seed=3, units=6).only([0.0, 0.5])
    noise = np.random.default_rng(0)
    sample = random.Random(0).sample(every(true), 100)
    quality = np.array([true.quality_of(vector) for vector in sample])
    table = pd.DataFrame(
        {
            "ratio": [vector.ratio for vector in sample],
            "bits": [bit_text.write(vector.bits) for vector in sample],
            "steps": 0,
            "response_logprob": quality + noise.normal(0, 0.002, len(sample)),
            "response_logprob_stderr": 0.05,
            "gold_logprob": quality,
        }
    )
    table.to_csv(tmp_path / "table.csv", index=False)
    facts = record.facts(default, {"training": true.spaces, "inference": true.spaces}, true.priors)
    (tmp_path / "landscape.json").write_text(json.dumps(facts))
    fitted = landscapes.recorded(tmp_path)
    again = [fitted.quality_of(vector) for vector in every(true)]
    assert again == pytest.approx([true.quality_of(vector) for vector in every(true)], abs=0.01)
    assert 0.001 < fitted.noise < 0.01 and fitted.stderr == pytest.approx(0.05)
    assert "R^2 0.9" in fitted.about
    exact = landscapes.recorded(tmp_path, "gold_logprob", "inference")
    assert exact.noise < fitted.noise and exact.stderr == exact.noise
    assert fitted.spaces == true.spaces and dict(fitted.priors) == {ratio: true.priors[ratio] for ratio in (0.0, 0.5)}


def test_suggestions_are_timed_on_feasible_vectors():
    for ratios in (1, 2):
        ours, theirs = services.suggesters(3, 4, ratios)
        assert isinstance(ours(), Vector) and isinstance(theirs(), Vector)


@pytest.mark.parametrize("name", contenders.SIDE_BY_SIDE)
def test_arms_side_by_side_know_what_is_tried_now(joint, name, monkeypatch):
    asked = []

    def watched(spaces, priors, seed):
        ask = real(spaces, priors, seed)

        def noted(past, pending=()):
            vector = ask(past, pending)
            asked.append((len(past), len(pending), vector in {*pending, *(seen.vector for seen in past)}))
            return vector

        return noted

    real = contenders.SAMPLERS[name]
    monkeypatch.setitem(contenders.SAMPLERS, name, watched)
    curve, _ = samplers.replay(joint, f"{name}:good*3", 0, 14)
    assert len(curve) == 14 and curve == sorted(curve)
    assert asked[-1] == (11, 2, False)  # the last of 14 trials, while two others are at work
    assert {pending for _, pending, _ in asked} == {2} and not any(known for _, _, known in asked)


def test_arm_side_by_side_is_said_and_refused_where_it_is_not_known():
    assert samplers.Arm.parse("ours:good:1@0.2*4").label.endswith("1 random start, 20 % pruned alone, 4 side by side")
    with pytest.raises(ValueError, match="only ours, gp, random know what is tried now"):
        samplers.Arm.parse("tpe:good*4")
