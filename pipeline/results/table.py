"""How the paper's tables read: table 1 (and 3) and table 2 as Markdown, LaTeX and plain figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline import GIB
from pipeline.results.cells import VARIANT, Outcome, Variants
from pipeline.results.report import summary
from pipeline.search import paired
from pipeline.search.pareto import LABELS, UNTOUCHED

TITLES: Mapping[str, str] = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}


@dataclass(frozen=True)
class Entry:
    """One entry of a table: a figure, its standard error, whether it is the best of its group."""

    text: str
    error: str = ""
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text} ± {self.error}" if self.error else self.text


# --- entries -----------------------------------------------------------------------------------------------------


def columns(tasks: Sequence[str]) -> list[str]:
    """Return the headings of a cell's entries."""
    return [*(TITLES.get(task, task) for task in tasks), "mean", "gold log-prob.", "val. loss", "memory, GiB", "bits"]


def entries(outcome: Outcome, tasks: Sequence[str]) -> list[Entry]:
    """Return a cell's entries: accuracies in per cent, then gold log-probability, loss, memory and bits."""
    result = outcome.result
    if result is None:
        return [Entry(outcome.state)] * len(columns(tasks))
    memory = "-" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / GIB:.3f}"  # it is not trained
    return [
        *(_percent(*result.tasks[task]) for task in tasks),
        _percent(result.accuracy, result.accuracy_stderr),
        Entry(f"{result.gold_logprob:.3f}"),
        Entry(f"{result.validation_loss:.3f}"),
        Entry(memory),
        Entry(summary(result.bits)),
    ]


def _percent(value: float, error: float) -> Entry:
    return Entry(f"{100 * value:.1f}", f"{100 * error:.1f}")


def marked(group: Sequence[Sequence[Entry]], tasks: Sequence[str]) -> list[list[Entry]]:
    """Return rows with the best entry of each column marked: highest accuracy and log-probability, lowest loss.

    Entries that read the same are equally good. Memory and bits are what the figures cost, and are not marked.
    """
    marks = [list(row) for row in group]
    for index in range(len(tasks) + 3):
        values = {row: float(entry[index].text) for row, entry in enumerate(marks) if _is_figure(entry[index])}
        if not values:
            continue
        wanted = min(values.values()) if index == len(tasks) + 2 else max(values.values())
        for row, value in values.items():
            if value == wanted:
                marks[row][index] = Entry(marks[row][index].text, marks[row][index].error, True)
    return marks


def _is_figure(entry: Entry) -> bool:
    return entry.text not in ("failed", "pending", "-")


def grid(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> list[tuple[str, str, list[Entry]]]:
    """Return the rows of table 1: (ratio, method, entries), the best of each ratio's rows marked."""
    found: list[tuple[str, str, list[Entry]]] = []
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(_share(one), []).append(one)
    for ratio, members in groups.items():
        rows = [entries(one, tasks) for one in members]
        rows = marked(rows, tasks) if len(rows) > 1 else rows
        found += [(ratio, LABELS[one.cell.row], row) for one, row in zip(members, rows, strict=True)]
    return found


def _share(outcome: Outcome) -> str:
    return f"{100 * outcome.cell.ratio:g} %"


def frame(outcomes: Sequence[Outcome], tasks: Sequence[str], names: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row a cell with plain figures: accuracies in [0, 1], memory in bytes.

    Args:
        outcomes: The cells.
        tasks: The benchmarks.
        names: What stands in front of each cell's figures.
    """
    rows = []
    for one, name in zip(outcomes, names, strict=True):
        figures: dict[str, Any] = {"state": one.state}
        if result := one.result:
            for task in tasks:
                figures |= {task: result.tasks[task][0], f"{task}_stderr": result.tasks[task][1]}
            plain = ("accuracy", "accuracy_stderr", "gold_logprob", "validation_loss", "peak_memory_bytes")
            figures |= {field: getattr(result, field) for field in (*plain, "memory_source", "items", "bits")}
        rows.append({**name, **figures, "run_id": one.run_id, "error": one.error})
    return pd.DataFrame(rows)


# --- what a table reads like -------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str | Entry]]) -> str:
    """Return a Markdown table; the best entries are bold, standard errors follow a ±."""
    lines = [head, ["---"] * len(head), *([_markdown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(cell: str | Entry) -> str:
    if isinstance(cell, str):
        return cell
    return str(Entry(f"**{cell.text}**", cell.error) if cell.best else cell)


def table_markdown(outcomes: Sequence[Outcome], tasks: Sequence[str], facts: Sequence[str]) -> str:
    """Return table 1 as Markdown, under the facts that it needs to be understood."""
    rows: list[list[str | Entry]] = [[ratio, method, *row] for ratio, method, row in grid(outcomes, tasks)]
    best = [one for one in outcomes if one.cell.row == "qpruner3"]
    pairs = [
        ([_share(one), LABELS[other.cell.row]], one, other)
        for one in best
        for other in outcomes
        if other is not one and (other.cell.row == UNTOUCHED or _share(other) == _share(one))
    ]
    beside = differences("QPruner3 minus each other row", ["ratio", "the other row"], pairs)
    return _page("Table 1", facts, markdown_table(["ratio", "method", *columns(tasks)], rows), beside, outcomes)


def ablation_markdown(made: Variants, outcomes: Sequence[Outcome], tasks: Sequence[str], facts: Sequence[str]) -> str:
    """Return table 2 as Markdown: benchmarks as rows, variants as columns."""
    head = ["benchmark", *(f"{factor.title}: {title}" for factor, title, _ in made)]
    columns_ = list(zip(made, outcomes, strict=True))
    default = next(one for (*_, cell), one in columns_ if cell.row != VARIANT)
    pairs = [([factor.title, title], one, default) for (factor, title, cell), one in columns_ if cell.row == VARIANT]
    beside = differences("Each variant minus the default", ["factor", "value"], pairs)
    return _page("Table 2", facts, markdown_table(head, transposed(outcomes, tasks)), beside, outcomes)


def differences(title: str, names: Sequence[str], pairs: Sequence[tuple[list[str], Outcome, Outcome]]) -> str:
    """Return a Markdown table of differences between cells, compared item by item; of pairs that have both results.

    Args:
        title: What is subtracted from what.
        names: Headings of what names a pair.
        pairs: (what names it, the one cell, the one to subtract).
    """
    rows = []
    for name, one, other in pairs:
        if one.result and other.result:
            both = one.result.record, other.result.record
            rows.append([*name, *(_signed(*both, objective, times) for objective, times in _COMPARED)])
    if not rows:
        return ""
    head = [*names, "mean, points", "gold log-prob.", "log-prob. of a held-out token"]
    return f"{title}, item by item:\n\n{markdown_table(head, rows)}\n"


_COMPARED = (("accuracy", 100), ("gold_logprob", 1), ("response_logprob", 1))


def _signed(one: Mapping[str, Any], other: Mapping[str, Any], objective: str, times: int) -> str:
    value, error = paired.difference(paired.strata(one, objective), paired.strata(other, objective))
    digits = 1 if times == 100 else 3
    return f"{times * value:+.{digits}f} ± {times * error:.{digits}f}"


def transposed(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> list[list[str | Entry]]:
    """Return table 2's rows: each heading with every cell's entry; the bits, which all share, are left out."""
    every = [entries(one, tasks) for one in outcomes]
    return [[name, *(row[index] for row in every)] for index, name in enumerate(columns(tasks)[:-1])]


def _page(title: str, facts: Sequence[str], body: str, beside: str, outcomes: Sequence[Outcome]) -> str:
    errors = {f"- failed: {one.cell.title}: {one.error}": None for one in outcomes if one.error}
    lines = [f"# {title}", "", *(f"- {fact}" for fact in facts), *errors, "", body]
    return "\n".join([*lines, "", beside] if beside else [*lines, ""])


def table_latex(outcomes: Sequence[Outcome], tasks: Sequence[str], caption: str) -> str:
    r"""Return table 1 as a LaTeX ``table*`` that needs no package; a rule between the ratios."""
    lines, last = [], ""
    for ratio, method, row in grid(outcomes, tasks):
        if ratio != last:
            lines.append(r"\hline")
        first = escaped(f"Rate = {ratio}") if ratio != last else ""
        lines.append(_latex_line([first, escaped(method), *(_latex(entry) for entry in row)]))
        last = ratio
    head = _latex_line(map(escaped, ["", "Method", *columns(tasks)]))
    return _latex_page("ll" + "c" * len(columns(tasks)), [head, *lines], caption)


def ablation_latex(made: Variants, outcomes: Sequence[Outcome], tasks: Sequence[str], caption: str) -> str:
    r"""Return table 2 as a LaTeX ``table*``: benchmarks as rows, variants as columns below their factor."""
    spans: dict[str, int] = {}
    for factor, _, _ in made:
        spans[factor.title] = spans.get(factor.title, 0) + 1
    groups = [rf"\multicolumn{{{count}}}{{c}}{{{escaped(title)}}}" for title, count in spans.items()]
    head = [
        _latex_line(["", *groups]),
        _latex_line(["Benchmark", *(escaped(title) for _, title, _ in made)]),
        r"\hline",
    ]
    body = [
        _latex_line([escaped(str(name)), *(escaped(entry.text) for entry in row if isinstance(entry, Entry))])
        for name, *row in transposed(outcomes, tasks)
    ]
    return _latex_page("l" + "|".join("c" * count for count in spans.values()), [*head, *body], caption)


def _latex(entry: Entry) -> str:
    text = escaped(entry.text)
    if entry.best:
        text = rf"$\mathbf{{{text.strip('$')}}}$"
    return rf"{text}{{\tiny$\pm${entry.error}}}" if entry.error else text


def _latex_line(cells: Any) -> str:
    return " & ".join(cells) + r" \\"


def _latex_page(shape: str, lines: Sequence[str], caption: str) -> str:
    return "\n".join(
        [
            r"\begin{table*}[t]",
            r"\centering",
            rf"\caption{{{escaped(caption)}}}",
            r"\scriptsize",
            r"\setlength{\tabcolsep}{2pt}",
            rf"\begin{{tabular}}{{{shape}}}",
            r"\hline",
            *lines,
            r"\hline",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
} | {mark: "\\" + mark for mark in "&%$#_{}"}


def escaped(text: str) -> str:
    """Return plain text as LaTeX; a leading minus becomes a minus sign."""
    if len(text) > 1 and text[0] == "-" and text[1].isdigit():
        return f"${text}$"
    return "".join(_SPECIAL.get(mark, mark) for mark in text)
