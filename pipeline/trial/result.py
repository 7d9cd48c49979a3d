"""What a trial measured, and its form in a journal: plain values that JSON and MLflow hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import GIB
from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.trial.recover import Recovered
from pipeline.trial.scores import Scores

# Keys of a result's JSON. They name a study and a cell too: a version that measures something else starts its own.
MEASURED = [
    "ratio",
    "bits",
    "accuracy",
    "accuracy_stderr",
    "tasks",
    "other",
    "gold_logprob",
    "gold_logprob_stderr",
    "validation_loss",
    "validation_loss_stderr",
    "peak_memory_bytes",
    "inference_memory_bytes",
    "memory_source",
    "seconds",
    "items",
    "losses",
    "by_item",
    "by_row",
    "validation_losses",
    "trained_tokens",
]
# Metrics among ``other``, of a run on a GPU; the last one of earlier versions, which measured what they judged by.
_OF_RUN = (
    "run_peak_memory_bytes",
    "run_predicted_memory_bytes",
    "run_inference_memory_bytes",
    "run_micro_batch_size",
    "run_batch_tokens",
    "predicted_peak_memory_bytes",
)


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a trial with the user's batch sizes on CUDA.

    Attributes:
        training: Of its recovery; None of a model that was not trained.
        inference: Of its evaluation.
        source: ``predicted``; of earlier versions on CUDA ``measured``.
        of_run: What was measured on a GPU, whose passes may be larger, by its name in MLflow.
    """

    training: int | None
    inference: int
    source: str
    of_run: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a trial measured.

    Attributes:
        vector: The pruning ratio and the bits of each unit.
        scores: Of the benchmarks.
        recovered: Of the recovery and the held-out rows.
        memory: Peak bytes.
        seconds: Phase -> seconds.
    """

    vector: Vector
    scores: Scores
    recovered: Recovered
    memory: Memory
    seconds: dict[str, float]

    @staticmethod
    def of(
        vector: Vector, scores: Scores, recovered: Recovered, memory: Memory, seconds: Mapping[str, float]
    ) -> Result:
        """Return the result of a trial; what it measured item by item is rounded to the six digits that are kept."""
        by_item = {
            task: [(_rounded(metric), _rounded(gold)) for metric, gold in items]
            for task, items in scores.by_item.items()
        }
        by_row = tuple((_rounded(loss), count) for loss, count in recovered.validation_rows)
        return Result(
            vector, replace(scores, by_item=by_item), replace(recovered, validation_rows=by_row), memory, dict(seconds)
        )

    @property
    def ratio(self) -> float:
        """Return the share of the parameters that was pruned."""
        return self.vector.ratio

    @property
    def bits(self) -> str:
        """Return the bits as text."""
        return bit_text.write(self.vector.bits)

    @property
    def accuracy(self) -> float:
        """Return the mean accuracy, in [0, 1]."""
        return self.scores.mean

    @property
    def accuracy_stderr(self) -> float:
        """Return its standard error."""
        return self.scores.mean_stderr

    @property
    def tasks(self) -> dict[str, tuple[float, float]]:
        """Return each task's accuracy and its standard error."""
        return {task: (value, self.scores.stderr[task]) for task, value in self.scores.accuracy.items()}

    @property
    def items(self) -> int:
        """Return the number of items scored."""
        return self.scores.items

    @property
    def by_item(self) -> dict[str, list[tuple[float, float]]]:
        """Return of each task's items the task's own metric and the log-probability of the gold choice."""
        return self.scores.by_item

    @property
    def gold_logprob(self) -> float:
        """Return the mean log-probability of the gold choice, in nats."""
        return self.scores.gold_logprob

    @property
    def gold_logprob_stderr(self) -> float:
        """Return its standard error."""
        return self.scores.gold_logprob_stderr

    @property
    def validation_loss(self) -> float:
        """Return the mean loss of a response token on held-out rows, in nats."""
        return self.recovered.validation_loss

    @property
    def validation_loss_stderr(self) -> float:
        """Return its standard error."""
        return self.recovered.validation_stderr

    @property
    def response_logprob(self) -> float:
        """Return the mean log-probability of a response token on held-out rows, in nats: higher is better."""
        return -self.validation_loss

    @property
    def response_logprob_stderr(self) -> float:
        """Return its standard error."""
        return self.validation_loss_stderr

    @property
    def losses(self) -> Sequence[float]:
        """Return the training loss of each step."""
        return self.recovered.losses

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """Return (step, validation loss) during recovery, where ``recover.validate_every`` asks for it."""
        return list(self.recovered.validation_losses.items())

    @property
    def peak_memory_bytes(self) -> int | None:
        """Return the peak of training, None of a model that was not trained."""
        return self.memory.training

    @property
    def inference_memory_bytes(self) -> int:
        """Return the peak of inference."""
        return self.memory.inference

    def peak(self, step: str) -> int | None:
        """Return the peak of ``training`` or of ``inference``."""
        return self.memory.training if step == "training" else self.memory.inference

    @property
    def memory_source(self) -> str:
        """Return ``predicted``; of earlier versions on CUDA ``measured``."""
        return self.memory.source

    def metrics(self) -> dict[str, float]:
        """Return the figures by their names in MLflow; a model that was not trained has no peak of training."""
        peak = self.peak_memory_bytes
        training = {} if peak is None else {"peak_memory_bytes": float(peak), "peak_memory_gib": peak / GIB}
        figures = {
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr,
            "gold_logprob": self.gold_logprob,
            "gold_logprob_stderr": self.gold_logprob_stderr,
            "validation_loss": self.validation_loss,
            "response_logprob": self.response_logprob,
            "response_logprob_stderr": self.response_logprob_stderr,
            **training,
            "inference_memory_bytes": float(self.inference_memory_bytes),
            "items": float(self.items),
            "trained_tokens": float(self.recovered.tokens),
            **self._other(),
        }
        for task, (value, error) in self.tasks.items():
            figures |= {task: value, f"{task}_stderr": error}
        return figures | {f"seconds_{phase}": value for phase, value in self.seconds.items()}

    def _other(self) -> dict[str, float]:
        return self.scores.other | {name: float(value) for name, value in self.memory.of_run.items()}

    def score(self, objective: str) -> tuple[float, float]:
        """Return an objective of section ``search`` by its name, and its standard error."""
        return getattr(self, objective), getattr(self, f"{objective}_stderr")

    @property
    def record(self) -> dict[str, object]:
        """Return what it measured item by item, as ``paired`` reads it."""
        return {"by_item": self.by_item, "by_row": list(self.recovered.validation_rows)}

    def as_json(self) -> dict[str, object]:
        """Return plain values, one for each of ``MEASURED``."""
        return {
            "ratio": self.ratio,
            "bits": self.bits,
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr,
            "tasks": self.tasks,
            "other": self._other(),
            "gold_logprob": self.gold_logprob,
            "gold_logprob_stderr": self.gold_logprob_stderr,
            "validation_loss": self.validation_loss,
            "validation_loss_stderr": self.validation_loss_stderr,
            "peak_memory_bytes": self.peak_memory_bytes,
            "inference_memory_bytes": self.inference_memory_bytes,
            "memory_source": self.memory_source,
            "seconds": self.seconds,
            "items": self.items,
            "losses": list(self.losses),
            **self.record,
            "validation_losses": self.validation_losses,
            "trained_tokens": self.recovered.tokens,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Result:
        """Return the result that ``as_json`` was made from."""
        other = dict(values["other"])
        of_run = {name: int(other.pop(name)) for name in _OF_RUN if name in other}
        return Result(
            Vector(values["ratio"], bit_text.read(values["bits"])),
            Scores(
                accuracy={task: float(value) for task, (value, _) in values["tasks"].items()},
                stderr={task: float(error) for task, (_, error) in values["tasks"].items()},
                other=other,
                mean=values["accuracy"],
                mean_stderr=values["accuracy_stderr"],
                gold_logprob=values["gold_logprob"],
                gold_logprob_stderr=values["gold_logprob_stderr"],
                items=values["items"],
                by_item={task: [(metric, gold) for metric, gold in items] for task, items in values["by_item"].items()},
            ),
            Recovered(
                losses=tuple(values["losses"]),
                validation_rows=tuple((loss, count) for loss, count in values["by_row"]),
                validation_losses={step: loss for step, loss in values["validation_losses"]},
                tokens=values["trained_tokens"],
                validation_loss=values["validation_loss"],
                validation_stderr=values["validation_loss_stderr"],
            ),
            Memory(values["peak_memory_bytes"], values["inference_memory_bytes"], values["memory_source"], of_run),
            dict(values["seconds"]),
        )


def _rounded(value: float) -> float:
    return round(value, 6)
