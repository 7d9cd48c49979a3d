import dataclasses

import pytest

from pipeline import GIB
from pipeline.results import cells, table
from pipeline.results.cells import Cell, Outcome
from pipeline.results.tables import Entry
from pipeline.trial.result import Result
from tests.fixtures.searches import UNITS, result

TASKS = ("piqa", "arc_challenge")


def outcome(params, row, piqa=0.5, arc=0.25, logprob=-1.0, loss=2.0, memory=GIB, bits="4484", ratio=0.2):
    measured = result(
        (4,) * UNITS,
        bits=bits,
        accuracy=(piqa + arc) / 2,
        accuracy_stderr=0.03,
        tasks={"piqa": (piqa, 0.02), "arc_challenge": (arc, 0.04)},
        gold_logprob=logprob,
        validation_loss=loss,
        validation_loss_stderr=0.0,
        peak_memory_bytes=None if bits == "ffff" and row == "dense" else memory,
        inference_memory_bytes=memory // 4,
    )
    return Outcome(Cell(row, cells.at_ratio(params, ratio), f"{row} title"), measured, run_id="r")


@pytest.fixture
def outcomes(default):
    return [
        outcome(default, "dense", 0.75, 0.5, -0.5, 1.0, GIB, "ffff"),
        outcome(default, "llm_pruner", 0.5, 0.3, -1.25, 2.5, 2 * GIB, "ffff"),
        outcome(default, "qpruner1", 0.5, 0.25, -1.5, 2.25, GIB, "4444"),
        Outcome(Cell("qpruner2", default, "20% QPruner2"), error="MemoryError: 20_000 <bytes> & more"),
        Outcome(Cell("qpruner3", default, "20% QPruner3")),
        outcome(default, "qpruner1", 0.4, 0.2, -3.0, 4.0, GIB, "4444", ratio=0.5),
    ]


def test_table_in_markdown_by_hand(outcomes):
    assert table.table_markdown(outcomes, TASKS, ["fact"]).splitlines() == [
        "# Table 1",
        "",
        "- fact",
        "- failed: 20% QPruner2: MemoryError: 20_000 <bytes> & more",
        "",
        "| ratio | method | PIQA | ARC-c | mean | gold log-prob. | val. loss | training, GiB | inference, MiB | bits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 0 % | untouched | 75.0 ± 2.0 | 50.0 ± 4.0 | 62.5 ± 3.0 | -0.500 | 1.000 | - | 256 | all 16 |",
        "| 20 % | LLM-Pruner (16-bit) | **50.0** ± 2.0 | **30.0** ± 4.0 | **40.0** ± 3.0 | **-1.250** | 2.500 | 2.000 "
        "| 512 | all 16 |",
        "| 20 % | QPruner1 | **50.0** ± 2.0 | 25.0 ± 4.0 | 37.5 ± 3.0 | -1.500 | **2.250** | 1.000 | 256 | all 4 |",
        "| 20 % | QPruner2 | failed | failed | failed | failed | failed | failed | failed | failed |",
        "| 20 % | QPruner3 | pending | pending | pending | pending | pending | pending | pending | pending |",
        "| 50 % | QPruner1 | 40.0 ± 2.0 | 20.0 ± 4.0 | 30.0 ± 3.0 | -3.000 | 4.000 | 1.000 | 256 | all 4 |",
    ]


def test_task_beyond_the_papers_seven_is_headed_by_its_own_name():
    assert table.columns(("piqa", "sciq"))[:3] == ["PIQA", "sciq", "mean"]


def test_table_ends_with_the_differences_of_qpruner3_item_by_item(outcomes, default):
    best = outcome(default, "qpruner3")
    record = {"by_item": {"piqa": [(1.0, -0.25), (1.0, -1.25)]}, "by_row": [(10.0, 10), (18.0, 12)]}
    best = dataclasses.replace(best, result=Result.from_json(best.result.as_json() | record))
    lines = table.table_markdown([*outcomes[:4], best], TASKS, []).splitlines()
    assert lines[-7:-3] == [
        "QPruner3 minus each other row, item by item:",
        "",
        "| ratio | the other row | mean, points | gold log-prob. | log-prob. of a held-out token |",
        "| --- | --- | --- | --- | --- |",
    ]
    # answers (1, 0) and 50 nats of 22 tokens against (1, 1) and 28 of 22; drawn twice: one item, the other, or both
    for line, label in zip(lines[-3:], ("untouched", "LLM-Pruner (16-bit)", "QPruner1"), strict=True):
        ratio, other, accuracy, gold, response = line.strip("| ").split(" | ")
        assert (ratio, other) == ("20 %", label)
        found, error = map(float, accuracy.split(" ± "))
        assert found == 50.0 and error == pytest.approx(100 * 0.125**0.5, abs=1.5)
        assert gold == "+0.250 ± 0.000"
        assert response.startswith("+1.000 ± 0.0")
    assert "item by item" not in table.table_markdown(outcomes[:3], TASKS, [])


def test_table_in_latex_by_hand(outcomes):
    page = table.table_latex(outcomes[:3], ("piqa",), "100 % of a_b & ± 1")
    assert page.splitlines() == [
        r"\begin{table*}[t]",
        r"\centering",
        r"\caption{100 \% of a\_b \& $\pm$ 1}",
        r"\scriptsize",
        r"\setlength{\tabcolsep}{2pt}",
        r"\begin{tabular}{llccccccc}",
        r"\hline",
        r" & Method & PIQA & mean & gold log-prob. & val. loss & training, GiB & inference, MiB & bits \\",
        r"\hline",
        r"Rate = 0 \% & untouched & 75.0{\tiny$\pm$2.0} & 62.5{\tiny$\pm$3.0} & $-0.500$ & 1.000 & - & 256 & all 16 \\",
        r"\hline",
        r"Rate = 20 \% & LLM-Pruner (16-bit) & $\mathbf{50.0}${\tiny$\pm$2.0} & $\mathbf{40.0}${\tiny$\pm$3.0} "
        r"& $\mathbf{-1.250}$ & 2.500 & 2.000 & 512 & all 16 \\",
        r" & QPruner1 & $\mathbf{50.0}${\tiny$\pm$2.0} & 37.5{\tiny$\pm$3.0} & $-1.500$ & $\mathbf{2.250}$ & 1.000 "
        r"& 256 & all 4 \\",
        r"\hline",
        r"\end{tabular}",
        r"\end{table*}",
    ]


def test_figures_are_plain_and_a_failed_cell_has_none(outcomes):
    frame = table.frame(outcomes[2:4], TASKS, [{"ratio": 0.2, "method": "qpruner1"}, {"ratio": 0.2, "method": "b"}])
    first, second = frame.to_dict(orient="records")
    assert first["piqa"] == 0.5 and first["arc_challenge_stderr"] == 0.04 and first["peak_memory_bytes"] == GIB
    assert (first["state"], first["bits"], first["run_id"], first["error"]) == ("done", "4444", "r", "")
    assert second["state"] == "failed" and second["piqa"] != second["piqa"]  # NaN
    assert second["error"] == "MemoryError: 20_000 <bytes> & more"


def test_marks_go_to_the_highest_but_for_the_loss_and_ties_share():
    def row(*figures):
        return [Entry(text) for text in figures]

    group = [row("50.0", "1.0", "-2.0", "3.0", "9", "x"), row("50.0", "2.0", "-10.0", "2.5", "1", "x")]
    marks = table.marked([*group, [Entry("failed")] * 6], ("piqa",))
    assert [[entry.best for entry in line] for line in marks] == [
        [True, False, True, False, False, False],
        [True, True, False, True, False, False],
        [False] * 6,
    ]


@pytest.fixture
def ablation(default):
    cell = cells.qpruner3(default)
    made = cells.variants(cell, "4484")
    every = [outcome(default, "qpruner3", piqa=index / 20) for index in range(len(made))]
    every[1] = Outcome(made[1][2], error="ValueError: no")
    return made, every


def test_ablation_in_markdown_has_benchmarks_as_rows(ablation):
    made, every = ablation
    lines = table.ablation_markdown(made, every, TASKS, []).splitlines()
    assert lines[2] == "- failed: 20% 4-bit type FP4: ValueError: no"
    assert lines[4].startswith("| benchmark | 4-bit type: NF4 | 4-bit type: FP4 | 4-bit codes: nearest |")
    assert lines[6].startswith("| PIQA | 0.0 ± 2.0 | failed | 10.0 ± 2.0 | 15.0 ± 2.0 |")
    names = [line.split(" | ")[0] for line in lines[6:13]]
    assert names == [
        "| PIQA",
        "| ARC-c",
        "| mean",
        "| gold log-prob.",
        "| val. loss",
        "| training, GiB",
        "| inference, MiB",
    ]
    assert lines[14] == "Each variant minus the default, item by item:"
    variants = [(factor.title, title) for factor, title, cell in made if cell.row == cells.VARIANT]
    assert [tuple(line.strip("| ").split(" | ")[:2]) for line in lines[18:]] == variants[1:]  # the first one failed
    assert {line.partition("+")[2] for line in lines[18:]} == {"0.0 ± 0.0 | +0.000 ± 0.000 | +0.000 ± 0.000 |"}


def test_ablation_in_latex_groups_the_variants_below_their_factors(ablation):
    made, every = ablation
    lines = table.ablation_latex(made, every, ("piqa",), "").splitlines()
    assert r"\begin{tabular}{lcc|cc|cccc|cc|ccc|cc}" in lines
    assert (
        r" & \multicolumn{2}{c}{4-bit type} & \multicolumn{2}{c}{4-bit codes} & \multicolumn{4}{c}{initialization} "
        r"& \multicolumn{2}{c}{target} & \multicolumn{3}{c}{LoftQ iterations} & \multicolumn{2}{c}{importance} \\"
    ) in lines
    (piqa,) = [line for line in lines if line.startswith("PIQA")]
    values = ["0.0", "failed", *(f"{5 * number}.0" for number in range(2, 15))]
    assert piqa == rf"PIQA & {' & '.join(values)} \\"
    rows = [line for line in lines if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows[1:]} == {15}
