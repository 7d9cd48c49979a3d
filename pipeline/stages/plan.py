"""Entry point ``plan``: which pruning ratios and bits fit a memory, from a model's config alone."""

from __future__ import annotations

from dataclasses import asdict

from pipeline import console, tracking
from pipeline.paths import REPORTS
from pipeline.results import plan
from pipeline.results.plan import Asked


def show(asked: Asked) -> None:
    """Print which ratios and bits fit the memory that was asked for; keep tables and picture, tracked as a run."""
    setting = plan.setting_of(asked.params)
    shown = {"config": asked.name, "memory_gib": asked.budget_gib, **asdict(setting)}
    with tracking.stage("plan", shown) as run:
        peaks = plan.table(asked.config, setting, asked.budget_gib)
        sections = [plan.summary(peaks, step) for step in ("training", "inference")]
        paper = plan.beside_paper(asked)
        if paper is not None:
            sections.append(paper)
        for section in sections:
            console.table(section.title, section.columns, section.texts)
        for fact in plan.facts(asked):
            console.note(fact)
        written = plan.write(asked, peaks, sections, REPORTS)
        for path in written:
            run.artifact(path)
        fitting = peaks[peaks["training_fits"]]
        run.metrics({"fitting": len(fitting), "smallest_training_gib": float(peaks["training_gib"].min())})
    console.note(f"Written: {', '.join(map(str, written))}")
