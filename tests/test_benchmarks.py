import dataclasses
import json
from itertools import product
from types import SimpleNamespace
from typing import get_args

import banks
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tiny_config

from benchmarks import budgets, evidence, granularity, h100, priors, record
from pipeline import architecture, checks
from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.data import alpaca, tasks
from pipeline.device import Compute
from pipeline.errors import UserError
from pipeline.params import Objective
from pipeline.results.cells import changed
from pipeline.search.allocate import Space, Spaces
from pipeline.search.surrogate import Observation
from pipeline.stages import trials
from pipeline.trial import fast, trial
from pipeline.trial.context import Context
from pipeline.trial.result import Result
from tests.fixtures.searches import PRIORS, RATIO, UNITS, result

RATIOS = (0.0, 0.5)
FREE = {
    memory: Spaces({ratio: Space(base - int(400 * ratio), ((10,) * UNITS,), UNITS, None) for ratio in RATIOS}, {})
    for memory, base in (("training", 1000), ("inference", 600))
}
KNOWN = {ratio: PRIORS for ratio in RATIOS}


def fake(calls, limit):
    def run(ratio, bits, work):
        calls.append((Vector(ratio, tuple(bits)), work.steps))
        good = result(bits).gold_logprob + work.steps / 10
        later = 9.0  # of items that do not count
        items = [(index % 2, good if index < limit else later) for index in range(work.limit)]
        by_item = {"piqa": items, "boolq": items}
        return Result.from_json(result(bits).as_json() | {"ratio": ratio, "by_item": by_item}), None

    return run


def recording(settings, counts, folder, spaces=FREE):
    return record.record(settings, lambda ratio: ratio, spaces, KNOWN, counts, folder)


def test_vectors_are_distinct_feasible_and_spread_from_the_start():
    spaces = FREE["training"]
    chosen = record.vectors(spaces, KNOWN, 24, 0)
    assert len(set(chosen)) == 24 and all(vector in spaces for vector in chosen)
    assert chosen[:4] == [Vector(ratio, (width,) * UNITS) for width in (4, 8) for ratio in RATIOS]
    assert [vector.ratio for vector in chosen] == [*RATIOS] * 12
    assert len({vector.bits.count(8) for vector in chosen}) >= 6
    assert record.vectors(spaces, KNOWN, 9, 0) == chosen[:9]
    few = Spaces({ratio: dataclasses.replace(spaces.at[ratio], max_raised=2) for ratio in RATIOS}, {})
    assert len(record.vectors(few, KNOWN, 1000, 0)) == 2 * (1 + UNITS + UNITS * (UNITS - 1) // 2)


def test_vectors_of_a_ratio_are_measured_together():
    chosen = record.vectors(FREE["training"], KNOWN, 40, 0)
    order = record.jobs(chosen, 3, 6)
    assert sorted(order) == sorted([(vector, 0) for vector in chosen] + [(vector, 6) for vector in chosen[:3]])
    assert [vector.ratio for vector, _ in order[:32]] == [*[0.0] * 8, *[0.5] * 8] * 2
    assert set(order[:16]) == {(vector, 0) for vector in chosen[:16]}


def test_recording_goes_on_where_it_was(tmp_path, default, monkeypatch):
    calls: list = []
    monkeypatch.setattr(trial, "run", fake(calls, default.evaluate.limit))
    recording(default, (5, 0), tmp_path)
    table = recording(default, (8, 4), tmp_path)
    assert len(calls) == len(set(calls)) == 12
    assert [steps for _, steps in calls] == [0] * 8 + [default.recover.steps] * 4
    kept = pd.read_csv(tmp_path / "table.csv", dtype={"bits": str})
    measured = [bit_text.write_vector(vector) for vector, _ in calls]
    for rows in (kept, table):
        assert [f"{ratio:g}:{bits}" for ratio, bits in zip(rows["ratio"], rows["bits"], strict=True)] == measured
    objectives = [f"{name}{end}" for name in get_args(Objective) for end in ("", "_stderr")]
    assert {*objectives, "piqa", "peak_memory_bytes", "inference_memory_bytes"} <= set(kept.columns)
    assert "on 4 vectors" in record.agreement(table)
    first = table.iloc[0]
    assert first["gold_logprob"] == pytest.approx(result(calls[0][0].bits).gold_logprob)
    assert first["accuracy"] == first["piqa"] == 0.5
    limit = default.evaluate.limit
    counts = pd.read_parquet(tmp_path / "items.parquet").groupby(["ratio", "bits", "steps"], sort=False).size()
    assert counts.tolist() == [2 * limit] * 8 + [4 * limit] * 4


def test_items_without_their_row_are_measured_again(tmp_path, default, monkeypatch):
    calls: list = []
    monkeypatch.setattr(trial, "run", fake(calls, default.evaluate.limit))
    recording(default, (3, 0), tmp_path)
    table = tmp_path / "table.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))  # killed between the two files
    recording(default, (3, 0), tmp_path)
    assert len(calls) == 4 and calls[-1] == calls[2]
    sizes = pd.read_parquet(tmp_path / "items.parquet").groupby(["ratio", "bits"]).size()
    assert sizes.tolist() == [2 * default.evaluate.limit] * 3


def test_landscapes_of_other_settings_do_not_mix(tmp_path, default, monkeypatch):
    monkeypatch.setattr(trial, "run", fake([], default.evaluate.limit))
    recording(default, (2, 0), tmp_path)
    smaller = Spaces({ratio: dataclasses.replace(space, base=7) for ratio, space in FREE["training"].at.items()}, {})
    with pytest.raises(ValueError, match="another model or other settings"):
        recording(default, (2, 0), tmp_path, FREE | {"training": smaller})


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
        ratio=RATIO,
    )
    loaded = SimpleNamespace(folders={RATIO: None}, at={RATIO: context}.__getitem__)
    limited = trials.spaces(settings, loaded).at[RATIO]
    sizes = [sum(state[f"{name}.weight"].numel() for name in unit.linears) for unit in context.units]
    assert limited.sizes == tuple(sizes) and limited.average_bits == 5.5
    tiny = dataclasses.replace(PRIORS, sensitivity=(0.1, 0.3, 0.2, 0.4))
    free = record.unlimited(settings, loaded)
    assert all((8,) * 4 in spaces.at[RATIO] for spaces in free.values())
    table = record.record(settings, loaded.at, free, {RATIO: tiny}, (2, 1), tmp_path / "landscape")
    assert table["steps"].tolist() == [0, 0, 1]
    assert table["bits"].tolist() == ["4444", "8888", "4444"]
    assert (table["gold_logprob"] < 0).all() and (table["gold_logprob_stderr"] > 0).all()
    for memory, column in (("training", "peak_memory_bytes"), ("inference", "inference_memory_bytes")):
        predicted = [free[memory].at[RATIO].memory(bit_text.read(bits)) for bits in table["bits"]]
        assert table[column].tolist() == predicted
    forbidden = changed(settings, "search", seed_bits=("8848",))
    with pytest.raises(UserError, match="search.seed_bits: '8848' is beyond .* average_bits"):
        trials.spaces(forbidden, loaded)


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
    rows = record.long(Vector(0.2, (4, 8)), 0, {"a": [(1.0, -1.0), (0.0, -2.0)], "b": [(1.0, -3.0), (1.0, -4.0)]})
    rows += record.long(Vector(0.5, (8, 4)), 0, {"a": [(0.0, -5.0), (0.0, -6.0)], "b": [(0.0, -7.0), (1.0, -8.0)]})
    rows += record.long(Vector(0.5, (8, 4)), 6, {"a": [(1.0, -9.0)], "b": [(1.0, -9.5)]})
    pd.DataFrame(rows).to_parquet(tmp_path / "items.parquet")
    table = pd.DataFrame(
        {"ratio": [0.5, 0.2, 0.5], "bits": ["84", "48", "84"], "steps": [0, 0, 6], "peak_memory_bytes": [7, 5, 7]}
    )
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


def test_aims_by_hand():
    lines = [
        {"what": "sample rows: plain", "loss": 3.25},
        {"what": "sample rows: + fused adapters", "loss": 3.0, "times": 5.5, "peak, GiB": 1.0, "predicted": 2.0},
        {"what": "full rows: plain", "peak, GiB": 10.0, "predicted": 10.05},
        {"what": "full rows: + fused adapters", "TFLOP/s": 199.0, "times": 4.0, "peak, GiB": 5.0, "predicted": 4.9},
        {"what": "evaluation, items/s; 8192 tokens a pass", "times": 1.0},
        {"what": "evaluation, items/s; 32768 tokens a pass", "times": 2.0, "peak, GiB": 4.0, "predicted": 4.0},
        {"what": "hours of a search on paper: + fused adapters", "times": 2.4},
        {"what": h100.SEARCH, "times": 3.0, "failed": True},
    ]
    found = [(value, met) for _, value, _, met in h100.aims(lines)]
    assert found[:4] == [("5.5", "yes"), ("199", "no"), ("0.25", "no"), ("2", "yes")]
    assert found[4:] == [("2.4", "yes"), ("-", "not measured"), ("2", "no")]
    assert {met for *_, met in h100.aims([])} == {"not measured"}


def test_a_part_that_fails_leaves_the_others_to_be_measured(monkeypatch, tmp_path, capsys):
    def breaks(context, bits):
        yield {"what": "profile: plain", "times": 0.5}
        raise RuntimeError("no such kernel")

    for name in ("recoveries", "evaluations", "on_paper"):
        monkeypatch.setattr(h100, name, lambda *_, name=name: iter([{"what": f"of {name}"}]))
    monkeypatch.setattr(h100, "profiled", breaks)
    lines = h100.measure(SimpleNamespace(units=[None] * 5), tmp_path / "lines.json")
    others = ["of recoveries", "of evaluations", "of on_paper"]
    assert [line["what"] for line in lines] == ["profile: plain", "profile", *others]
    assert [line["what"] for line in lines if line.get("failed")] == ["profile"]
    assert json.loads((tmp_path / "lines.json").read_text()) == lines
    assert "no such kernel" in capsys.readouterr().err


def quality(vector):
    return sum((unit + 1) * (width == 8) for unit, width in enumerate(vector.bits)) / 100 - 2 * vector.ratio


def test_choice_at_a_budget_fits_and_nears_the_best_of_all():
    spaces, calls = FREE["training"], []

    def attempt(vector):
        calls.append(vector)
        return Observation(vector, quality(vector), 1e-3)

    levels = budgets.levels(spaces, 3)
    assert levels == [846, 940, 1033]  # from 800 to 1080
    chosen = budgets.searched(spaces, KNOWN, levels, attempt, budgets.Options(trials=10, more=3), 0)
    assert len(calls) == len(set(calls)) == 19
    for budget, vector in zip(levels, chosen, strict=True):
        assert spaces.memory(vector) <= budget
        fitting = [Vector(ratio, bits) for ratio in RATIOS for bits in product((4, 8), repeat=UNITS)]
        best = max(quality(each) for each in fitting if spaces.memory(each) <= budget)
        assert quality(vector) >= best - 0.06
    alone = budgets.searched(budgets.only(spaces, 0.0), KNOWN, levels, attempt, budgets.Options(4, 1), 0)
    assert alone[:2] == [None, None] and alone[2].ratio == 0  # unpruned it takes 1000 at least


def test_models_without_a_search_stand_at_the_papers_ratio_and_unpruned():
    models = budgets.named(FREE["training"], KNOWN)
    assert models["LLM-Pruner (16-bit)"] == Vector(0.5, (16,) * UNITS)
    assert models["QPruner2"] == Vector(0.5, (4, 8, 4, 8, 4, 4, 4, 4))  # a quarter, by mutual information
    assert models["unpruned, all 8"] == Vector(0.0, (8,) * UNITS)
