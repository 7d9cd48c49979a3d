"""The tasks that are asked beside the search: from the params, and what names their results."""

from __future__ import annotations

from pathlib import Path

from pipeline import tracking
from pipeline.data import further
from pipeline.params import Params
from pipeline.paths import BENCHMARKS
from pipeline.trial.further import Further


def tasks(params: Params, items: Path = BENCHMARKS) -> Further | None:
    """Return what is measured beside what trials go by; None: nothing."""
    section = params.evaluate
    if not section.further and section.text is None:
        return None
    loaded = further.load(section.further, items, section.num_fewshot, text=section.text is not None)
    return Further(loaded, section.further_limit)


def named(params: Params) -> list[object]:
    """Return what names the results of further tasks beside the model: nothing where there are none."""
    section = params.evaluate
    files = further.files(section.further, section.num_fewshot) + ([f"{further.TEXT}.jsonl"] if section.text else [])
    if not files:
        return []
    return [files, [tracking.md5(BENCHMARKS / file) for file in files], section.num_fewshot, section.further_limit]
