import base64
import csv
import dataclasses
import json
import re

import pytest
from points import point

from pipeline import GIB
from pipeline.results import choice, report
from pipeline.results.choice import Built
from pipeline.results.pages import Section
from pipeline.results.tables import Entry, Table
from pipeline.search import pareto

PNG = b"\x89PNG\r\n\x1a\n"


def test_methods_are_references_then_qpruner_1_2_then_the_best_of_the_front():
    names = ("sampler", "qpruner2", "dense", "qpruner1", "uniform8", "llm_pruner", "random")
    points = [point(name) for name in names]
    members = [point("random", 0.6, 9), point("sampler", 0.7, 8), point("random", 0.7, 7)]
    rows = report.methods(points, members)
    assert [label for label, _ in rows] == [
        "untouched", "LLM-Pruner (16-bit)", "uniform 8-bit", "QPruner1", "QPruner2", "QPruner3",
    ]  # fmt: skip
    assert [row.method for _, row in rows[:-1]] == ["dense", "llm_pruner", "uniform8", "qpruner1", "qpruner2"]
    assert rows[-1][1] is members[2]


def test_methods_of_an_empty_front_have_no_qpruner3():
    assert [label for label, _ in report.methods([point("dense")], [])] == ["untouched"]


def test_method_table_by_hand():
    rows = [
        ("untouched", point("dense", bits="ffff", reference=True)),
        ("QPruner1", point("qpruner1", 0.5125, 3 * GIB // 2)),
    ]
    table = report.method_table(rows)
    assert table.columns == [
        "method", "trial", "accuracy, %", "gold answer, nats", "response, nats", "training, GiB", "inference, MiB",
        "pruned, %", "bits",
    ]  # fmt: skip
    assert table.texts == [
        ["untouched", "-", "50.0 ± 2.5", "-1.500 ± 0.125", "-2.250 ± 0.250", "-", "256", "0", "all 16"],
        ["QPruner1", "3", "51.2 ± 2.5", "-1.500 ± 0.125", "-2.250 ± 0.250", "1.500", "384", "0", "1 of 4 at 8"],
    ]


def test_benchmark_table_by_hand():
    table = report.benchmark_table([("x", point("dense"))], ["boolq"])
    assert (table.columns, table.texts) == (["method", "BoolQ"], [["x", "60.0 ± 4.0"]])


def test_front_table_by_hand():
    member = point("random", 0.25, GIB // 4, "4488", expected=0.24, probability=0.876)
    table = report.front_table([member], "accuracy")
    assert table.columns == [
        "trial", "method", "mean accuracy, %", "expected", "accuracy, %", "P(front)", "training, GiB",
        "inference, MiB", "pruned, %", "bits",
    ]  # fmt: skip
    assert table.texts == [
        ["3", "random", "25.0 ± 2.5", "24.0", "25.0 ± 2.5", "0.88", "0.250", "64", "0", "2 of 4 at 8"]
    ]


def test_front_table_of_log_probabilities_is_in_nats_with_accuracy_beside():
    member = dataclasses.replace(point("random"), score=-1.23456, stderr=0.05, expected=-1.3)
    table = report.front_table([member], "gold_logprob")
    assert table.columns[2] == "gold answer, nats"
    assert table.texts[0][2:6] == ["-1.235 ± 0.050", "-1.300", "50.0 ± 2.5", "-"]


def test_budgets_by_hand():
    members = [
        point("smallest", 0.2, GIB, "4444", name="trial 1", ratio=0.5, expected=0.25, run_id="a"),
        point("sampler", 0.5, 2 * GIB, "4484", name="trial 7", ratio=0.2, expected=0.5, run_id="b"),
        point("uniform", 0.6, 5 * GIB, "8888", name="trial 3", expected=0.45, run_id="c"),
    ]
    table = report.budgets(members, "accuracy")
    assert table.columns[:3] == ["budget, GiB", "trial", "mean accuracy, %, expected"]
    assert [row[:3] for row in table.texts] == [
        ["1.000", "1", "25.0"], ["2.000", "7", "50.0"], ["3.000", "7", "50.0"], ["4.000", "7", "50.0"],
        ["5.000", "7", "50.0"],
    ]  # fmt: skip
    assert table.texts[0][3:] == ["1.000", "256", "50", "all 4"]


def test_bars_are_of_16_bit_uniform_4_bit_and_mixed_bits_by_both_rules():
    names = ("qpruner2", "dense", "qpruner1", "llm_pruner")
    points = [point(name, memory=index) for index, name in enumerate(names)]
    bars = report.bars_of(report.methods(points, [point("random", memory=9)]), ["boolq"])
    assert [(method.label, method.memory) for method in bars] == [
        ("LLM-Pruner (16-bit)", 3), ("QPruner1", 2), ("QPruner2", 0), ("QPruner3", 9),
    ]  # fmt: skip
    assert bars[0].tasks == {"boolq": (0.6, 0.04)}


# --- the choice --------------------------------------------------------------------------------------------------

CHOSEN = point("sampler", 0.6, 2 * GIB, name="trial 7", run_id="c", expected=0.55)
OTHER = point("qpruner1", 0.65, GIB, name="trial 1", run_id="a", expected=0.5)
REFERENCES = [
    point("dense", 0.9, GIB, "ffff", name="dense", run_id="d", reference=True),
    point("llm_pruner", 0.8, 4 * GIB, "ffff", name="llm_pruner", run_id="e", reference=True),
]
BUILT = Built(
    run_id="c",
    figures={"peak_memory_bytes": 2.0 * GIB, "inference_memory_bytes": 2.0**27},
    held_out={"accuracy": 0.5, "accuracy_stderr": 0.01, "gold_logprob": -1.25, "gold_logprob_stderr": 0.02}
    | {"items": 3000, "unseen_items": 3000},
    sizes={"untouched": 2**28, "built": 2**26},
    model="models:/qpruner/4",
    alias="champion",
)


def section(built, members=(CHOSEN, OTHER)):
    return choice.section(built, [OTHER, CHOSEN, *REFERENCES], members, "accuracy")


def test_choice_says_what_was_built_why_and_how_good_it_is():
    assert section(BUILT).lines == [
        "trial 7 was built (not pruned, 1 of 4 at 8; sampler): of 2 trials on the front it has the highest expected score "
        "(55.0; mean accuracy, %)",
        "On 3,000 items that no trial saw: accuracy 50.0 ± 1.0 %, gold answer -1.250 ± 0.020 nats",
        "Registered as models:/qpruner/4, alias champion",
    ]


def test_choice_shows_memory_and_size_before_and_after():
    assert section(BUILT).table.texts == [
        ["untouched", "-", "256", "256"],
        ["LLM-Pruner (16-bit)", "4.000", "1024", "-"],
        ["built", "2.000", "128", "64"],
    ]


def test_choice_ends_with_a_line_that_asks_the_model():
    code = section(BUILT).code
    assert " -c " in code and 'load_model("models:/qpruner@champion").predict(["' in code


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"run_id": "a"}, "trial 1 was built (not pruned, 1 of 4 at 8; QPruner1): build.choose names it"),
        ({"run_id": ""}, "build.choose gave its bits"),
    ],
)
def test_choice_of_the_user_is_told_as_such(changes, line):
    assert section(dataclasses.replace(BUILT, **changes)).lines[0] == line


def test_choice_on_items_that_trials_saw_says_so():
    held_out = {**BUILT.held_out, "unseen_items": 0}
    assert section(dataclasses.replace(BUILT, held_out=held_out)).lines[1].startswith("On the trials' own items")


def test_choice_before_evaluation_and_registration_says_what_is_known():
    known = section(dataclasses.replace(BUILT, held_out={}, model="", alias=""))
    assert len(known.lines) == 1 and not known.code


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    points = [
        point("qpruner1", 0.5, 2**30, run_id="aa", name="trial 1"),
        point("qpruner2", 0.6, 2**31, run_id="bb", name="trial 2"),
        point("sampler", 0.4, 2**31, run_id="cc", name="trial 3 <x>"),
        point("dense", 0.9, 2**32, run_id="dd", name="dense", reference=True, bits="ffff"),
    ]
    members = pareto.front([point for point in points if not point.reference])
    members = [dataclasses.replace(point, expected=point.score - 0.25, probability=0.9) for point in members]
    folder = tmp_path_factory.mktemp("reports") / "new"
    return members, report.write_front(points, members, "accuracy", folder)


def test_front_is_written_as_four_files(front):
    paths = front[1]
    assert [path.name for path in paths] == ["pareto.csv", "pareto.json", "pareto.png", "pareto.html"]
    assert all(path.stat().st_size > 100 for path in paths)
    assert paths[2].read_bytes().startswith(PNG)


def test_json_rows_are_the_points_front_first(front):
    rows = json.loads(front[1][1].read_text())
    assert [(row["run_id"], row["front"]) for row in rows] == [("aa", True), ("bb", True), ("cc", False), ("dd", False)]
    assert (rows[2]["expected"], rows[2]["probability"]) == (None, None)
    assert (rows[1]["expected"], rows[1]["bits"]) == (pytest.approx(0.35), "4484")


def test_csv_holds_the_same_rows_as_json(front):
    rows = json.loads(front[1][1].read_text())
    with front[1][0].open() as file:
        assert list(csv.DictReader(file)) == [
            {key: "" if value is None else str(value) for key, value in row.items()} for row in rows
        ]


def test_page_of_the_front_is_small_self_contained_and_has_each_points_figures(front):
    page = front[1][3].read_text(encoding="utf-8")
    assert len(page) < 40_000
    assert not re.search(r"(src|href)\s*=", page)
    tips = re.findall(r'data-tip="([^"]*)"', page)
    assert len(tips) == 2 * 3  # the trials alone, and once more beside the references; the untouched model is a line
    assert tips[0].splitlines()[0] == "trial: 3 &lt;x&gt;"
    assert "bits: 1 of 4 at 8" in tips[0] and "inference, MiB: 512" in tips[0]
    assert page.count(">untouched</text>") == 1
    assert "peak memory of training, GiB" in page and "mean accuracy, %" in page


@pytest.mark.parametrize("points", [[], [point("dense", reference=True)]], ids=["nothing", "reference_only"])
def test_empty_front_is_written(tmp_path, points):
    for path in report.write_front(points, [], "boolq", tmp_path):
        assert path.exists()
    assert len(json.loads((tmp_path / "pareto.json").read_text())) == len(points)


@pytest.fixture
def written(tmp_path):
    picture = tmp_path / "front.png"
    picture.write_bytes(PNG + b"picture")
    rows = [["x<y", "<script>alert(1)</script>"], ["second", Entry("2", "1")]]
    sections = [
        Section("A <b>title</b>", ["a <line>"], Table("", ["name", "a & b"], rows), "run 'this' & that"),
        Section("Empty"),
    ]
    paths = report.write(["memory < 5 & more"], sections, {"it's <here>": picture}, tmp_path)
    return [path.read_text(encoding="utf-8") for path in paths], paths


def test_report_is_markdown_and_html(written, tmp_path):
    assert written[1] == [tmp_path / "report.md", tmp_path / "report.html"]


def test_markdown_holds_facts_tables_commands_links_and_terms(written):
    lines = written[0][0].splitlines()
    for line in ("# QPruner report", "- memory < 5 & more", "| name | a & b |", "| --- | --- |", "| second | 2 ± 1 |"):
        assert line in lines
    assert "- a <line>" in lines and "run 'this' & that" in lines
    assert "![it's <here>](front.png)" in lines
    assert any(line.startswith("- **P(front)**: ") for line in lines)


def test_html_escapes_every_text(written):
    page = written[0][1]
    for raw in ("<script", "<b>title", "x<y", "<here>", "< 5", "<line>"):
        assert raw not in page
    for escaped in (
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "A &lt;b&gt;title&lt;/b&gt;",
        "memory &lt; 5 &amp; more",
        'alt="it&#39;s &lt;here&gt;"',
        "<th>a &amp; b</th>",
    ):
        assert escaped in page


def test_html_is_self_contained_and_every_table_scrolls(written):
    page = written[0][1]
    (data,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(data) == PNG + b"picture"
    assert not re.search(r"(src|href)\s*=\s*['\"]?https?:", page)
    assert page.count("<table>") == page.count('<div class="scroll">') == 1
    assert page.count("<dt>") == len(report.GLOSSARY)


def test_every_method_and_column_is_explained():
    terms = " ".join(f"{term} {meaning}" for term, meaning in report.GLOSSARY)
    columns = report.front_table([], "response_logprob").columns
    for word in [*report.labels.METHODS.values(), *columns]:
        known = word.removesuffix(", nats").removesuffix(", %")
        assert known in terms or known == "method"
