"""The trials' MLflow runs, in step with the study's journal.

The journal is the truth. A result is recorded there first, then in MLflow. A store that cannot be reached holds up no
search: what it lacks waits (``tracking.patient``). What is lost with the process is written by the next command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import GIB, console, device, fits, identity, storage, tracking
from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.identity import Identity
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BENCHMARKS, UNFINISHED
from pipeline.search.allocate import Spaces
from pipeline.search.search import Settings
from pipeline.search.study import Study
from pipeline.stages.agreement import by_journal_run
from pipeline.tracking import Run

if TYPE_CHECKING:
    from pipeline.search.crew import Answers
    from pipeline.trial.recover import Steps
    from pipeline.trial.result import Result

# What of section ``search`` names a study: what may be tried, and by what it is judged.
_SPACE = {
    "granularity",
    "objective",
    "memory",
    "context",
    "bits",
    "max_8bit_fraction",
    "memory_budget_gib",
    "average_bits",
}


def study_identity(params: Params, folders: Sequence[Path], prefix: str = "") -> Identity:
    """Return what names a study: the models, the data, how and where a trial is run, what is searched, and the code.

    A GPU's trials compute with other modules than a CPU's, and types round differently: they do not belong on one
    front.

    Args:
        params: The params.
        folders: The checkpoints that trials are made of: pruned models and layer banks.
        prefix: Before the study's name.
    """
    parts = [storage.sha256(folder / storage.CHECKSUMS) for folder in folders]
    data = [tracking.md5(ALPACA), *(tracking.md5(BENCHMARKS / f"{task}.jsonl") for task in params.evaluate.tasks)]
    space = params.search.model_dump(include=_SPACE)
    ratios = list(params.prune.ratios)
    asked = params.evaluate.model_dump(include={"tasks", "limit", "final_limit", "batch_tokens"}, mode="json")
    settings = [params.recover, asked, params.data.validation_rows, ratios, space, params.seed]
    where = str(device.choose(params.device, params.dtype))
    return Identity(prefix + digest(parts, data, *settings, where), identity.code(*identity.TRIAL))


def search_settings(params: Params, units: int) -> Settings:
    """Return how the search of some params over a number of units goes."""
    from pipeline.stages import trials  # torch

    section = params.search
    return Settings(
        n_trials=section.n_trials,
        n_random=section.n_random,
        patience=section.patience,
        objective=section.objective,
        seed=params.seed,
        memory=section.memory,
        seed_vectors=tuple(trials.vector(text, params.prune.ratios, units) for text in section.seed_bits),
    )


class Recorder:
    """Keeps the trials' MLflow runs in step with the study.

    Args:
        run: The search's own run.
        study: The study.
        params: The params.
        spaces: The feasible vectors; None where no trial is run.
    """

    def __init__(self, run: Run, study: Study, params: Params, spaces: Spaces | None = None):
        self.run, self.study, self.params, self.spaces = run, study, params, spaces
        self._followed = 0  # finished trials whose front's hypervolume is logged

    def agree(self) -> None:
        """Give every finished trial its finished run below this search, whatever a killed process left of it.

        Raises:
            StoreError: The store cannot be reached.
        """
        known = by_journal_run(self.study.name, self.study.journal)
        for record in [*self.study.finished(), *self.study.references()]:
            tracked = known.get(record.run_id)
            if tracked is None:  # the store was lost, is another one, or could not be reached
                run = self.open(record.name, record.method, record.result.vector, reference=record.number is None)
                run.tags({tracking.JOURNAL_ID: record.run_id})
            else:
                run = Run(tracked.run_id, tracked.experiment_id)
                tracking.move(run.run_id, self.run)
            if tracked is None or tracked.status != "FINISHED":
                finish(run, record.name, record.result)

    def announce(self) -> None:
        """Say what was damaged in the journal, and what it holds that is not used."""
        journal = self.study.path
        if mended := self.study.mended:
            console.note(
                f"{journal} had {mended.lines} damaged lines; {mended.results} results of trials are kept, and the "
                f"damaged file is {mended.aside}"
            )
        if earlier := self.study.of_earlier_code():
            console.note(
                f"{earlier} trials of an earlier version of the code are kept in {journal}; they are not used, as "
                "their results may differ"
            )

    def take_up(self, answers: Answers) -> None:
        """Put what workers had written before their search was killed into the journal; ``agree`` does the rest."""
        taken = []
        for name, (run_id, result) in answers.read().items():
            if name in self.params.search.references:
                self.study.record_reference(name, run_id, result)
            elif not self.study.take_up(name, run_id, result):
                continue
            taken.append(name)
        answers.clear()
        if taken:
            console.note(f"taken up: {', '.join(taken)}, which workers had finished when the search was interrupted")

    def missing(self, measured: Callable[[Result], bool]) -> list[str]:
        """Return the reference rows that the study lacks, or that do not hold what is asked of them."""
        known = {record.name for record in self.study.references() if measured(record.result)}
        return [name for name in self.params.search.references if name not in known]

    def follow(self) -> None:
        """Log the hypervolume after each finished trial that has none yet."""
        from pipeline.search import pareto

        if self.spaces is None:
            return
        results = [record.result for record in self.study.finished()]
        points = [
            (result.score(self.study.objective)[0], float(result.peak(self.study.memory) or 0)) for result in results
        ]
        growth = pareto.growth(points, self.spaces.reach, self._followed)
        self.run.series("hypervolume", enumerate(growth, self._followed + 1))
        self._followed = len(results)

    def open(self, name: str, method: str, vector: Vector, reference: bool) -> Run:
        """Open the run of a trial or a reference with what it is: its vector, and what compares it with others."""
        kind, text = "reference" if reference else "trial", bit_text.write(vector.bits)
        belongs = {"stage": kind, "study": self.study.name, "journal": self.study.journal}
        decided = {"ratio": f"{vector.ratio:g}", "bits": text}
        run = self.run.child(name, {**belongs, "method": method, "name": name, **decided})
        granularity = self.params.search.granularity
        shown: dict[str, object] = {
            "bits": bit_text.grouped(text, fits.units_a_block(granularity)),
            "method": method,
            "granularity": granularity,
            "ratio": vector.ratio,
            "share_raised": round(bit_text.share_raised(text), 4),
        }
        space = None if self.spaces is None else self.spaces.at.get(vector.ratio)
        if space is not None and space.sizes:
            shown["average_bits"] = round(space.average(vector.bits), 4)
        run.params(shown)
        return run


def finish(run: Run, name: str, result: Result) -> None:
    """Log a result into its run and end it."""
    log_result(run, name, result)
    run.finish()


def log_result(run: Run, name: str, result: Result) -> None:
    """Log what a trial measured into its run, whose name then shows the figures: the UI's columns show no metric.

    Args:
        run: The trial's run.
        name: What the trial is called.
        result: What it measured.
    """
    run.metrics(result.metrics())
    run.json(result.record, tracking.ITEMS)
    log_losses(run, result)
    run.tags({"memory_source": result.memory_source, "mlflow.runName": f"{name}: {_figures(result)}"})


def log_losses(run: Run, result: Result) -> None:
    """Log the losses of a recovery step by step."""
    run.series("loss", enumerate(result.losses))
    run.series("held_out_loss", result.validation_losses)


def told(label: str, result: Result) -> str:
    """Return a line with what a trial measured."""
    return f"{label}: {_figures(result)}; {sum(result.seconds.values()):.0f} s"


def _figures(result: Result) -> str:
    text, gold = result.response_logprob, result.gold_logprob
    quality = f"response {text:.3f}, gold answer {gold:.3f}, {100 * result.accuracy:.1f} %"
    pruned = f"{100 * result.ratio:g} % pruned"
    return f"{quality}, {training_memory(result, 3)}, {pruned}, {bit_text.summary(result.bits)}"


def training_memory(result: Result, digits: int) -> str:
    """Return the peak of training as text; a dash for a model that was not trained."""
    peak = result.peak_memory_bytes
    return "- GiB" if peak is None else f"{peak / GIB:.{digits}f} GiB"


def unfinished(*parts: object) -> Path:
    """Return where the state of a recovery is kept until it ends, by all that defines it."""
    return UNFINISHED / f"{digest(*parts)}.safetensors"


def steps(label: str) -> Steps:
    """Return what shows the progress of a recovery under a label."""
    return lambda items: console.progress(items, label)
