import json

import pytest
import torch
from conftest import ROOT, tiny_model

from benchmarks import harness, perplexity, services
from benchmarks.harness import BAR, MEASURED, less_is_better, more_is_better


def test_ratio_above_one_means_ours_is_better_whichever_way_the_unit_goes():
    rate, seconds = more_is_better(30.0, 10.0, "items/s", 3), less_is_better(2.0, 8.0, "s", 3)
    assert (rate.ratio, seconds.ratio) == (3.0, 4.0)
    assert more_is_better(10.0, 30.0, "items/s", 3).ratio < 1 and less_is_better(8.0, 2.0, "s", 3).ratio < 1
    assert "more is better" in rate.unit and "less is better" in seconds.unit
    assert all("ratio > 1: ours is better" in one.unit for one in (rate, seconds))


def test_unit_says_what_is_no_measurement():
    bar = less_is_better(2.0, 5.0, "s", 3, BAR)
    assert "theirs is a bar" in bar.unit and bar.against == BAR
    assert "theirs" not in less_is_better(2.0, 5.0, "s", 3).unit and rate_of(MEASURED) == MEASURED


def rate_of(against):
    return more_is_better(1.0, 2.0, "rows/s", 1, against).against


def test_no_difference_at_all_has_no_ratio():
    assert less_is_better(0.0, 1e-3, "nats", 1).ratio is None


def test_sides_take_turns_and_each_gives_its_median():
    order, values = [], {"ours": iter([5.0, 1.0, 3.0]), "theirs": iter([10.0, 90.0, 20.0])}

    def side(name):
        def measure():
            order.append(name)
            return next(values[name])

        return measure

    assert harness.interleaved(side("ours"), side("theirs"), repeats=3) == [3.0, 20.0]
    assert order == ["ours", "theirs"] * 3


def test_kept_figures_stay_when_others_are_measured(tmp_path):
    path = tmp_path / "reports" / "bench.json"
    path.parent.mkdir()
    first = {"evaluation": more_is_better(2.0, 1.0, "items/s", 3), "query": less_is_better(1.0, 2.0, "s", 3)}
    harness.keep(path, first)
    harness.keep(path, {"query": less_is_better(0.5, 2.0, "s", 5)})
    found = harness.read(path)
    assert found["evaluation"] == first["evaluation"]
    assert (found["query"].ours, found["query"].ratio, found["query"].n) == (0.5, 4.0, 5)
    assert json.loads(path.read_text())["query"]["theirs"] == 2.0


def test_write_that_is_interrupted_leaves_the_kept_figures(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    harness.keep(path, {"query": less_is_better(1.0, 2.0, "s", 3)})
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        harness.keep(path, {"evaluation": more_is_better(2.0, 1.0, "items/s", 3)})
    assert path.read_text() == before


def test_run_keeps_what_it_measured_before_a_failure_and_shows_it(tmp_path, monkeypatch, capsys):
    from benchmarks import bench
    from benchmarks.setup import Options

    def broken(setup):
        raise FileNotFoundError("artifacts/bank: not there; run: dvc repro quantize")

    def absent(setup):
        raise harness.LeftOut("no such thing here")

    fakes = {
        "first": lambda setup: {"first": more_is_better(float(setup.options.repeats), 2.0, "items/s", 1)},
        "broken": broken,
        "absent": absent,
        "last": lambda setup: {"last": less_is_better(1.0, 3.0, "s", 1, BAR)},
    }
    monkeypatch.setattr(bench, "MEASUREMENTS", fakes)
    assert bench.run(list(fakes), Options(repeats=8), tmp_path) == 1
    said = capsys.readouterr().out
    assert "run: dvc repro quantize" in said and "absent is left out: no such thing here" in said
    found = harness.read(tmp_path / "bench.json")
    assert {name: one.ratio for name, one in found.items()} == {"first": 4.0, "last": 3.0}
    page = (tmp_path / "bench.md").read_text()
    assert "| first | 8 | 2 | 4 |" in page and "theirs is a bar" in page
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_unknown_name_is_refused_with_the_names_there_are(capsys):
    from benchmarks import bench

    with pytest.raises(SystemExit):
        bench.main(["evaluatoin"])
    assert "no measurement is called evaluatoin; there are evaluation, recovery" in capsys.readouterr().err


def test_exponent_is_the_slope_on_logarithmic_axes():
    from benchmarks.growth import Series

    assert Series("trial", "items", ((1, 3.0), (2, 12.0), (4, 48.0))).exponent == pytest.approx(2.0)
    assert Series("trial", "items", ((10, 5.0), (1000, 5.0))).exponent == pytest.approx(0.0)


def test_search_on_paper_is_the_sum_of_its_phases_by_hand():
    from benchmarks.growth import Assumptions, on_paper

    assumed = Assumptions(
        parameters=1e9,
        layers=32,
        trials=10,
        steps=5,
        batch_size=4,
        items=50,
        flops=1e12,
        training_share=0.5,
        inference_share=0.25,
        bytes_per_second=1e9,
    )
    found = on_paper(assumed, row_tokens=100.0, item_tokens=20.0, suggestion=0.5)
    assert found["recovery"] == pytest.approx(10 * (5 * 4 * 100) * 4e9 / 0.5e12)  # 160 s
    assert found["evaluation"] == pytest.approx(10 * (50 * 20) * 2e9 / 0.25e12)  # 80 s
    assert found["assembly"] == pytest.approx(5.0) and found["suggestion"] == pytest.approx(5.0)
    assert found["whole search"] == pytest.approx(160 + 80 + 5 + 5)


def test_front_of_stored_trials_is_queried(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # whose params the recorder reads
    found = services.query_seconds((2, 5), 1)
    assert list(found) == [2, 5] and all(seconds > 0 for pair in found.values() for seconds in pair)


def test_losses_of_perplexity_are_the_models_own_window_by_window(tokenizer):
    model, text = tiny_model(), (ROOT / "data/sample/alpaca.jsonl").read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    windows = [torch.tensor([tokens[256 * index : 256 * (index + 1)]]) for index in range(5)]
    with torch.no_grad():
        expected = torch.stack([model(input_ids=part, labels=part).loss for part in windows])
    torch.testing.assert_close(perplexity.losses(model, tokenizer, text, 5), expected, rtol=1e-5, atol=0)
    assert expected.std() > 0.01  # so that windows are told apart


def test_figures_that_are_kept_are_not_measured_again(tmp_path):
    from benchmarks.recovery import kept

    file, calls = tmp_path / "kept.json", []

    def measure(value):
        calls.append(value)
        return {"value": value}

    assert kept(file, "a", lambda: measure(1)) == kept(file, "a", lambda: measure(2)) == {"value": 1}
    assert kept(file, "b", lambda: measure(3)) == {"value": 3} and kept(file, "a", lambda: measure(4)) == {"value": 1}
    assert calls == [1, 3]
