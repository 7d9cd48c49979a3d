import pytest

from pipeline.results import pages, tables
from pipeline.results.tables import Entry, Table

TABLE = Table("Title", ["name", "a | b"], [["x", Entry("1.0", "0.5", best=True)], ["y|z", Entry("-2.0")]])


def test_texts_have_errors_behind_a_sign():
    assert TABLE.texts == [["x", "1.0 ± 0.5"], ["y|z", "-2.0"]]


def test_markdown_by_hand():
    assert tables.markdown(TABLE).splitlines() == [
        r"| name | a \| b |",
        "| --- | --- |",
        "| x | **1.0** ± 0.5 |",
        r"| y\|z | -2.0 |",
    ]


def test_markdown_section_has_its_title_as_heading():
    assert tables.markdown_section(TABLE)[:2] == ["## Title", ""]


def test_html_marks_the_best_and_escapes_every_text():
    table = Table("t", ["<b>"], [[Entry("<1>", best=True)], ["a & b"]])
    page = pages.render("table.html", table=table)
    assert "<th>&lt;b&gt;</th>" in page and "<td><b>&lt;1&gt;</b></td>" in page and "<td>a &amp; b</td>" in page


def test_figures_by_hand():
    assert tables.percent(0.5125, 0.025) == Entry("51.2", "2.5")
    assert tables.figure(-1.23456, 0.05) == Entry("-1.235", "0.050")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("-", "-"),
        ("-1.5", "$-1.5$"),
        ("a-b", "a-b"),
        ("50 % & #1_{x}", r"50 \% \& \#1\_\{x\}"),
        ("~^\\$<>±", r"\textasciitilde{}\textasciicircum{}\textbackslash{}\$$<$$>$$\pm$"),
    ],
)
def test_escaped_by_hand(text, expected):
    assert tables.escaped(text) == expected


def test_latex_entry_by_hand():
    assert tables.latex_entry(Entry("-1.5", "0.1", best=True)) == r"$\mathbf{-1.5}${\tiny$\pm$0.1}"
    assert tables.latex_entry(Entry("failed")) == "failed"
