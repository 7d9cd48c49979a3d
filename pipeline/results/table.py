"""How the paper's tables read: table 1 (and 3) and table 2 as Markdown, LaTeX and plain figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from pipeline import GIB, bits
from pipeline.results import labels, tables
from pipeline.results.cells import VARIANT, Cell, Outcome, Variants
from pipeline.results.labels import UNTOUCHED
from pipeline.results.report import MIB
from pipeline.results.tables import Entry, Table
from pipeline.search import paired

# --- entries -----------------------------------------------------------------------------------------------------


def columns(tasks: Sequence[str]) -> list[str]:
    """Return the headings of a cell's entries."""
    costs = ["training, GiB", "inference, MiB", "bits"]
    return [*map(labels.task, tasks), "mean", "gold log-prob.", "val. loss", *costs]


def entries(outcome: Outcome, tasks: Sequence[str]) -> list[Entry]:
    """Return a cell's entries: accuracies in per cent, then gold log-probability, loss, memories and bits."""
    result = outcome.result
    if result is None:
        return [Entry(outcome.state)] * len(columns(tasks))
    training = "-" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / GIB:.3f}"  # not trained
    return [
        *(tables.percent(*result.tasks[task]) for task in tasks),
        tables.percent(result.accuracy, result.accuracy_stderr),
        Entry(f"{result.gold_logprob:.3f}"),
        Entry(f"{result.validation_loss:.3f}"),
        Entry(training),
        Entry(f"{result.inference_memory_bytes / MIB:.0f}"),
        Entry(bits.summary(result.bits)),
    ]


def marked(group: Sequence[Sequence[Entry]], tasks: Sequence[str]) -> list[list[Entry]]:
    """Return rows with the best entry of each column marked: highest accuracy and log-probability, lowest loss.

    Entries that read the same are equally good. Memory and bits are what the figures cost, and are not marked.
    """
    rows = [list(row) for row in group]
    for column in range(len(tasks) + 3):
        values = {index: float(row[column].text) for index, row in enumerate(rows) if _is_figure(row[column])}
        if not values:
            continue
        best = min(values.values()) if column == len(tasks) + 2 else max(values.values())
        for index, value in values.items():
            if value == best:
                rows[index][column] = Entry(rows[index][column].text, rows[index][column].error, True)
    return rows


def _is_figure(entry: Entry) -> bool:
    return entry.text not in ("failed", "pending", "-")


def grid(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> list[tuple[str, str, list[Entry]]]:
    """Return the rows of table 1: (ratio, method, entries), the best of each ratio's rows marked."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_ratio(outcome), []).append(outcome)
    shown: list[tuple[str, str, list[Entry]]] = []
    for ratio, members in groups.items():
        rows = [entries(outcome, tasks) for outcome in members]
        rows = marked(rows, tasks) if len(rows) > 1 else rows
        shown += [(ratio, labels.method(cell.cell.row), row) for cell, row in zip(members, rows, strict=True)]
    return shown


def _ratio(outcome: Outcome) -> str:
    return f"{100 * outcome.cell.ratio:g} %"


def frame(outcomes: Sequence[Outcome], tasks: Sequence[str], names: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Return one row a cell with plain figures: accuracies in [0, 1], memory in bytes.

    Args:
        outcomes: The cells.
        tasks: The benchmarks.
        names: What stands in front of each cell's figures.
    """
    quality = ("accuracy", "accuracy_stderr", "gold_logprob", "validation_loss")
    cost = ("peak_memory_bytes", "inference_memory_bytes", "memory_source", "items", "bits")
    rows = []
    for outcome, name in zip(outcomes, names, strict=True):
        figures: dict[str, object] = {"state": outcome.state}
        if result := outcome.result:
            for task in tasks:
                figures |= {task: result.tasks[task][0], f"{task}_stderr": result.tasks[task][1]}
            figures |= {field: getattr(result, field) for field in (*quality, *cost)}
        rows.append({**name, **figures, "run_id": outcome.run_id, "error": outcome.error})
    return pd.DataFrame(rows)


# --- tables as data ----------------------------------------------------------------------------------------------


def table_of(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> Table:
    """Return table 1: a row for each ratio and method."""
    rows: list[list[tables.Cell]] = [[ratio, method, *row] for ratio, method, row in grid(outcomes, tasks)]
    return Table("Table 1", ["ratio", "method", *columns(tasks)], rows)


def ablation_of(variants: Variants, outcomes: Sequence[Outcome], tasks: Sequence[str]) -> Table:
    """Return table 2: benchmarks as rows, variants as columns."""
    head = ["benchmark", *(f"{factor.title}: {title}" for factor, title, _ in variants)]
    return Table("Table 2", head, transposed(outcomes, tasks))


def variants_of(variants: Variants, outcomes: Sequence[Outcome]) -> Table:
    """Return table 2 turned round and without benchmarks: a row for each variant."""
    rows: list[list[tables.Cell]] = [
        [factor.title, title, *entries(outcome, ())]
        for (factor, title, _), outcome in zip(variants, outcomes, strict=True)
    ]
    return Table("Table 2", ["factor", "value", *columns(())], rows)


def transposed(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> list[list[str | Entry]]:
    """Return table 2's rows: each heading with every cell's entry; the bits, which all share, are left out."""
    by_cell = [entries(outcome, tasks) for outcome in outcomes]
    return [[name, *(row[index] for row in by_cell)] for index, name in enumerate(columns(tasks)[:-1])]


_COMPARED = (("accuracy", 100), ("gold_logprob", 1), ("response_logprob", 1))


def differences(title: str, names: Sequence[str], pairs: Sequence[tuple[list[str], Outcome, Outcome]]) -> Table:
    """Return differences between cells, compared item by item; of pairs that have both results.

    Args:
        title: What is subtracted from what.
        names: Headings of what names a pair.
        pairs: (what names it, the cell, the cell to subtract).
    """
    rows = []
    for name, outcome, subtracted in pairs:
        if outcome.result and subtracted.result:
            records = outcome.result.record, subtracted.result.record
            rows.append([*name, *(_signed(*records, objective, factor) for objective, factor in _COMPARED)])
    return Table(title, [*names, "mean, points", "gold log-prob.", "log-prob. of a held-out token"], rows)


def _signed(record: paired.Items, subtracted: paired.Items, objective: str, factor: int) -> str:
    value, error = paired.difference(paired.strata(record, objective), paired.strata(subtracted, objective))
    digits = 1 if factor == 100 else 3
    return f"{factor * value:+.{digits}f} ± {factor * error:.{digits}f}"


# --- pages -------------------------------------------------------------------------------------------------------


def table_markdown(outcomes: Sequence[Outcome], tasks: Sequence[str], facts: Sequence[str]) -> str:
    """Return table 1 as Markdown, under the facts that it needs to be understood."""
    pairs = [
        ([_ratio(outcome), labels.method(other.cell.row)], outcome, other)
        for outcome in outcomes
        if outcome.cell.row == labels.QPRUNER3
        for other in outcomes
        if other is not outcome and (other.cell.row == UNTOUCHED or _ratio(other) == _ratio(outcome))
    ]
    beside = differences("QPruner3 minus each other row", ["ratio", "the other row"], pairs)
    return _page(table_of(outcomes, tasks), facts, beside, outcomes)


def ablation_markdown(
    variants: Variants, outcomes: Sequence[Outcome], tasks: Sequence[str], facts: Sequence[str]
) -> str:
    """Return table 2 as Markdown: benchmarks as rows, variants as columns."""
    columns_ = list(zip(variants, outcomes, strict=True))
    default = next(outcome for (*_, cell), outcome in columns_ if _is_default(cell))
    pairs = [
        ([factor.title, title], outcome, default)
        for (factor, title, cell), outcome in columns_
        if not _is_default(cell)
    ]
    beside = differences("Each variant minus the default", ["factor", "value"], pairs)
    return _page(ablation_of(variants, outcomes, tasks), facts, beside, outcomes)


def _is_default(cell: Cell) -> bool:
    return cell.row != VARIANT


def _page(table: Table, facts: Sequence[str], beside: Table, outcomes: Sequence[Outcome]) -> str:
    failures = dict.fromkeys(
        f"- failed: {outcome.cell.title}: {outcome.error}" for outcome in outcomes if outcome.error
    )
    lines = [f"# {table.title}", "", *(f"- {fact}" for fact in facts), *failures, "", tables.markdown(table), ""]
    if beside.rows:
        lines += [f"{beside.title}, item by item:", "", tables.markdown(beside), ""]
    return "\n".join(lines)


def table_latex(outcomes: Sequence[Outcome], tasks: Sequence[str], caption: str) -> str:
    r"""Return table 1 as a LaTeX ``table*`` with a rule between the ratios."""
    lines = [tables.latex_row(map(tables.escaped, ["", "Method", *columns(tasks)]))]
    last = ""
    for ratio, method, row in grid(outcomes, tasks):
        if ratio != last:
            lines.append(r"\hline")
        first = tables.escaped(f"Rate = {ratio}") if ratio != last else ""
        lines.append(tables.latex_row([first, tables.escaped(method), *map(tables.latex_entry, row)]))
        last = ratio
    return tables.latex("ll" + "c" * len(columns(tasks)), lines, caption)


def ablation_latex(variants: Variants, outcomes: Sequence[Outcome], tasks: Sequence[str], caption: str) -> str:
    r"""Return table 2 as a LaTeX ``table*``: benchmarks as rows, variants as columns below their factor."""
    spans: dict[str, int] = {}
    for factor, _, _ in variants:
        spans[factor.title] = spans.get(factor.title, 0) + 1
    groups = [rf"\multicolumn{{{count}}}{{c}}{{{tables.escaped(title)}}}" for title, count in spans.items()]
    lines = [
        tables.latex_row(["", *groups]),
        tables.latex_row(["Benchmark", *(tables.escaped(title) for _, title, _ in variants)]),
        r"\hline",
    ]
    for name, *row in transposed(outcomes, tasks):
        cells = (tables.escaped(entry.text) for entry in row if isinstance(entry, Entry))
        lines.append(tables.latex_row([tables.escaped(str(name)), *cells]))
    return tables.latex("l" + "|".join("c" * count for count in spans.values()), lines, caption)
