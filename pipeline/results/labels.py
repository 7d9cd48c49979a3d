"""What users read for methods, benchmarks, objectives and trials: one name for each, in every table and picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.search.pareto import Point

UNTOUCHED = "dense"
QPRUNER3 = "qpruner3"
METHODS: Mapping[str, str] = {
    UNTOUCHED: "untouched",
    "llm_pruner": "LLM-Pruner (16-bit)",
    "uniform8": "uniform 8-bit",
    "qpruner1": "QPruner1",
    "qpruner2": "QPruner2",
    QPRUNER3: "QPruner3",
    "sensitivity": "sensitivity",
    "smallest": "smallest",
    "uniform": "same bits everywhere",
    "best": "best of all",
    "sampler": "sampler",
    "random": "random",
    "seed": "seed_bits",
}
TASKS: Mapping[str, str] = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
LOGPROBS: Mapping[str, str] = {"gold_logprob": "the gold answer", "response_logprob": "a held-out token"}
_SHORT_LOGPROBS: Mapping[str, str] = {"gold_logprob": "gold answer, nats", "response_logprob": "response, nats"}


def method(name: str) -> str:
    """Return what users call a method; a name that is not listed stands for itself."""
    return METHODS.get(name, name)


def task(name: str) -> str:
    """Return what users call a benchmark."""
    return TASKS.get(name, name)


def scale(objective: str) -> tuple[float, str]:
    """Return the factor that an objective is multiplied by where it is shown, and its name with the unit."""
    if objective in LOGPROBS:
        return 1.0, f"log-probability of {LOGPROBS[objective]}, nats"
    return 100.0, f"{'mean accuracy' if objective == 'accuracy' else task(objective)}, %"


def short(objective: str) -> str:
    """Return an objective's name with the unit where room is short."""
    return _SHORT_LOGPROBS.get(objective) or scale(objective)[1]


def ratio(value: float) -> str:
    """Return a pruning ratio as users read it."""
    return f"{100 * value:g} % pruned" if value else "not pruned"


def memory(step: str) -> str:
    """Return what the axis of memory is called: of ``training`` or ``inference``."""
    return f"peak memory of {step}, GiB"


def placed(points: Sequence[Point]) -> list[Point]:
    """Return the points that have a place on the axis of memory: an untrained model has none in training's."""
    return [point for point in points if math.isfinite(point.memory)]


def error(point: Point) -> float:
    """Return the standard error that a point is shown with: of differences between trials, where it is known."""
    return point.stderr if point.paired is None else point.paired


def trial(point: Point) -> str:
    """Return a trial's name, such as ``trial 7``; its run's name holds figures after a colon."""
    return point.name.partition(":")[0]


def number(point: Point) -> str:
    """Return a trial's number alone, for marks in pictures."""
    return trial(point).removeprefix("trial ")
