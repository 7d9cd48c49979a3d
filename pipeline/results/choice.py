"""The choice: which trial was built and why, what it scored on unseen items, and what it takes beside the original."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import GIB, bits
from pipeline.results import labels
from pipeline.results.pages import Section
from pipeline.results.report import MIB
from pipeline.results.tables import Cell, Table
from pipeline.search import pareto
from pipeline.search.pareto import Point

_QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Built:
    """What later stages left of the built model.

    Attributes:
        run_id: Run of the trial whose bits it has; empty where ``build.choose`` gives bits.
        figures: Metrics of ``build``.
        held_out: Metrics of ``evaluate``.
        sizes: Bytes on disk: ``untouched`` and ``built``.
        model: ``models:/<name>/<version>``; empty while it is not registered.
        alias: Its alias in the registry; empty while it has none.
    """

    run_id: str
    figures: Mapping[str, float]
    held_out: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    model: str = ""
    alias: str = ""


def section(built: Built, points: Sequence[Point], members: Sequence[Point], objective: str) -> Section:
    """Return the report's part about the built model."""
    lines = [_reason(built, points, members, objective), *_scores(built), *_registered(built)]
    return Section("The built model", lines, _table(built, points), command(built) if built.model else "")


def _reason(built: Built, points: Sequence[Point], members: Sequence[Point], objective: str) -> str:
    chosen = [point for point in points if point.run_id == built.run_id]
    if not chosen:
        return "build.choose gave its bits"
    (point,) = chosen
    what = f"{labels.ratio(point.ratio)}, {bits.summary(point.bits)}; {labels.method(point.method)}"
    name = f"{labels.trial(point)} was built ({what})"
    if not members or pareto.best(members).run_id != point.run_id:
        return f"{name}: build.choose names it"
    judged = pareto.best(members)
    if judged.expected is None:
        return f"{name}: it has the highest score on the front"
    factor, quality = labels.scale(objective)
    digits = 1 if factor == 100 else 3
    return (
        f"{name}: of {len(members)} trials on the front it has the highest expected score "
        f"({factor * judged.expected:.{digits}f}; {quality})"
    )


def _scores(built: Built) -> list[str]:
    held_out = built.held_out
    if not held_out:
        return []
    unseen = held_out.get("unseen_items", held_out["items"])
    where = f"{unseen:,.0f} items that no trial saw" if unseen else "the trials' own items, as none was left"
    return [
        f"On {where}: accuracy {100 * held_out['accuracy']:.1f} ± {100 * held_out['accuracy_stderr']:.1f} %, "
        f"gold answer {held_out['gold_logprob']:.3f} ± {held_out['gold_logprob_stderr']:.3f} nats"
    ]


def _registered(built: Built) -> list[str]:
    if not built.model:
        return []
    alias = f"alias {built.alias}" if built.alias else "without an alias: another version is better, or is kept"
    return [f"Registered as {built.model}, {alias}"]


def _table(built: Built, points: Sequence[Point]) -> Table:
    """Return what the model takes: untouched, pruned at 16 bits, and as built."""
    rows: list[list[Cell]] = []
    for name in (labels.UNTOUCHED, "llm_pruner"):
        for point in points:
            if point.method == name:
                trained = name != labels.UNTOUCHED
                training = point.metrics.get("peak_memory_bytes") if trained else None
                inference = point.metrics.get("inference_memory_bytes")
                size = None if trained else built.sizes.get("untouched")
                rows.append([labels.method(name), *_amounts(training, inference, size)])
    figures = built.figures
    amounts = figures.get("peak_memory_bytes"), figures.get("inference_memory_bytes"), built.sizes.get("built")
    rows.append(["built", *_amounts(*amounts)])
    return Table("What it takes", ["model", "training, GiB", "inference, MiB", "on disk, MiB"], rows)


def _amounts(training: float | None, inference: float | None, size: float | None) -> list[Cell]:
    return [
        "-" if training is None else f"{training / GIB:.3f}",
        "-" if inference is None else f"{inference / MIB:.0f}",
        "-" if size is None else f"{size / MIB:.0f}",
    ]


def command(built: Built) -> str:
    """Return one line for a shell in this folder that asks the registered model a question."""
    name = built.model.rpartition("/")[0] + f"@{built.alias}" if built.alias else built.model
    code = f'import mlflow; print(mlflow.pyfunc.load_model("{name}").predict(["{_QUESTION}"]))'
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return shlex.join([str(shown), "-c", code])
