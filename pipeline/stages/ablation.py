"""Command ``ablation``: one setting varied at a time under QPruner3's bits, the paper's table 2.

Reads what ``fetch`` made, and QPruner3's cell where command ``table`` left it. Writes ``reports/ablation.md``,
``.tex`` and ``.csv`` after each cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import console
from pipeline.params import Params, flatten
from pipeline.results import cells, table
from pipeline.results.cells import Outcome
from pipeline.stages.cells import AGAIN, Cells, CellsFailed, end, facts, write_pages
from pipeline.tracking import Run


def run(params: Params, run: Run) -> None:
    """Run the command.

    Raises:
        CellsFailed: QPruner3's search or a variant failed.
    """
    run.params(flatten(params.table, "table."))
    runner, tasks = Cells(run, params), params.evaluate.tasks
    default = cells.qpruner3(cells.at_ratio(params, params.ablation.ratio))
    searched = runner.outcome(default, "QPruner3")
    if searched.result is None:
        raise CellsFailed(f"QPruner3, whose bits all variants take, failed: {searched.error}. {AGAIN}")
    variants = cells.variants(default, searched.result.bits)

    def write(outcomes: Sequence[Outcome]) -> list[Path]:
        about = facts(params, outcomes)
        names = [{"factor": factor.title, "value": title} for factor, title, _ in variants]
        pages = {
            "md": table.ablation_markdown(variants, outcomes, tasks, about),
            "tex": table.ablation_latex(variants, outcomes, tasks, "; ".join(about)),
            "csv": table.frame(outcomes, tasks, names).to_csv(index=False),
        }
        return write_pages("ablation", pages)

    outcomes = runner.all([cell for *_, cell in variants], write)
    shown = table.variants_of(variants, outcomes)
    console.table(shown.title, shown.columns, shown.texts)
    end(run, outcomes, write(outcomes))
