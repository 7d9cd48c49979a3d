import dataclasses
import json
import random
from itertools import product
from types import SimpleNamespace

import banks
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tiny_config

from benchmarks import evidence, granularity, h100, priors, record, samplers
from pipeline import architecture, checks
from pipeline.data import alpaca, tasks
from pipeline.device import Compute
from pipeline.errors import UserError
from pipeline.results.cells import changed
from pipeline.search import surrogate
from pipeline.search.allocate import raised_of
from pipeline.stages import trials
from pipeline.trial import fast, trial
from pipeline.trial.context import Context
from pipeline.trial.result import Result
from tests.fixtures.searches import PRIORS, SPACE, UNITS, result


@pytest.fixture(scope="module")
def landscape():
    return samplers.synthetic(0.01, seed=3, units=10)


def test_landscape_is_additive_with_pairs(landscape):
    raised = np.zeros((1, 10), dtype=bool)
    raised[0, [1, 4, 7]] = True
    gains, pairs = landscape.additive, landscape.pairs
    expected = gains[1] + gains[4] + gains[7] + pairs[1, 4] + pairs[1, 7] + pairs[4, 7]
    assert landscape.quality(raised)[0] == pytest.approx(expected)


def test_best_known_hypervolume_is_nearly_that_of_all_vectors(landscape):
    every = [bits for bits in product((4, 8), repeat=10) if bits in landscape.space]
    assert landscape.best() == pytest.approx(landscape.hypervolume(every), rel=0.02)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_proposes_new_feasible_vectors_and_its_curve_rises(landscape, name):
    curve, _ = samplers.replay(landscape, f"{name}:good", 0, 8)
    assert len(curve) == 8
    assert all(before <= after for before, after in zip(curve, curve[1:], strict=False))


def test_search_that_is_told_another_quality_is_judged_by_this_one(landscape):
    opposed = dataclasses.replace(landscape, additive=-landscape.additive, pairs=-landscape.pairs)
    right, _ = samplers.replay(landscape, "ours:none:0", 0, 10)
    wrong, _ = samplers.replay(landscape, "ours:none:0", 0, 10, opposed)
    assert right[-1] > wrong[-1]
    assert samplers.replay(landscape, "ours:none:0", 0, 10, landscape)[0] == right


def test_priors_of_each_kind(landscape):
    true = landscape.sensitivity
    assert samplers.priors_of(landscape, "good", 0).sensitivity == true
    assert set(samplers.priors_of(landscape, "none", 0).sensitivity) == {0.0}
    shuffled = samplers.priors_of(landscape, "shuffled", 0).sensitivity
    assert sorted(shuffled) == sorted(true) and shuffled != true
    turned = samplers.priors_of(landscape, "reversed", 0).sensitivity
    assert np.argsort(turned).tolist() == np.argsort(true)[::-1].tolist()


def test_quartiles_and_report_by_hand():
    rows = [("", "a", seed, trial, value, 0.5) for seed, value in enumerate((0.9, 0.95, 1.0)) for trial in range(1, 11)]
    table = pd.DataFrame(rows, columns=list(samplers.COLUMNS))
    assert samplers.report(table, 10).splitlines()[2] == "| a | 3 | 0.950 (0.925 to 0.975) | 1 | 0.50 |"


@pytest.mark.parametrize(
    "arm, name",
    [
        ("ours:good", "this project"),
        ("ours:good:1", "this project, 1 random start"),
        ("gp:none:5", "Gaussian process (Optuna), no sensitivities, 5 random starts"),
    ],
)
def test_arms_are_named_in_words(arm, name):
    assert samplers.label(arm) == name


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


def fake(calls, limit):
    def run(context, bits, work):
        calls.append((tuple(bits), work.steps))
        good = result(bits).gold_logprob + work.steps / 10
        later = 9.0  # of items that do not count
        items = [(index % 2, good if index < limit else later) for index in range(work.limit)]
        return Result.from_json(result(bits).as_json() | {"by_item": {"piqa": items, "boolq": items}}), None

    return run


def test_vectors_are_distinct_feasible_and_spread_from_the_start():
    found = record.vectors(SPACE, PRIORS, 12, 0)
    assert len(set(found)) == 12 and all(bits in SPACE for bits in found)
    assert found[0] == (4,) * UNITS
    assert {bits.count(8) for bits in found[:6]} == {0, 1, 2}
    assert record.vectors(SPACE, PRIORS, 5, 0) == found[:5]
    assert len(record.vectors(SPACE, PRIORS, 1000, 0)) == 1 + UNITS + UNITS * (UNITS - 1) // 2


def test_recording_goes_on_where_it_was(tmp_path, default, monkeypatch):
    calls: list = []
    monkeypatch.setattr(trial, "run", fake(calls, default.evaluate.limit))
    record.record(default, None, SPACE, PRIORS, (5, 0), tmp_path)
    table = record.record(default, None, SPACE, PRIORS, (8, 4), tmp_path)
    assert len(calls) == len(set(calls)) == 12
    assert [steps for _, steps in calls] == [0] * 8 + [default.recover.steps] * 4
    kept = pd.read_csv(tmp_path / "table.csv", dtype={"bits": str})
    assert kept["bits"].tolist() == table["bits"].tolist() == ["".join(map(str, bits)) for bits, _ in calls]
    assert {"gold_logprob", "gold_logprob_stderr", "accuracy", "piqa", "peak_memory_bytes"} <= set(kept.columns)
    assert "on 4 vectors: 1.00" in record.agreement(table)
    first = table.iloc[0]
    assert first["gold_logprob"] == pytest.approx(result(calls[0][0]).gold_logprob)
    assert first["accuracy"] == first["piqa"] == 0.5
    limit = default.evaluate.limit
    counts = pd.read_parquet(tmp_path / "items.parquet").groupby(["bits", "steps"], sort=False).size()
    assert counts.tolist() == [2 * limit] * 8 + [4 * limit] * 4


def test_landscapes_of_other_settings_do_not_mix(tmp_path, default, monkeypatch):
    monkeypatch.setattr(trial, "run", fake([], default.evaluate.limit))
    record.record(default, None, SPACE, PRIORS, (2, 0), tmp_path)
    other = dataclasses.replace(SPACE, base=7)
    with pytest.raises(ValueError, match="another model or other settings"):
        record.record(default, None, other, PRIORS, (2, 0), tmp_path)


def test_recorded_landscape_is_fitted_again(tmp_path):
    true = samplers.synthetic(0.0, seed=3, units=10)
    generator, noise = random.Random(0), np.random.default_rng(0)
    vectors = list({true.space.draw(generator) for _ in range(200)})
    quality = true.quality(raised_of(vectors)) - 1.0
    table = pd.DataFrame(
        {
            "bits": ["".join(map(str, bits)) for bits in vectors],
            "steps": 0,
            "gold_logprob": quality + noise.normal(0, 0.002, len(vectors)),
            "gold_logprob_stderr": 0.05,
            "validation_loss": 3.0 - quality,
        }
    )
    table.to_csv(tmp_path / "table.csv", index=False)
    facts = {"base": true.space.base, "deltas": true.space.deltas, "sensitivity": true.sensitivity}
    (tmp_path / "landscape.json").write_text(json.dumps(facts))
    found = samplers.recorded(tmp_path)
    assert found.quality(raised_of(vectors)) == pytest.approx(quality + 1.0, abs=0.01)
    assert 0.001 < found.noise < 0.01 and found.stderr == pytest.approx(0.05)
    assert "R^2 0.9" in found.about
    text = samplers.recorded(tmp_path, "response_logprob")
    assert text.quality(raised_of(vectors)) == pytest.approx(quality + 1.0, abs=0.01) and text.stderr == text.noise
    assert found.space == true.space
    assert surrogate.propose(
        [surrogate.Observation((4,) * 10, 0.0, 0.1)], found.space, found.sensitivity, set(), generator
    )


def test_recording_a_tiny_model_runs_its_trials(tmp_path, tokenizer, raw_params):
    raw_params["evaluate"] |= {"tasks": ["piqa"], "limit": 2}
    raw_params["recover"] |= {
        "target": "answers",
        "answers_weight": 0.0,
        "steps": 1,
        "batch_size": 2,
        "micro_batch_size": 2,
    }
    raw_params["search"] |= {"max_8bit_fraction": 0.5, "average_bits": 5.5}
    settings = checks.parse(raw_params)
    config, state = banks.pruned()
    rows = alpaca.encode(alpaca.read(ROOT / "data/sample/alpaca.jsonl")[:4], tokenizer, settings.recover.max_length)
    context = Context(
        config=config,
        state=state,
        bank=banks.make_bank(tmp_path, config, state),
        tokenizer=tokenizer,
        units=architecture.units(config, "block"),
        tasks=tasks.load(["piqa"], ROOT / "data/sample/benchmarks"),
        train=rows,
        validation=rows[:2],
        settings=trials.settings(settings),
        compute=Compute(torch.device("cpu"), torch.bfloat16),
    )
    space = trials.space(settings, context)
    sizes = [sum(state[f"{name}.weight"].numel() for name in unit.linears) for unit in context.units]
    assert space.sizes == tuple(sizes) and space.average_bits == 5.5
    tiny = dataclasses.replace(PRIORS, sensitivity=(0.1, 0.3, 0.2, 0.4))
    table = record.record(settings, context, space, tiny, (2, 1), tmp_path / "landscape")
    assert table["steps"].tolist() == [0, 0, 1]
    assert table["bits"].tolist()[::2] == ["4444", "4444"]
    assert (table["gold_logprob"] < 0).all() and (table["gold_logprob_stderr"] > 0).all()
    assert table["peak_memory_bytes"].tolist() == [
        context.predict(tuple(map(int, bits))).training for bits in table["bits"]
    ]
    forbidden = changed(settings, "search", seed_bits=("8848",))
    with pytest.raises(UserError, match="search.seed_bits: '8848' is beyond .* average_bits"):
        trials.space(forbidden, context)


def items_of(quality, memory, noise=0.5, tasks=2, count=24):
    """Scores of vectors whose log-probability is their quality and whose accuracy is drawn."""
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 3, (1, tasks, count))  # what an item costs every vector alike
    shape = (len(quality), tasks, count)
    logprob = np.reshape(quality, (-1, 1, 1)) + shared + generator.normal(0, noise, shape)
    metric = generator.integers(0, 2, shape).astype(float)
    return evidence.Items(metric, logprob, np.array(memory, dtype=float), -np.array(quality, dtype=float))


def gained(table):
    return {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table.splitlines()[2:]}


def test_the_objective_that_tells_more_gains_more_on_held_out_items():
    found = gained(evidence.objective(items_of(np.linspace(-1, 0, 10), range(10)), 8, 50))
    assert float(found["gold_logprob"][2]) > float(found["accuracy"][2]) + 0.1
    assert float(found["validation_loss"][2]) >= float(found["gold_logprob"][2])  # here it is the quality itself
    assert float(found["gold_logprob"][4].strip(" |")) > 0.8 > 0.5 > abs(float(found["accuracy"][4].strip(" |")))


def test_only_vectors_that_are_worse_and_no_smaller_are_stopped():
    good = items_of([-1.0, -1.0, -1.0], [3, 2, 1])  # the smaller, the more pointless the others
    line = gained(evidence.hopeless(good, 20))["3"]
    assert float(line[1]) == 0 and float(line[2]) == 0
    bad = items_of([0.0, -5.0, -5.0], [1, 2, 3])
    line = gained(evidence.hopeless(bad, 50))["3"]
    assert 0.8 < float(line[1]) < 1.2  # (a bad vector is stopped if the good one came before: 2 x 1/2)
    assert line[3].strip(" |") == "0.00 %"


def test_items_are_read_as_they_were_recorded(tmp_path):
    rows = record.long("48", 0, {"a": [(1.0, -1.0), (0.0, -2.0)], "b": [(1.0, -3.0), (1.0, -4.0)]})
    rows += record.long("84", 0, {"a": [(0.0, -5.0), (0.0, -6.0)], "b": [(0.0, -7.0), (1.0, -8.0)]})
    rows += record.long("84", 6, {"a": [(1.0, -9.0)], "b": [(1.0, -9.5)]})
    pd.DataFrame(rows).to_parquet(tmp_path / "items.parquet")
    table = pd.DataFrame({"bits": ["84", "48", "84"], "steps": [0, 0, 6], "peak_memory_bytes": [7, 5, 7]})
    table["validation_loss"] = [1.0, 2.0, 3.0]
    table.to_csv(tmp_path / "table.csv", index=False)
    cheap, recovered = (evidence.Items.read(tmp_path, one) for one in (False, True))
    assert cheap.gold_logprob.tolist() == [[[-1, -2], [-3, -4]], [[-5, -6], [-7, -8]]]
    assert cheap.metric.tolist() == [[[1, 0], [1, 1]], [[0, 0], [0, 1]]] and cheap.memory.tolist() == [5, 7]
    assert cheap.validation_loss.tolist() == [2.0, 1.0] and recovered.validation_loss.tolist() == [3.0]
    assert recovered.gold_logprob.tolist() == [[[-9.0], [-9.5]]]


def test_gains_of_units_are_the_falls_of_the_loss():
    true = np.array([0.3, 0.0, -0.1, 0.05, 0.2])
    vectors = priors.drawn(40, 5, seed=1)
    assert vectors.shape == (40, 5) and not vectors[0].any() and vectors[1:].sum(axis=1).tolist() == [1] * 39
    vectors = np.array(list(product((False, True), repeat=5)))
    found, fit = priors.gains(vectors, 3.0 - vectors @ true)
    assert found == pytest.approx(true, abs=1e-4) and fit > 0.999


def test_prior_is_judged_by_what_its_best_quarter_gains():
    true = np.array([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert priors.judged(true, true) == (pytest.approx(1.0), 1.0)
    assert priors.judged(-true, true) == (pytest.approx(-1.0), 0.0)
    assert priors.judged(np.array([1.0, 0, 2, 0, 0, 0, 0, 0]), true)[1] == pytest.approx(6 / 7)


def test_difference_of_granularities_is_paired_over_items():
    first = {share: np.array([-1.0, -2.0, -3.0]) for share in granularity.BUDGETS}
    second = {share: values + np.array([0.1, 0.2, 0.3]) for share, values in first.items()}
    mean, error = granularity.difference(second, first)
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1 / 3**0.5)


def test_best_of_a_front_within_a_budget(tmp_path):
    rows = [
        {"front": True, "bits": "44", "expected": -3.2, "peak_memory_bytes": 10},
        {"front": True, "bits": "84", "expected": -3.0, "peak_memory_bytes": 12},
        {"front": True, "bits": "88", "expected": -2.9, "peak_memory_bytes": 14},
        {"front": False, "bits": "48", "expected": -2.0, "peak_memory_bytes": 11},
    ]
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/pareto.json").write_text(json.dumps(rows))
    assert [granularity.best(tmp_path, budget) for budget in (10, 11, 12, 13, 99)] == ["44", "44", "84", "84", "88"]


# --- what the ways of a GPU are worth ------------------------------------------------------------------------------


def test_search_on_paper_by_hand():
    config = tiny_config(num_hidden_layers=1)
    state = {f"{name}.weight": torch.empty(10) for name in architecture.linears(config)}
    recovery = SimpleNamespace(batch_size=8)
    context = SimpleNamespace(config=config, state=state, settings=SimpleNamespace(recover=recovery))
    tera = 4 * 70 * 183 * 8 * 1000 / 1e12  # operations of a trial's recovery
    lines = [
        {"what": "sample rows: plain", "rows/s": 1.0, "TFLOP/s": tera / 3600},  # an hour a trial
        {"what": "sample rows: + fused adapters", "rows/s": 1.0, "TFLOP/s": tera / 360},
        {"what": "full rows: plain", "rows/s": 1.0, "TFLOP/s": 99.0},
        {"what": "evaluation, items/s; 1", "rows/s": 1400 / 3600},
        {"what": "evaluation, items/s; 2", "rows/s": 1400 / 36},
    ]
    assert [line["times"] for line in h100.on_paper(context, lines)] == pytest.approx([50 * 2, 50 * 0.11])


def test_variants_add_one_way_each_and_graphs_on_a_gpu_alone():
    recovery = SimpleNamespace(batch_size=8, micro_batch_size=4)
    for device, count in (("cpu", 5), ("cuda", 6)):
        context = SimpleNamespace(settings=SimpleNamespace(recover=recovery), device=torch.device(device))
        found = h100.variants(context)
        assert found[0] == ("plain", 4, fast.PLAIN) and len(found) == count
        for (_, _, before), (_, rows, after) in zip(found, found[1:], strict=False):
            changed = [getattr(before, way) != getattr(after, way) for way in ("flat", "packed", "fused", "graphs")]
            assert rows == 8 and sum(changed) == (after != fast.PLAIN)


def test_a_failed_line_is_shown_as_such():
    shown = h100.table([{"what": "a", "rows/s": 2.0, "times": 1 / 3}, {"what": "b", "failed": True}])
    assert shown.splitlines()[2:] == ["| a | 2 | - | - | - | - | 0.3333 |", "| b FAILED | - | - | - | - | - | - |"]
