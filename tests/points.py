"""Points of a study, as MLflow would give them."""

import dataclasses
import math

from pipeline import GIB
from pipeline.search.pareto import Point


def point(method, score=0.5, memory=GIB, bits="4484", stderr=0.025, name="trial 3", **changes):
    trained = {} if method == "dense" else {"peak_memory_bytes": memory}
    metrics = (
        trained
        | {"boolq": 0.6, "boolq_stderr": 0.04, "accuracy": score, "accuracy_stderr": stderr}
        | {
            "gold_logprob": -1.5,
            "gold_logprob_stderr": 0.125,
            "response_logprob": -2.25,
            "response_logprob_stderr": 0.25,
            "inference_memory_bytes": memory / 4,
        }
    )
    training = memory if trained else math.nan
    made = Point("a" * 32, f"{name}: figures", method, bits, score, stderr, training, "predicted", False, metrics)
    return dataclasses.replace(made, **changes)
