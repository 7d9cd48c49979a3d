"""The trials' MLflow runs, in step with the study's journal.

The journal is the truth. A result is recorded there first, then in MLflow. A store that cannot be reached holds up no
search: what it lacks waits (``tracking.patient``). What is lost with the process is written by the next command.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import GIB, console, device, fits, identity, storage, tracking
from pipeline import bits as bit_text
from pipeline.identity import Identity
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BENCHMARKS, UNFINISHED
from pipeline.results import labels
from pipeline.search.allocate import Bits, Space
from pipeline.search.search import Attempt, Settings
from pipeline.search.study import Candidate, Study, trial_name
from pipeline.stages.agreement import by_journal_run
from pipeline.tracking import Run

if TYPE_CHECKING:
    from pipeline.search.study import Trial
    from pipeline.trial.context import Context
    from pipeline.trial.recover import Steps
    from pipeline.trial.result import Result


def study_identity(params: Params, pruned: Path, bank: Path, prefix: str = "") -> Identity:
    """Return what names a study: the models, the data, how and where a trial is run, what is searched, and the code.

    A GPU's trials measure their memory, a CPU's predict it, and types round differently: they do not belong on one
    front.
    """
    parts = [storage.sha256(folder / storage.CHECKSUMS) for folder in (pruned, bank)]
    data = [tracking.md5(ALPACA), *(tracking.md5(BENCHMARKS / f"{task}.jsonl") for task in params.evaluate.tasks)]
    space = params.search.model_dump(
        include={"granularity", "objective", "max_8bit_fraction", "memory_budget_gib", "average_bits"}
    )
    settings = [params.recover, params.evaluate, params.data.validation_rows, space, params.seed]
    where = str(device.choose(params.device, params.dtype))
    return Identity(prefix + digest(parts, data, *settings, where), identity.code(*identity.TRIAL))


def search_settings(params: Params) -> Settings:
    """Return how the search of some params goes."""
    section = params.search
    return Settings(
        n_trials=section.n_trials,
        n_random=section.n_random,
        patience=section.patience,
        objective=section.objective,
        seed=params.seed,
        seed_bits=section.seed_bits,
    )


class Recorder:
    """Runs trials and keeps their MLflow runs in step with the study.

    Args:
        run: The search's own run.
        study: The study.
        params: The params.
        context: What the trials share; None where none is run.
        space: The feasible vectors; None where none is run.
    """

    def __init__(
        self, run: Run, study: Study, params: Params, context: Context | None = None, space: Space | None = None
    ):
        self.run, self.study, self.params, self.context, self.space = run, study, params, context, space
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
                run = self._open(record.name, record.method, record.values["bits"], reference=record.number is None)
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
        """Measure the reference rows that the study lacks."""
        known = {record.name for record in self.study.references()}
        for name in self.params.search.references:
            if name not in known:
                self._reference(name)

    def _reference(self, name: str) -> None:
        from pipeline.stages import trials
        from pipeline.trial import trial

        assert self.context is not None
        bits = (8 if name == "uniform8" else bit_text.DENSE,) * len(self.context.units)
        run = self._open(name, name, bit_text.write(bits), reference=True)
        kept = unfinished(self.study.name, name)
        self.screen.begin(f"reference {labels.method(name)}")
        try:
            if name == "dense":
                result = trials.untouched(self.params, self.context)
            else:
                result, _ = trial.run(self.context, bits, progress=self.screen.steps, keep=kept)
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

        assert self.context is not None
        text, name = bit_text.write(candidate.bits), trial_name(opened.number)
        run = self._open(name, candidate.method, text, reference=False, bits=candidate.bits)
        label = f"{name} ({labels.method(candidate.method)})"
        self.screen.begin(label)
        kept = unfinished(self.study.name, text)
        try:
            result, _ = trial.run(self.context, candidate.bits, progress=self.screen.steps, keep=kept)
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

        if self.space is None:
            return
        results = [record.result for record in self.study.finished()]
        points = [(result.score(self.study.objective)[0], float(result.peak_memory_bytes or 0)) for result in results]
        growth = pareto.growth(points, self.space.reach, self._followed)
        self.run.series("hypervolume", enumerate(growth, self._followed + 1))
        self._followed = len(results)

    def _open(self, name: str, method: str, text: str, reference: bool, bits: Bits | None = None) -> Run:
        """Open the run of a trial or a reference with what it is: its bits, and what compares it with others."""
        kind = "reference" if reference else "trial"
        belongs = {"stage": kind, "study": self.study.name, "journal": self.study.journal}
        run = self.run.child(name, {**belongs, "method": method, "name": name, "bits": text})
        granularity = self.params.search.granularity
        shown: dict[str, object] = {
            "bits": bit_text.grouped(text, fits.units_a_block(granularity)),
            "method": method,
            "granularity": granularity,
            "ratio": self.params.prune.ratio,
            "share_8bit": round(text.count("8") / len(text), 4),
        }
        if bits is not None and self.space is not None and self.space.sizes:
            shown["average_bits"] = round(self.space.average(bits), 4)
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
    return f"{quality}, {training_memory(result, 3)}, {bit_text.summary(result.bits)}"


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
