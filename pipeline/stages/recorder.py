"""What is noted of trials: their MLflow runs, in step with the study's journal, their names, a line in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import bits, console, storage, tracking
from pipeline.params import Params, digest
from pipeline.paths import ALPACA, BASE, BENCHMARKS, UNFINISHED
from pipeline.results import labels
from pipeline.tracking import Run


def study_name(params: Params, pruned: Path, bank: Path) -> str:
    """Name a study by all that defines it: the models, the data, how and where a trial is run, what is searched.

    A GPU's trials measure their memory, a CPU's predict it, and types round differently: they do not belong on one
    front.
    """
    from pipeline import device
    from pipeline.trial.trial import MEASURED

    parts = [storage.sha256(folder / storage.CHECKSUMS) for folder in (pruned, bank)]
    data = [tracking.md5(ALPACA), *(tracking.md5(BENCHMARKS / f"{task}.jsonl") for task in params.evaluate.tasks)]
    space = params.search.model_dump(
        include={"granularity", "objective", "max_8bit_fraction", "memory_budget_gib", "average_bits"}
    )
    settings = [params.recover, params.evaluate, params.data.validation_rows, space, params.seed]
    return digest(parts, data, *settings, MEASURED, str(device.choose(params.device, params.dtype)))


def trial_name(number: int) -> str:
    """Return what a trial is called everywhere: numbers count from 1, Optuna's from 0."""
    return f"trial {number + 1}"


class Recorder:
    """Runs trials and keeps their MLflow runs in step with the study."""

    def __init__(self, run: Run, study: str, params: Params, context: Any):
        self.run, self.study, self.params, self.context = run, study, params, context
        self.screen = console.Search(params.search.n_trials)

    def agree(self, study: Any) -> None:
        """Give every finished trial its finished run below this search, whatever a killed process left of it."""
        from pipeline.trial.trial import Result

        known = {run.tags.get("journal_run_id", run.run_id): run for run in tracking.trials(self.study)}
        for record in [*study.finished(), *study.references().values()]:
            result = Result.from_json(record["result"])
            found = known.get(record["run_id"])
            if found is None:  # the store was lost or is another one
                name = trial_name(record["number"]) if "number" in record else record["method"]
                own = self._open(name, record["method"], result.bits, "number" not in record)
                own.tags({"journal_run_id": record["run_id"]})
            else:
                own = Run(found.run_id, found.experiment_id)
                tracking.move(own.run_id, self.run)
            if found is None or found.status != "FINISHED":
                log_result(own, result)
                own.finish()

    def references(self, study: Any) -> None:
        """Measure the reference rows that the study lacks."""
        done = study.references()
        for name in self.params.search.references:
            if name not in done:
                self._reference(study, name)

    def _reference(self, study: Any, name: str) -> None:
        from pipeline.trial import trial

        context = trial.untouched(self.context, BASE) if name == "dense" else self.context
        width = 8 if name == "uniform8" else 16
        bits = (width,) * len(context.units)
        self.screen.begin(f"reference {labels.method(name)}")
        own = self._open(name, name, "16" if width == 16 else "8" * len(bits), reference=True)
        try:
            result, _ = trial.run(
                context, bits, progress=self.screen.steps, trained=name != "dense", keep=unfinished(self.study, name)
            )
        except Exception as error:
            own.finish("FAILED", error)
            console.note(f"reference {name} failed: {error}")
            return
        study.record_reference(name, own.run_id, result)
        log_result(own, result)
        own.finish()

    def attempt(self, study: Any, space: Any) -> Callable[[Any, Any, int], Any]:
        """Return what runs one trial for ``search.run``: tracked, recorded, its failure returned.

        The search's own run gets the hypervolume of the front after each trial, those of earlier processes first.
        """
        from pipeline.compress.quantize import write_bits
        from pipeline.trial import trial
        from pipeline.trial.trial import Result

        followed = self._follow(study, space, 0)

        def run(opened: Any, candidate: Any, done: int) -> Any:
            nonlocal followed
            text = write_bits(candidate.bits)
            name = trial_name(opened.number)
            own = self._open(name, candidate.method, text, reference=False)
            own.tags({"trial": name.removeprefix("trial ")})
            label = f"{name} ({labels.method(candidate.method)})"
            self.screen.begin(label)
            try:
                result, _ = trial.run(
                    self.context, candidate.bits, progress=self.screen.steps, keep=unfinished(self.study, text)
                )
                study.complete(opened, own.run_id, result)
            except Exception as error:
                study.fail(opened, error)
                own.finish("FAILED", error)
                console.note(f"{label} failed: {type(error).__name__}: {error}")
                return error
            log_result(own, result)  # a store that fails here ends the search; the journal has the trial
            own.finish()
            followed = self._follow(study, space, followed)
            self.screen.finish(_finished(name, study, result), told(label, result))
            return result

        self.screen.finished = [
            _finished(trial_name(record["number"]), study, Result.from_json(record["result"]))
            for record in study.finished()
        ]
        return run

    def _follow(self, study: Any, space: Any, followed: int) -> int:
        """Log the hypervolume after each finished trial but the first ``followed``; return how many there are."""
        from pipeline.search import pareto
        from pipeline.trial.trial import Result

        results = [Result.from_json(record["result"]) for record in study.finished()]
        points = [(one.score(study.objective)[0], one.peak_memory_bytes) for one in results]
        self.run.series("hypervolume", enumerate(pareto.growth(points, space.reach, followed), followed + 1))
        return len(results)

    def _open(self, name: str, method: str, bits: str, reference: bool) -> Run:
        kind = "reference" if reference else "trial"
        own = self.run.child(name, {"stage": kind, "study": self.study, "method": method})
        own.params({"bits": bits, "method": method, "granularity": self.params.search.granularity})
        return own


def log_result(own: Run, result: Any) -> None:
    """Log what a trial measured into its run."""
    own.metrics(result.metrics())
    own.json(result.record, tracking.ITEMS)
    log_losses(own, result)
    name = tracking.run(own.run_id).name.partition(":")[0]
    # The UI's default columns show no metric, so the figures stand in the name.
    own.tags({"memory_source": result.memory_source, "mlflow.runName": f"{name}: {_figures(result)}"})


def log_losses(own: Run, result: Any) -> None:
    """Log the losses of a recovery step by step."""
    own.series("loss", enumerate(result.losses))
    own.series("held_out_loss", result.validation_losses)


def told(label: str, result: Any) -> str:
    """Return a line with what a trial measured."""
    return f"{label}: {_figures(result)}; {sum(result.seconds.values()):.0f} s"


def _figures(result: Any) -> str:
    text, gold = result.response_logprob, result.gold_logprob
    quality = f"response {text:.3f}, gold answer {gold:.3f}, {100 * result.accuracy:.1f} %"
    return f"{quality}, {result.peak_memory_bytes / 2**30:.3f} GiB, {bits.summary(result.bits)}"


def _finished(name: str, study: Any, result: Any) -> console.Finished:
    return console.Finished(name, result.score(study.objective)[0], sum(result.seconds.values()))


def unfinished(*parts: Any) -> Path:
    """Return where the state of a recovery is kept until it ends, by all that defines it."""
    return UNFINISHED / f"{digest(*parts)}.safetensors"


def steps(label: str) -> Callable[[Any], Any]:
    """Return what shows the progress of a recovery under a label."""
    return lambda items: console.progress(items, label)
