"""The one style of all pictures: palette, font sizes, grid, and labels that cover no point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _ErrorBars(TypedDict):
    elinewidth: float
    capsize: float


INK = "#1d2733"
GREY = "#8a96a3"
BLUE = "#2f6fbb"
RED = "#c8442c"  # what a reader should look at: the front, QPruner3, 8 bits
PALE = "#dbe4ee"
SERIES = (BLUE, RED, "#d99a26", "#3a8f66", "#7a5ea8", GREY, "#2a9fb0", "#8c5a3c", INK, "#b5528f")
RATIOS = ("#173f5f", "#2f6fbb", "#2a9fb0", "#3a8f66", "#d99a26", "#e0722c")  # not pruned to pruned most
FONT = 9
SMALL = 7
DPI = 150
ERROR_BARS: _ErrorBars = {"elinewidth": 0.7, "capsize": 1.5}
_SETTINGS: Mapping[str, str | float | bool] = {
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT - 1,
    "ytick.labelsize": FONT - 1,
    "legend.fontsize": FONT - 1,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def picture(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, *, sharey: bool = False
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Give a figure and its axes, [rows, columns], in the project's style; write it as PNG if the block succeeds.

    Args:
        path: The PNG.
        size: Width and height in inches.
        rows: Panels below each other.
        columns: Panels beside each other.
        sharey: Whether all have the same vertical axis.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(_SETTINGS)):
        figure = Figure(figsize=size, dpi=DPI)
        FigureCanvasAgg(figure)  # draws without a display
        yield figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


# --- labels ------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]  # left, bottom, right, top
_DISTANCES = (7, 16, 28, 42, 58)  # points between a marker and its label
_ANGLES = (45, 135, 315, 225, 90, 270, 0, 180, 20, 70, 110, 160, 200, 250, 290, 340)  # degrees, the best first
_OUTSIDE = 100.0  # how much worse than an overlap it is to leave the axes


def boxes_of(axes: Axes, xs: Sequence[float], ys: Sequence[float], errors: Sequence[float], radius: float) -> list[Box]:
    """Return the pixels that markers with error bars cover.

    Args:
        axes: Where they are, with its final limits and layout.
        xs: Places in data units.
        ys: Places in data units.
        errors: Half the length of each error bar in data units.
        radius: Of a marker, in points.
    """
    reach = radius * DPI / 72
    boxes = []
    for x, y, error in zip(xs, ys, errors, strict=True):
        column, row = axes.transData.transform((x, y))
        low, high = (axes.transData.transform((x, end))[1] for end in (y - error, y + error))
        boxes += [(column - reach, row - reach, column + reach, row + reach), (column - 2, low, column + 2, high)]
    return boxes


def steps_of(axes: Axes, places: Sequence[tuple[float, float]]) -> list[Box]:
    """Return the pixels of a line that is level from each place until the next one, then goes up or down to it."""
    pixels = [tuple(axes.transData.transform(place)) for place in places]
    boxes = []
    for (x, y), (next_x, next_y) in itertools.pairwise(pixels):
        boxes.append((min(x, next_x), y - 1, max(x, next_x), y + 1))
        boxes.append((next_x - 1, min(y, next_y), next_x + 1, max(y, next_y)))
    return boxes


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str]], taken: Sequence[Box]) -> list[Box]:
    """Write labels beside their points so that they cover neither a point, nor an error bar, nor each other.

    Each label takes the first free place around its point, nearest first; without one, the place that covers least.

    Args:
        axes: Where the points are, with its final limits and layout.
        labels: (x, y, text) in data units, the most important one first.
        taken: Pixels that must stay free.

    Returns:
        The pixels of each label.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # of FigureCanvasAgg
    occupied, placed = list(taken), []
    bounds = axes.get_window_extent(renderer).extents
    for x, y, text in labels:
        written = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=FONT - 1,
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": INK, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        anchor = axes.transData.transform((x, y))
        width, height, _ = renderer.get_text_width_height_descent(text, written.get_fontproperties(), False)
        size = width + 6, height + 4
        centers = [_beside(anchor, size, distance * DPI / 72, angle) for distance in _DISTANCES for angle in _ANGLES]
        center = min(centers, key=lambda place: _cost(anchor, place, size, occupied, bounds))
        written.set_position(tuple((center[axis] - anchor[axis]) * 72 / DPI for axis in (0, 1)))
        box = _around(center, size)
        occupied.append(box)
        placed.append(box)
    return placed


def _beside(anchor: np.ndarray, size: tuple[float, float], distance: float, angle: float) -> tuple[float, float]:
    """Return the center of a box whose nearest side, or corner, is at a distance from the anchor."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    sideways, upwards = (max(-1.0, min(1.0, math.sqrt(2) * share)) for share in (across, up))  # a corner at 45 degrees
    return anchor[0] + across * distance + sideways * size[0] / 2, anchor[1] + up * distance + upwards * size[1] / 2


def _around(center: tuple[float, float], size: tuple[float, float]) -> Box:
    (x, y), (width, height) = center, size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _cost(
    anchor: np.ndarray,
    center: tuple[float, float],
    size: tuple[float, float],
    occupied: Sequence[Box],
    bounds: Box,
) -> float:
    """Return how many pixels a label would cover there, its leader line included; 0: nothing."""
    box = _around(center, size)
    outside = sum(max(0.0, excess) for excess in (bounds[0] - box[0], bounds[1] - box[1],
                                                   box[2] - bounds[2], box[3] - bounds[3]))  # fmt: skip
    covered = sum(_overlap(box, other) for other in occupied)
    line = [tuple(anchor[axis] + share * (center[axis] - anchor[axis]) for axis in (0, 1)) for share in _ALONG]
    crossed = sum(
        other[0] <= x <= other[2] and other[1] <= y <= other[3]
        for x, y in line
        if max(abs(x - anchor[0]), abs(y - anchor[1])) > 12  # its own marker and error bar
        for other in occupied
    )
    return _OUTSIDE * outside + 20 * covered + 5 * crossed


_ALONG = tuple(step / 12 for step in range(1, 12))  # places along a leader line


def _overlap(box: Box, other: Box) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(0.0, width) * max(0.0, height)
