"""HTML pages that need no network: the report, and the front with each trial's figures under the pointer.

jinja2 fills ``templates/`` and escapes every text that it fills in.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import GIB
from pipeline.results import figures, labels, style
from pipeline.results.tables import Table
from pipeline.search.pareto import Point

_WIDTH, _HEIGHT = 1000, 560
_LEFT, _TOP, _RIGHT, _BOTTOM = 80, 15, 980, 500  # of the axes, in the picture's units
_MARGIN = 0.08  # room around the points, as a share of their extent


@functools.cache
def _environment() -> Environment:
    folder = Path(__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = style
    return environment


def render(template: str, **values: object) -> str:
    """Return a page: a template of ``templates/`` with values filled in, every text of them escaped."""
    return _environment().get_template(template).render(**values)


@dataclass(frozen=True)
class Section:
    """A part of the report: lines, a table and a command, each where it is given."""

    title: str
    lines: Sequence[str] = ()
    table: Table | None = None
    code: str = ""


def report(
    title: str,
    facts: Sequence[str],
    sections: Sequence[Section],
    pictures: Mapping[str, Path],
    glossary: Sequence[tuple[str, str]],
) -> str:
    """Return the report as one page that holds its pictures.

    Args:
        title: Of the page.
        facts: Lines above the sections.
        sections: Its parts.
        pictures: Caption -> PNG.
        glossary: Terms and what they mean.
    """
    shown = [
        {"caption": caption, "data": base64.b64encode(path.read_bytes()).decode()} for caption, path in pictures.items()
    ]
    return render("report.html", title=title, facts=facts, sections=sections, pictures=shown, glossary=glossary)


# --- the front ---------------------------------------------------------------------------------------------------


def front(
    points: Sequence[Point], members: Sequence[Point], objective: str, table: Table, memory: str = "training"
) -> str:
    """Return the picture of the front as a page with each point's figures under the pointer.

    Args:
        points: All points of a study.
        members: Its front, lowest memory first.
        objective: What they were judged by.
        table: The figures of ``points``, a row each; it stands below the picture, too.
        memory: The peak that counts.
    """
    tips = {
        point.run_id: "\n".join(f"{column}: {text}" for column, text in zip(table.columns, row, strict=True))
        for point, row in zip(points, table.texts, strict=True)
    }
    panels = {"Trials": [point for point in points if not point.reference], "Trials and references": points}
    colors = _colors(points)
    return render(
        "front.html",
        title="Pareto front",
        legend=list(colors.items()),
        plots=[_plot(title, shown, members, objective, tips, colors, memory) for title, shown in panels.items()],
        table=table,
    )


def _colors(points: Sequence[Point]) -> dict[str, str]:
    """Return what the colours of marks mean: ratios where there are several, else whether a trial is on the front."""
    ratios = sorted({point.ratio for point in points if not point.reference})
    if len(ratios) > 1:
        shades = zip(map(labels.ratio, ratios), figures.ratio_colors(len(ratios)), strict=True)
        return {**dict(shades), "reference": style.GREY}
    return {"Pareto front": style.RED, "trial": style.GREY, "reference": style.BLUE}


def _color(point: Point, colors: Mapping[str, str], *, on_front: bool) -> str:
    if point.reference:
        return colors["reference"]
    return colors.get(labels.ratio(point.ratio)) or colors["Pareto front" if on_front else "trial"]


def _plot(
    title: str,
    points: Sequence[Point],
    members: Sequence[Point],
    objective: str,
    tips: Mapping[str, str],
    colors: Mapping[str, str],
    memory: str,
) -> dict[str, object]:
    """Return what the template draws: places of marks, ticks and lines, and each mark's figures."""
    factor, y_name = labels.scale(objective)
    trained = labels.placed(points)
    untouched = [point for point in points if not labels.placed([point])]
    ends = [factor * (point.score + sign * labels.error(point)) for point in trained for sign in (-1, 1)]
    across = _Axis([point.memory / GIB for point in trained], _LEFT, _RIGHT)
    up = _Axis([*ends, *(factor * point.score for point in untouched)], _BOTTOM, _TOP)
    inside = {member.run_id for member in members}
    marks = []
    for point in trained:
        value, error = factor * point.score, factor * labels.error(point)
        on_front = point.run_id in inside
        marks.append(
            {
                "x": across.at(point.memory / GIB),
                "y": up.at(value),
                "low": up.at(value - error),
                "high": up.at(value + error),
                "radius": 7 if on_front else 5,
                "color": _color(point, colors, on_front=on_front),
                "tip": tips[point.run_id],
                "on_front": on_front,
            }
        )
    return {
        "title": title,
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "bottom": _BOTTOM,
        "x_name": labels.memory(memory),
        "y_name": y_name,
        "x_ticks": across.ticks(),
        "y_ticks": up.ticks(),
        "lines": [(labels.method(point.method), up.at(factor * point.score)) for point in untouched],
        "marks": sorted(marks, key=lambda mark: mark["on_front"]),  # the front is drawn last, over the others
        "steps": _steps([(across.at(member.memory / GIB), up.at(factor * member.score)) for member in members]),
    }


def _steps(places: Sequence[tuple[float, float]]) -> str:
    """Return an SVG path along the front: level until the next member, then up to it."""
    if not places:
        return ""
    return f"M{places[0][0]} {places[0][1]}" + "".join(f"H{x}V{y}" for x, y in places[1:])


class _Axis:
    """Values along one axis as places in the picture.

    Args:
        values: What must lie on it.
        start: Where its low end is.
        end: Where its high end is.
    """

    def __init__(self, values: Sequence[float], start: float, end: float):
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        margin = _MARGIN * ((high - low) or abs(high) or 1.0)
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def at(self, value: float) -> float:
        """Return where a value is."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (place, text) of round values."""
        from matplotlib.ticker import MaxNLocator, ScalarFormatter

        values = [value for value in MaxNLocator(8).tick_values(self.low, self.high) if self.low <= value <= self.high]
        formatter = ScalarFormatter(useOffset=False)
        formatter.create_dummy_axis()
        texts = formatter.format_ticks(values)
        return [(self.at(value), text) for value, text in zip(values, texts, strict=True)]
