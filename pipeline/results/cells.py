"""The cells of the paper's tables 1, 2 and 3: which there are, what defines one, which vector QPruner3 is.

A cell is one model to train and judge: a method at a ratio, or a variant of the ablation. Nothing here runs one
(``stages/cells.py`` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.params import Params, digest
from pipeline.results import labels
from pipeline.results.labels import UNTOUCHED
from pipeline.trial.result import MEASURED, Result

ROWS = ("llm_pruner", "qpruner1", "qpruner2", "qpruner3")
VARIANT = "variant"
_WHERE = ("workers", "cluster", "retries")  # of section ``search``: where it runs, which no result depends on


@dataclass(frozen=True)
class Cell:
    """One model to train and judge.

    Attributes:
        row: ``dense``, one of ``ROWS``, or ``VARIANT``.
        params: The params that it runs with: its ratio and its variant's settings in place.
        title: What its run is called.
        bits: Its bit string, where it is given.
    """

    row: str
    params: Params
    title: str
    bits: str | None = None

    @property
    def ratio(self) -> float:
        """Return its pruning ratio; 0 for the untouched model."""
        return 0.0 if self.row == UNTOUCHED else self.params.prune.ratio


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: a result, an error, or neither as long as it was not run."""

    cell: Cell
    result: Result | None = None
    error: str = ""
    run_id: str = ""

    @property
    def state(self) -> str:
        """Return ``done``, ``failed`` or ``pending``."""
        return "done" if self.result else "failed" if self.error else "pending"


def at_ratio(params: Params, ratio: float) -> Params:
    """Return the params with another pruning ratio."""
    return changed(params, "prune", ratios=(ratio,))


def changed(params: Params, section: str, **values: object) -> Params:
    """Return the params with values of one section replaced."""
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


def cells(params: Params) -> list[Cell]:
    """Return the cells of table 1: the untouched model once, then the four methods at each ratio."""
    first = at_ratio(params, params.table.ratios[0])
    methods = [_method(row, at_ratio(params, ratio)) for ratio in params.table.ratios for row in ROWS]
    return [Cell(UNTOUCHED, first, labels.method(UNTOUCHED)), *methods]


def qpruner3(params: Params) -> Cell:
    """Return QPruner3's cell at the ratio of the params."""
    return _method("qpruner3", params)


def _method(row: str, params: Params) -> Cell:
    return Cell(row, params, f"{100 * params.prune.ratio:g}% {labels.method(row)}")


def definition(cell: Cell, origin: Mapping[str, object]) -> dict[str, object]:
    """Return all that a cell's result depends on, as plain values.

    Args:
        cell: The cell.
        origin: Digests of the base model and the data, and the device.
    """
    params = cell.params
    defining: dict[str, object] = {
        "row": cell.row,
        "measured": MEASURED,
        "origin": dict(origin),
        "seed": params.seed,
        "validation_rows": params.data.validation_rows,
        "judged": {"tasks": list(params.evaluate.tasks), "skip": params.evaluate.limit, "limit": params.table.limit},
        "batch_tokens": params.evaluate.batch_tokens,
        "recover": params.recover.model_dump(mode="json", exclude={"steps"}),
    }
    if cell.row == UNTOUCHED:
        return defining
    search = params.search.model_dump(mode="json", exclude={"n_trials", "references", *_WHERE})
    defining |= {
        "prune": params.prune.model_dump(mode="json"),
        "quantize": params.quantize.model_dump(mode="json"),
        "steps": params.table.steps,
        "granularity": search["granularity"],
    }
    if cell.bits:
        defining["bits"] = cell.bits
    if cell.row in ("qpruner2", "qpruner3"):
        defining["importance"] = params.importance.model_dump(mode="json")
        defining["space"] = [
            search[name] for name in ("bits", "max_8bit_fraction", "memory", "memory_budget_gib", "average_bits")
        ]
    if cell.row == "qpruner3":
        defining["search"] = search | {"n_trials": params.table.n_trials, "trial_steps": params.recover.steps}
    return defining


def key(cell: Cell, origin: Mapping[str, object]) -> str:
    """Return twelve hex digits that name a cell by all that defines it."""
    return digest(definition(cell, origin))


# --- the ablation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """A setting that the ablation varies, and the values it takes: value -> title."""

    title: str
    section: str
    name: str
    values: Mapping[str | int, str]


FACTORS = (
    Factor("4-bit type", "quantize", "four_bit", {"nf4": "NF4", "fp4": "FP4"}),
    Factor("4-bit codes", "quantize", "method", {"nearest": "nearest", "calibrated": "calibrated"}),
    Factor(
        "initialization",
        "quantize",
        "init",
        {"loftq": "LoftQ", "weighted": "weighted", "gaussian": "Gaussian", "pissa": "PiSSA"},
    ),
    Factor("target", "recover", "target", {"answers": "answers", "teacher": "teacher"}),
    Factor("LoftQ iterations", "quantize", "iterations", {1: "1", 2: "2", 4: "4"}),
    Factor("importance", "prune", "importance", {"taylor1": "Element1", "taylor2": "Element2"}),
)
Variants = list[tuple[Factor, str, Cell]]


def variants(default: Cell, bits: str) -> Variants:
    """Return the columns of table 2: (factor, title of the value, cell).

    One factor at a time is varied from the default; the value that is the default's is the default cell itself. A
    default that the paper does not vary over comes first in its factor.

    Args:
        default: QPruner3's cell at the ablation's ratio.
        bits: The bit vector that its search found; all variants take it.
    """
    columns: Variants = []
    for factor in FACTORS:
        now = getattr(getattr(default.params, factor.section), factor.name)
        if now not in factor.values:
            columns.append((factor, str(now), default))
        for value, title in factor.values.items():
            more = {"init": "loftq"} if factor.name == "iterations" else {}  # no other one iterates
            params = changed(default.params, factor.section, **{factor.name: value}, **more)
            cell = Cell(VARIANT, params, f"{100 * params.prune.ratio:g}% {factor.title} {title}", bits)
            columns.append((factor, title, default if params == default.params else cell))
    return columns
