"""Command ``table``: every method at every ratio, the paper's table 1 (or 3, with a 13B model) and figure 1.

Reads what ``fetch`` made. Writes ``reports/table.md``, ``.tex`` and ``.csv`` after each cell, then
``reports/figure1.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import console
from pipeline.params import Params
from pipeline.paths import REPORTS
from pipeline.results import cells, figures, labels, table
from pipeline.results.cells import Outcome
from pipeline.results.figures import Bars
from pipeline.stages.cells import Cells, end, facts, write_pages
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the command."""
    tasks = params.evaluate.tasks

    def write(outcomes: Sequence[Outcome]) -> list[Path]:
        about = facts(params, outcomes)
        names = [{"ratio": outcome.cell.ratio, "method": outcome.cell.row} for outcome in outcomes]
        pages = {
            "md": table.table_markdown(outcomes, tasks, about),
            "tex": table.table_latex(outcomes, tasks, "; ".join(about)),
            "csv": table.frame(outcomes, tasks, names).to_csv(index=False),
        }
        return write_pages("table", pages)

    outcomes = Cells(run, params, params.table.ratios).all(cells.cells(params), write)
    shown = table.table_of(outcomes, ())
    console.table(shown.title, shown.columns, shown.texts)
    end(run, outcomes, [*write(outcomes), *_figure1(outcomes, params)])


def _figure1(outcomes: Sequence[Outcome], params: Params) -> list[Path]:
    """Draw figure 1 from the finished cells: 16-bit, uniform 4-bit and mixed, with their memory."""
    panels: dict[str, list[Bars]] = {}
    for outcome in outcomes:
        if outcome.result and outcome.result.peak_memory_bytes and outcome.cell.row in figures.COMPARED:
            panels.setdefault(f"{100 * outcome.cell.ratio:g} % pruned", []).append(
                Bars(labels.method(outcome.cell.row), outcome.result.tasks, outcome.result.peak_memory_bytes)
            )
    if not panels:
        return []
    figures.accuracy_and_memory(panels, params.evaluate.tasks, REPORTS / "figure1.png")
    return [REPORTS / "figure1.png"]
