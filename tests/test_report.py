import base64
import dataclasses
import random
import re

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer

from pipeline import GIB
from pipeline.results import report
from pipeline.search.pareto import Point

PNG = b"\x89PNG\r\n\x1a\n"


def point(method, score=0.5, memory=GIB, bits="4484", stderr=0.025):
    metrics = {"boolq": 0.6, "boolq_stderr": 0.04, "accuracy": score, "accuracy_stderr": stderr} | {
        "gold_logprob": -1.5,
        "response_logprob": -2.25,
        "gold_logprob_stderr": 0.125,
    }
    return Point("a" * 32, f"trial {method}", method, bits, score, stderr, memory, "predicted", False, metrics)


def width_of(png):
    content = png.read_bytes()
    assert content.startswith(PNG)
    return int.from_bytes(content[16:20], "big")


@pytest.mark.parametrize(
    "bits, expected",
    [
        ("16", "16"),
        ("4444", "all 4"),
        ("8888", "all 8"),
        ("4484", "1 of 4 at 8"),
        ("84848", "3 of 5 at 8"),
        ("4", "all 4"),
    ],
)
def test_summary(bits, expected):
    assert report.summary(bits) == expected


def test_methods_are_references_then_qpruner_1_2_then_the_best_of_the_front():
    every = [point(name) for name in ("sampler", "qpruner2", "dense", "qpruner1", "uniform8", "llm_pruner", "random")]
    members = [point("random", 0.6, 9), point("sampler", 0.7, 8), point("random", 0.7, 7)]
    rows = report.methods(every, members)
    assert [label for label, _ in rows] == [
        "untouched", "LLM-Pruner (16-bit)", "uniform 8-bit", "QPruner1", "QPruner2", "QPruner3",
    ]  # fmt: skip
    assert [one.method for _, one in rows[:-1]] == ["dense", "llm_pruner", "uniform8", "qpruner1", "qpruner2"]
    assert rows[-1][1] is members[2]


def test_methods_of_an_empty_front_have_no_qpruner3():
    assert [label for label, _ in report.methods([point("dense")], [])] == ["untouched"]


def test_method_table_by_hand():
    columns, rows = report.method_table([("QPruner1", point("qpruner1", 0.5125, 3 * GIB // 2))], ["boolq"])
    assert columns == ["method", "boolq", "mean", "gold log-prob.", "response", "memory, GiB", "bits"]
    assert rows == [["QPruner1", "60.0 ± 4.0", "51.2 ± 2.5", "-1.500 ± 0.125", "-2.250", "1.500", "1 of 4 at 8"]]


def test_method_table_without_tasks_has_no_task_columns():
    columns, rows = report.method_table([("x", point("dense", bits="16"))], ())
    assert columns == ["method", "mean", "gold log-prob.", "response", "memory, GiB", "bits"]
    assert rows == [["x", "50.0 ± 2.5", "-1.500 ± 0.125", "-2.250", "-", "16"]]


def test_front_table_by_hand():
    member = dataclasses.replace(point("random", 0.25, GIB // 4, "4488"), expected=0.24, probability=0.876)
    columns, rows = report.front_table([member], "accuracy")
    assert columns == [
        "trial", "method", "mean accuracy, %", "expected", "mean acc., %", "P(front)", "GiB", "bits"
    ]  # fmt: skip
    assert rows == [["trial random", "random", "25.0 ± 2.5", "24.0", "25.0 ± 2.5", "0.88", "0.2500", "4488"]]


def test_long_bit_strings_are_summed_up_where_room_is_short():
    members = [point("a", bits="48" * 16), point("b", bits="4448" * 30), point("c", bits="16")]
    shown = [row[-1] for row in report.front_table(members, "accuracy", 32)[1]]
    assert shown == ["48" * 16, "30 of 120 at 8", "16"]
    assert [row[-1] for row in report.front_table(members, "accuracy")[1]] == [one.bits for one in members]


def test_front_table_of_log_probabilities_is_in_nats_with_accuracy_beside():
    member = dataclasses.replace(point("random"), score=-1.23456, stderr=0.05, expected=-1.3)
    columns, rows = report.front_table([member], "gold_logprob")
    assert columns[2] == "gold, nats"
    assert rows[0][2:6] == ["-1.235 ± 0.050", "-1.300", "50.0 ± 2.5", "-"]


@pytest.mark.parametrize(
    "members",
    [[point("a")], [point("a"), point("b", bits="8444"), point("c", bits="16")], []],
    ids=["one", "three", "empty"],
)
def test_heat_map_writes_a_picture(tmp_path, members):
    report.heat_map(members, ["0", "1", "2", "3"], tmp_path / "bits.png")
    assert width_of(tmp_path / "bits.png") > 300


def test_heat_map_grows_with_the_units(tmp_path):
    for units in (4, 48):
        report.heat_map([point("a", bits="48" * (units // 2))], list(map(str, range(units))), tmp_path / f"{units}.png")
    assert width_of(tmp_path / "48.png") > 1.5 * width_of(tmp_path / "4.png")


def test_bands_have_a_row_for_each_part_of_a_block_and_a_gap_below():
    (band,) = report.bands(["48448844"], units=8, parts=4)  # two blocks of four parts
    assert band[:4].tolist() == [[4, 8], [8, 8], [4, 4], [4, 4]]
    assert np.isnan(band[4]).all()


def test_bands_of_blocks_are_single_rows():
    assert report.bands(["4484", "8444"], units=4, parts=1).tolist() == [[[4, 4, 8, 4]], [[8, 4, 4, 4]]]


def test_pictures_of_finer_units_are_as_wide_as_those_of_blocks(tmp_path):
    for name, units in (("block", range(30)), ("group", [f"{i}.{part}" for i in range(30) for part in "abcd"])):
        report.heat_map([point("a", bits="4" * len(units))], list(map(str, units)), tmp_path / f"{name}.png")
    assert width_of(tmp_path / "group.png") == width_of(tmp_path / "block.png")


@pytest.mark.parametrize("series", [{"one": [1, 2]}, {"one": [1, 2], "two": [-3.5, 0]}])
def test_bar_chart_writes_a_picture(tmp_path, series):
    report.bar_chart(["0", "1"], series, tmp_path / "bars.png")
    assert width_of(tmp_path / "bars.png") > 300


def test_bars_are_of_16_bit_uniform_4_bit_and_mixed_bits():
    every = [point(name, memory=index) for index, name in enumerate(("qpruner2", "dense", "qpruner1", "llm_pruner"))]
    bars = report.bars_of(report.methods(every, [point("random", memory=9)]), ["boolq"])
    assert [(one.label, one.memory) for one in bars] == [("LLM-Pruner (16-bit)", 3), ("QPruner1", 2), ("QPruner3", 9)]
    assert bars[0].tasks == {"boolq": (0.6, 0.04)}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_accuracy_and_memory_writes_a_picture(tmp_path, count):
    bars = [report.Bars(str(index), {"boolq": (0.5, 0.1)}, GIB) for index in range(count)]
    report.accuracy_and_memory({"one": bars, "two": bars}, ["boolq"], tmp_path / "bars.png")
    assert width_of(tmp_path / "bars.png") > 300


def test_benchmark_fronts_has_a_panel_a_benchmark(tmp_path):
    points = [point("a"), point("b", 0.4, 2 * GIB), point("c", 0.6, 3 * GIB)]
    for count in (1, 3, 5):
        report.benchmark_fronts({str(index): points for index in range(count)}, tmp_path / f"{count}.png")
    widths = [width_of(tmp_path / f"{count}.png") for count in (1, 3, 5)]
    assert widths[0] < widths[1] < widths[2]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, kept instead of saved."""
    kept = []
    monkeypatch.setattr(report, "_save", lambda figure, path: kept.append(figure))
    yield kept
    pyplot.close("all")


def test_figure_1_has_a_bar_with_its_error_and_a_marker_of_memory_for_each_method_and_task(drawn):
    panels = {
        "20 %": [
            report.Bars("LoRA", {"boolq": (0.6, 0.04), "piqa": (0.75, 0.02)}, 3 * GIB),
            report.Bars("LoftQ", {"boolq": (0.5, 0.03), "piqa": (0.7, 0.01)}, GIB // 2),
        ],
        "50 %": [report.Bars("LoRA", {"boolq": (0.4, 0.05), "piqa": (0.3, 0.06)}, 2 * GIB)],
    }
    report.accuracy_and_memory(panels, ["piqa", "boolq"], None)
    (figure,) = drawn
    axes, markers = figure.axes[:2], figure.axes[2:]
    assert [one.get_title(loc="left") for one in axes] == list(panels)
    found = []
    for left, right in zip(axes, markers, strict=True):
        assert [label.get_text() for label in left.get_xticklabels()] == ["piqa", "boolq"]
        methods = [one for one in left.containers if isinstance(one, BarContainer)]
        for bars, line in zip(methods, right.lines, strict=True):
            assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(list(line.get_xdata()))
            heights = [bar.get_height() for bar in bars]
            errors = [height for whisker in bars.errorbar.lines[2][0].get_segments() for _, height in whisker]
            found.append((bars.get_label(), heights, errors, list(line.get_ydata())))
    assert found == [
        ("LoRA", pytest.approx([75, 60]), pytest.approx([73, 77, 56, 64]), [3, 3]),
        ("LoftQ", pytest.approx([70, 50]), pytest.approx([69, 71, 47, 53]), [0.5, 0.5]),
        ("LoRA", pytest.approx([30, 40]), pytest.approx([24, 36, 35, 45]), [2, 2]),
    ]


def better(one, other):
    """Whether (accuracy, memory) is no worse in both and differs."""
    return one[0] >= other[0] and one[1] <= other[1] and one != other


@pytest.mark.parametrize("seed", range(3))
def test_figures_3_and_4_highlight_what_no_trial_dominates_in_each_benchmark(drawn, seed):
    generator = random.Random(seed)
    trials, points = {}, {}
    for task in ("boolq", "piqa", "arc_easy", "winogrande", "hellaswag"):
        trials[task] = [(generator.randrange(8) / 8, generator.randrange(1, 9)) for _ in range(30)]  # some are equal
        points[task] = [
            dataclasses.replace(point("sampler", score, memory * GIB), run_id=f"{index}")
            for index, (score, memory) in enumerate(trials[task])
        ]
        points[task].append(dataclasses.replace(point("dense", 1.0, 0), run_id="dense", reference=True))
    report.benchmark_fronts(points, None)
    axes = [one for one in drawn[0].axes if one.get_visible()]
    assert [one.get_title() for one in axes] == list(trials)
    for panel, every in zip(axes, trials.values(), strict=True):
        front = [one for one in every if not any(better(other, one) for other in every)]
        rest = [one for one in every if one not in front]
        shown = {}
        for group in panel.containers:
            red, _, blue = to_rgb(group.lines[0].get_color())
            shown[red > 2 * blue] = [tuple(place) for place in group.lines[0].get_xydata().tolist()]
        for red, wanted in ((True, front), (False, rest)):
            assert sorted(shown[red]) == sorted((memory, 100 * score) for score, memory in wanted)


@pytest.fixture
def written(tmp_path):
    picture = tmp_path / "front.png"
    picture.write_bytes(PNG + b"picture")
    sections = [("A <b>title</b>", ["name", "a & b"], [["x<y", "<script>alert(1)</script>"], ["second", "2"]])]
    paths = report.write(sections, ["memory < 5 & more"], {"it's <here>": picture}, tmp_path)
    return [path.read_text(encoding="utf-8") for path in paths], paths


def test_write_makes_markdown_and_html(written, tmp_path):
    assert written[1] == [tmp_path / "report.md", tmp_path / "report.html"]


def test_markdown_holds_facts_tables_and_links(written):
    lines = written[0][0].splitlines()
    for line in ("# QPruner report", "- memory < 5 & more", "| name | a & b |", "| --- | --- |", "| second | 2 |"):
        assert line in lines
    assert "![it's <here>](front.png)" in lines


def test_html_escapes_all_that_is_not_its_own(written):
    page = written[0][1]
    for raw in ("<script", "<b>", "x<y", "<here>", "< 5", "it's"):
        assert raw not in page
    for escaped in (
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "A &lt;b&gt;title&lt;/b&gt;",
        "memory &lt; 5 &amp; more",
        "alt='it&#x27;s &lt;here&gt;'",
        "<th>a &amp; b",
    ):
        assert escaped in page


def test_html_is_self_contained(written):
    page = written[0][1]
    (data,) = re.findall(r"src='data:image/png;base64,([^']*)'", page)
    assert base64.b64decode(data) == PNG + b"picture"
    assert not re.search(r"(src|href)\s*=\s*['\"]?https?:", page)
    assert page.count("<tr>") == 3
