"""The trials' MLflow runs, in step with the study's journal.

The journal is the truth. A result is recorded there first, then in MLflow. A store that cannot be reached holds up no
search: what it lacks waits (``tracking.patient``). What is lost with the process is written by the next command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import GIB, console, device, fits, identity, storage, tracking
from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.identity import Identity
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BENCHMARKS, UNFINISHED
from pipeline.results import labels
from pipeline.search.allocate import Spaces
from pipeline.search.history import paper_ratio
from pipeline.search.search import Attempt, Settings
from pipeline.search.study import Candidate, Study, trial_name
from pipeline.stages.agreement import by_journal_run
from pipeline.tracking import Run

if TYPE_CHECKING:
    from pipeline.search.study import Trial
    from pipeline.stages.trials import Contexts
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
    """Runs trials and keeps their MLflow runs in step with the study.

    Args:
        run: The search's own run.
        study: The study.
        params: The params.
        contexts: What the trials share, by ratio; None where none is run.
        spaces: The feasible vectors; None where none is run.
    """

    def __init__(
        self, run: Run, study: Study, params: Params, contexts: Contexts | None = None, spaces: Spaces | None = None
    ):
        self.run, self.study, self.params, self.contexts, self.spaces = run, study, params, contexts, spaces
        self.screen = console.Search(params.search.n_trials)
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
                run = self._open(record.name, record.method, record.result.vector, reference=record.number is None)
                run.tags({tracking.JOURNAL_ID: record.run_id})
            else:
                run = Run(tracked.run_id, tracked.experiment_id)
                tracking.move(run.run_id, self.run)
            if tracked is None or tracked.status != "FINISHED":
                _finish(run, record.name, record.result)

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

    def references(self) -> None:
        """Measure the reference rows that the study lacks, or of which it lacks further tasks."""
        further = self.context.further if self.context else None
        known = {
            record.name
            for record in self.study.references()
            if further is None or further.measured(record.result.scores.other)
        }
        for name in self.params.search.references:
            if name not in known:
                self._reference(name)

    def _reference(self, name: str) -> None:
        from pipeline.stages import trials
        from pipeline.trial import trial

        assert self.contexts is not None
        width = 8 if name == "uniform8" else bit_text.DENSE
        ratio = 0.0 if name == "dense" else paper_ratio(list(self.contexts.folders))
        vector = Vector(ratio, (width,) * len(self.contexts.any.units))
        run = self._open(name, name, vector, reference=True)
        kept = unfinished(self.study.name, name)
        self.screen.begin(f"reference {labels.method(name)}")
        try:
            if name == "dense":
                result = trials.untouched(self.params, self.contexts.any)
            else:
                context, work = self.contexts.at(ratio), trial.Work(further=True)
                result, _ = trial.run(context, vector.bits, work, progress=self.screen.steps, keep=kept)
        except Exception as error:
            run.finish("FAILED", error)
            console.note(f"reference {name} failed: {error}")
            return
        self.study.record_reference(name, run.run_id, result)
        _finish(run, name, result)

    def attempt(self) -> Attempt:
        """Return what runs one trial for ``search.run``: tracked, recorded, its failure returned.

        The search's own run gets the hypervolume of the front after each trial, those of earlier processes first.
        """
        self._follow()
        self.screen.finished = [
            _finished(record.name, record.result, self.study.objective) for record in self.study.finished()
        ]
        return self._attempt

    def _attempt(self, opened: Trial, candidate: Candidate, done: int) -> Result | BaseException:
        from pipeline.trial import trial

        assert self.contexts is not None
        vector, name = candidate.vector, trial_name(opened.number)
        run = self._open(name, candidate.method, vector, reference=False)
        label = f"{name} ({labels.method(candidate.method)})"
        self.screen.begin(label)
        kept = unfinished(self.study.name, bit_text.write_vector(vector))
        try:
            context = self.contexts.at(vector.ratio)
            result, _ = trial.run(context, vector.bits, progress=self.screen.steps, keep=kept)
            self.study.complete(opened, run.run_id, result)
        except Exception as error:
            self.study.fail(opened, error)
            run.finish("FAILED", error)
            console.note(f"{label} failed: {type(error).__name__}: {error}")
            return error
        _finish(run, name, result)
        self._follow()
        self.screen.finish(_finished(name, result, self.study.objective), told(label, result))
        return result

    def _follow(self) -> None:
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

    def _open(self, name: str, method: str, vector: Vector, reference: bool) -> Run:
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


def _finish(run: Run, name: str, result: Result) -> None:
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


def _finished(name: str, result: Result, objective: str) -> console.Finished:
    return console.Finished(name, result.score(objective)[0], sum(result.seconds.values()))


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
