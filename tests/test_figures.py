import dataclasses
import itertools
import random

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from points import point

from pipeline import GIB
from pipeline.results import figures, labels, style

PNG = b"\x89PNG\r\n\x1a\n"


def width_of(png):
    content = png.read_bytes()
    assert content.startswith(PNG)
    return int.from_bytes(content[16:20], "big")


def overlap(one, other):
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


@pytest.mark.parametrize("seed", range(5))
def test_labels_cover_no_point_and_no_other_label(tmp_path, seed):
    generator = random.Random(seed)
    places = [(generator.random(), generator.random()) for _ in range(14)]
    with style.picture(tmp_path / "labels.png", (8, 5)) as (figure, grid):
        axes = grid[0, 0]
        axes.plot(*zip(*places, strict=True), "o")
        axes.margins(0.2)
        figure.tight_layout()
        points = style.boxes_of(axes, *zip(*places, strict=True), [0.02] * len(places), 4)
        placed = style.place_labels(axes, [(x, y, f"trial {index}") for index, (x, y) in enumerate(places)], points)
    assert len(placed) == 14
    assert not any(overlap(label, taken) for label in placed for taken in points)
    assert not any(overlap(*pair) for pair in itertools.combinations(placed, 2))


def test_labels_of_points_side_by_side_move_apart(tmp_path):
    with style.picture(tmp_path / "labels.png", (4, 3)) as (figure, grid):
        axes = grid[0, 0]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        figure.tight_layout()
        places = [(0.5, 0.5, "QPruner3"), (0.51, 0.5, "QPruner2"), (0.52, 0.5, "QPruner1")]
        first, second, third = style.place_labels(axes, places, [])
    assert not (overlap(first, second) or overlap(first, third) or overlap(second, third))


def test_labels_stay_within_the_axes(tmp_path):
    with style.picture(tmp_path / "labels.png", (4, 3)) as (figure, grid):
        axes = grid[0, 0]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        figure.tight_layout()
        (box,) = style.place_labels(axes, [(1.0, 1.0, "a corner")], [])
        left, bottom, right, top = axes.get_window_extent().extents
    assert left <= box[0] and bottom <= box[1] and box[2] <= right + 1e-6 and box[3] <= top + 1e-6


def test_steps_go_level_then_up(tmp_path):
    with style.picture(tmp_path / "steps.png", (4, 3)) as (_, grid):
        axes = grid[0, 0]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        level, rise = style.steps_of(axes, [(0.2, 0.3), (0.6, 0.7)])
        (x, y), (next_x, next_y) = axes.transData.transform([(0.2, 0.3), (0.6, 0.7)])
    assert level == pytest.approx((x, y - 1, next_x, y + 1))
    assert rise == pytest.approx((next_x - 1, y, next_x + 1, next_y))


def test_picture_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), style.picture(tmp_path / "new.png", (2, 2)):
        raise KeyError
    assert not list(tmp_path.iterdir())


def study():
    """Three trials, the last two on the front, and two references."""
    return [
        point("qpruner2", 0.4, 2 * GIB, name="trial 2", run_id="b"),
        point("qpruner1", 0.45, GIB, name="trial 1", run_id="a", expected=0.45),
        point("sampler", 0.6, 2 * GIB, name="trial 3", run_id="c", expected=0.55),
        point("dense", 0.9, GIB, name="dense", run_id="d", reference=True),
        point("llm_pruner", 0.8, 4 * GIB, name="llm_pruner", run_id="e", reference=True),
    ]


def texts(axes):
    return {text.get_text() for text in axes.texts}


def test_front_names_methods_trials_and_qpruner3(drawn):
    points = study()
    figures.front(points, points[1:3], "accuracy", None)
    trials, everything = drawn[0].axes
    assert texts(trials) == {"QPruner1, trial 1", "QPruner2, trial 2", "QPruner3, trial 3"}
    assert texts(everything) == {"QPruner1", "QPruner2", "QPruner3", "LLM-Pruner (16-bit)"}
    assert {text.get_text() for text in everything.get_legend().get_texts()} == {
        "Pareto front", "trial", "reference", "untouched",
    }  # fmt: skip
    assert trials.get_ylabel() == "mean accuracy, %"


def test_front_without_references_has_one_panel(drawn):
    points = study()[:3]
    figures.front(points, points[1:], "accuracy", None)
    assert len(drawn[0].axes) == 1


@pytest.mark.parametrize("points", [[], study()[3:]], ids=["nothing", "references_only"])
def test_front_of_no_trial_is_drawn(tmp_path, points):
    figures.front(points, [], "boolq", tmp_path / "front.png")
    assert width_of(tmp_path / "front.png") > 300


@pytest.mark.parametrize(
    "objective, factor, label",
    [
        ("gold_logprob", 1, "log-probability of the gold answer, nats"),
        ("accuracy", 100, "mean accuracy, %"),
        ("boolq", 100, "BoolQ, %"),
        ("sciq", 100, "sciq, %"),
    ],
)
def test_scale_of_an_objective(objective, factor, label):
    assert labels.scale(objective) == (factor, label)


@pytest.mark.parametrize(
    "members",
    [[point("a")], [point("a"), point("b", bits="8444"), point("c", bits="f844")], []],
    ids=["one", "three", "empty"],
)
def test_heat_map_writes_a_picture(tmp_path, members):
    figures.heat_map(members, ["0", "1", "2", "3"], tmp_path / "bits.png")
    assert width_of(tmp_path / "bits.png") > 300


def test_heat_map_grows_with_the_units(tmp_path):
    for units in (4, 48):
        figures.heat_map(
            [point("a", bits="48" * (units // 2))], list(map(str, range(units))), tmp_path / f"{units}.png"
        )
    assert width_of(tmp_path / "48.png") > 1.5 * width_of(tmp_path / "4.png")


def test_bands_have_a_row_for_each_part_of_a_block_and_a_gap_below():
    (band,) = figures.bands(["48448844"], units=8, parts=4)  # two blocks of four parts
    assert band[:4].tolist() == [[0, 1], [1, 1], [0, 0], [0, 0]]
    assert np.isnan(band[4]).all()


def test_bands_of_blocks_are_single_rows():
    assert figures.bands(["4484", "844f"], units=4, parts=1).tolist() == [[[0, 0, 1, 0]], [[1, 0, 0, 2]]]


def test_pictures_of_finer_units_are_as_wide_as_those_of_blocks(tmp_path):
    for name, units in (("block", range(30)), ("group", [f"{i}.{part}" for i in range(30) for part in "abcd"])):
        figures.heat_map([point("a", bits="4" * len(units))], list(map(str, units)), tmp_path / f"{name}.png")
    assert width_of(tmp_path / "group.png") == width_of(tmp_path / "block.png")


@pytest.mark.parametrize("series", [{"one": [1, 2]}, {"one": [1, 2], "two": [-3.5, 0]}])
def test_bar_chart_writes_a_picture(tmp_path, series):
    figures.bar_chart(["0", "1"], series, tmp_path / "bars.png")
    assert width_of(tmp_path / "bars.png") > 300


@pytest.mark.parametrize("count", [0, 1, 3])
def test_accuracy_and_memory_writes_a_picture(tmp_path, count):
    bars = [figures.Bars(str(index), {"boolq": (0.5, 0.1)}, GIB) for index in range(count)]
    figures.accuracy_and_memory({"one": bars, "two": bars}, ["boolq"], tmp_path / "bars.png")
    assert width_of(tmp_path / "bars.png") > 300


def test_benchmark_fronts_has_a_panel_a_benchmark(tmp_path):
    points = [point("a"), point("b", 0.4, 2 * GIB), point("c", 0.6, 3 * GIB)]
    for count in (1, 3, 5):
        figures.benchmark_fronts({str(index): points for index in range(count)}, tmp_path / f"{count}.png")
    widths = [width_of(tmp_path / f"{count}.png") for count in (1, 3, 5)]
    assert widths[0] < widths[1] < widths[2]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, kept instead of saved."""
    kept = []
    monkeypatch.setattr(style, "save", lambda figure, path: kept.append(figure))
    return kept


def test_figure_1_has_a_bar_with_its_error_and_a_marker_of_memory_for_each_method_and_task(drawn):
    panels = {
        "20 %": [
            figures.Bars("LoRA", {"boolq": (0.6, 0.04), "piqa": (0.75, 0.02)}, 3 * GIB),
            figures.Bars("LoftQ", {"boolq": (0.5, 0.03), "piqa": (0.7, 0.01)}, GIB // 2),
        ],
        "50 %": [figures.Bars("LoRA", {"boolq": (0.4, 0.05), "piqa": (0.3, 0.06)}, 2 * GIB)],
    }
    figures.accuracy_and_memory(panels, ["piqa", "boolq"], None)
    (figure,) = drawn
    axes, markers = figure.axes[:2], figure.axes[2:]
    assert [one.get_title(loc="left") for one in axes] == list(panels)
    found = []
    for left, right in zip(axes, markers, strict=True):
        assert [label.get_text() for label in left.get_xticklabels()] == ["PIQA", "BoolQ"]
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
    figures.benchmark_fronts(points, None)
    axes = [one for one in drawn[0].axes if one.get_visible()]
    assert [one.get_title() for one in axes] == [labels.task(task) for task in trials]
    for panel, every in zip(axes, trials.values(), strict=True):
        front = [one for one in every if not any(better(other, one) for other in every)]
        rest = [one for one in every if one not in front]
        shown = {}
        for group in panel.containers:
            red, _, blue = to_rgb(group.lines[0].get_color())
            shown[red > 2 * blue] = [tuple(place) for place in group.lines[0].get_xydata().tolist()]
        for red, wanted in ((True, front), (False, rest)):
            assert sorted(shown[red]) == sorted((memory, 100 * score) for score, memory in wanted)
