"""A table as data, and how it is written as Markdown and LaTeX.

``templates/table.html`` writes it as HTML, ``console.table`` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A figure in a table, its standard error, and whether it is the best of its group."""

    text: str
    error: str = ""
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text} ± {self.error}" if self.error else self.text


Cell = str | Entry


@dataclass(frozen=True)
class Table:
    """A titled table; columns after the first hold figures.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: Cells, [rows, columns].
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def texts(self) -> list[list[str]]:
        """Return the cells as plain texts, [rows, columns]."""
        return [[str(cell) for cell in row] for row in self.rows]


def figure(value: float, error: float, factor: float = 1.0, digits: int = 3) -> Entry:
    """Return a value with its standard error, both multiplied by a factor and rounded."""
    return Entry(f"{factor * value:.{digits}f}", f"{factor * error:.{digits}f}")


def percent(value: float, error: float) -> Entry:
    """Return a share in [0, 1] with its standard error in per cent, one digit after the point."""
    return figure(value, error, 100, 1)


# --- Markdown ----------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """Return a table as Markdown without its title; the best entries are bold, standard errors follow a ±."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(map(_markdown, row)) + " |" for row in rows)


def _markdown(cell: Cell) -> str:
    text = str(Entry(f"**{cell.text}**", cell.error) if isinstance(cell, Entry) and cell.best else cell)
    return text.replace("|", "\\|")  # it would end the cell


def markdown_section(table: Table) -> list[str]:
    """Return the lines of a table below its title as a heading."""
    return [f"## {table.title}", "", markdown(table), ""]


# --- LaTeX -------------------------------------------------------------------------------------------------------


def latex(shape: str, lines: Iterable[str], caption: str) -> str:
    r"""Return a LaTeX ``table*`` that needs no package.

    Args:
        shape: Of the columns, such as ``lcc``.
        lines: Rows and rules between the outer rules.
        caption: Plain text above the table.
    """
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


def latex_row(cells: Iterable[str]) -> str:
    r"""Return cells that are LaTeX already as one row."""
    return " & ".join(cells) + r" \\"


def latex_entry(entry: Entry) -> str:
    """Return an entry as LaTeX: the best one bold, its standard error small behind a ±."""
    text = escaped(entry.text)
    if entry.best:
        text = rf"$\mathbf{{{text.strip('$')}}}$"
    return rf"{text}{{\tiny$\pm${entry.error}}}" if entry.error else text


_SPECIAL: Mapping[str, str] = {
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
