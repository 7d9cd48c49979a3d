"""The stages' shells: load, run, save, track. Each is one DVC stage and one MLproject entry point of the same name.

What a stage computes is in the module of its name; nothing here computes. Read top to bottom, this is the pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from pipeline import console, storage, tracking
from pipeline.params import Objective, Params, flatten
from pipeline.paths import ALPACA, BANK, BASE, BENCHMARKS, FINAL, PRUNED, REPORTS, STUDY
from pipeline.recorder import Recorder, log_losses, steps, study_name, unfinished
from pipeline.tracking import Run

STAGES: dict[str, Callable[[Params], None]] = {}


def tracked(run: Callable[[Params, Run], None]) -> Callable[[Params], None]:
    """Track a shell under its name, with the params of its own section."""
    name = run.__name__.rstrip("_")

    def shell(params: Params) -> None:
        section = getattr(params, "register_" if name == "register" else name, None)
        shown = flatten(section, f"{name}.") if section is not None else {}
        with tracking.stage(name, {"seed": params.seed, **shown}) as own:
            run(params, own)

    return shell


def stage(run: Callable[[Params, Run], None]) -> Callable[[Params], None]:
    """Track a shell and register it as a stage."""
    STAGES[run.__name__.rstrip("_")] = shell = tracked(run)
    return shell


def made(name: str) -> Any:
    """Return what the stage of that name wrote into its file of reports."""
    return storage.read_json(REPORTS / f"{name}.json", name)


@stage
def fetch(params: Params, run: Run) -> None:
    """Base model, Alpaca rows and benchmark items."""
    from pipeline import fetch as stage_

    run.params(flatten(params.model, "model.") | flatten(params.data, "data."))
    figures = stage_.run(params.model, params.data, params.evaluate.tasks)
    run.metrics(figures)
    run.dataset(ALPACA, "alpaca", "training")
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")


@stage
def prune(params: Params, run: Run) -> None:
    """Remove the structures that the loss misses least."""
    run.dataset(ALPACA, "alpaca", "calibration")
    pruned = write_pruned(params, {params.prune.ratio: PRUNED})
    figures = {
        "ratio": pruned.ratio,
        "parameters_before": pruned.parameters[0],
        "parameters_after": pruned.parameters[1],
    }
    _figures(run, "prune", figures)
    _shapes_picture(pruned, run)


def write_pruned(params: Params, targets: Mapping[float, Path]) -> Any:
    """Prune the base model to each ratio into its checkpoint folder; return the last one's ``prune.Pruned``."""
    from pipeline import calibration, checkpoint, device
    from pipeline import prune as stage_

    storage.verify(BASE, "fetch")
    compute = device.choose(params.device, params.dtype)
    model, tokenizer = checkpoint.load_base(BASE, compute.device, compute.dtype), checkpoint.load_tokenizer(BASE)
    parts = calibration.batches(tokenizer, ALPACA, params.prune, params.data.validation_rows, params.seed, model.device)
    made = stage_.at_ratios(model, parts, params.prune, list(targets), params.seed)
    for target, pruned in zip(targets.values(), made, strict=True):
        with storage.writing(target) as folder:
            checkpoint.from_state(pruned.config, checkpoint.stored(pruned.state)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return pruned


def _shapes_picture(pruned: Any, run: Run) -> None:
    from pipeline import report

    kinds = {"attention": "key/value heads kept", "mlp": "MLP channels kept"}
    series = {label: [len(block[kind]) for block in pruned.kept] for kind, label in kinds.items()}
    report.bar_chart([str(index) for index in range(len(pruned.kept))], series, REPORTS / "prune.png")
    run.artifact(REPORTS / "prune.png")


@stage
def importance(params: Params, run: Run) -> None:
    """Mutual information and quantization sensitivity of each unit."""
    storage.verify(PRUNED, "prune")
    run.dataset(ALPACA, "alpaca", "calibration")
    priors = write_priors(params, PRUNED, REPORTS / "importance.json")
    _importance_picture(priors, run)
    run.metrics({"divergence_4bit": priors.divergence, "tokens": priors.tokens})
    for index, (information, gain) in enumerate(zip(priors.mutual_information, priors.sensitivity, strict=True)):
        run.metrics({"mutual_information": information, "sensitivity": gain}, step=index)
    run.artifact(REPORTS / "importance.json")


def _importance_picture(priors: Any, run: Run) -> None:
    from pipeline import report

    series = {"mutual information, nats": priors.mutual_information, "sensitivity, nats": priors.sensitivity}
    report.bar_chart(priors.units, series, REPORTS / "importance.png")
    run.artifact(REPORTS / "importance.png")


def write_priors(params: Params, pruned: Path, target: Path) -> Any:
    """Measure the importance of a pruned checkpoint's units into a JSON file; return the ``importance.Priors``."""
    from pipeline import alpaca, architecture, checkpoint, device
    from pipeline import importance as stage_

    compute = device.choose(params.device, params.dtype)
    model = checkpoint.load_model(pruned, compute.device, compute.dtype)
    tokenizer = checkpoint.load_tokenizer(pruned)
    settings = params.importance
    rows = alpaca.rows(
        ALPACA, tokenizer, params.data.validation_rows, settings.samples, settings.max_length, params.seed
    )
    # Few rows at a time: a pass back through a large model keeps every block's states.
    parts = list(alpaca.batches(rows, 4, tokenizer.pad_token_id, whole=False))
    units = architecture.units(model.config, params.search.granularity)
    priors = stage_.run(model, parts, units, settings, params.quantize, params.seed)
    storage.write_text(target, json.dumps(asdict(priors), indent=1))
    return priors


@stage
def quantize(params: Params, run: Run) -> None:
    """The layer bank."""
    storage.verify(PRUNED, "prune")
    write_bank(params, PRUNED, BANK)
    run.metrics({"bank_bytes": sum(path.stat().st_size for path in BANK.iterdir())})


def write_bank(params: Params, pruned: Path, target: Path) -> None:
    """Quantize every linear of a pruned checkpoint into a layer bank."""
    from pipeline import checkpoint, device, trial
    from pipeline import quantize as stage_

    names, where = stage_.names_of(checkpoint.load_config(pruned)), device.choose(params.device, params.dtype).device
    with storage.writing(target) as folder:
        stage_.run(trial.load_state(pruned), names, params.quantize, params.seed, folder, where)


@stage
def search(params: Params, run: Run) -> None:
    """Trials: seeds, then Bayesian optimization; references outside the front."""
    from pipeline import architecture, checkpoint, trial
    from pipeline import search as stage_
    from pipeline.importance import Priors
    from pipeline.trial import Result

    settings = params.search
    units = architecture.units(checkpoint.load_config(PRUNED), settings.granularity)
    history = stage_.import_history(settings.history, len(units), settings.objective)
    context = trial.load(params, PRUNED, BANK, ALPACA, BENCHMARKS)
    name = study_name(params, PRUNED, BANK)
    run.params(flatten(params.recover, "recover.") | flatten(params.evaluate, "evaluate."))
    run.tags({"study_digest": name})
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")
    run.dataset(ALPACA, "alpaca", "training")
    priors = Priors.from_json(made("importance"))
    space = trial.space(context)
    study = stage_.Study(STUDY, name, settings.objective)
    recorder = Recorder(run, name, params, context)
    recorder.agree(study)
    recorder.references(study)
    ended = stage_.run(study, settings, space, priors, params.seed, recorder.attempt(study, space), history)
    console.note(f"search ended: {ended.reason}")
    finished = study.finished()
    results = [Result.from_json(one["result"]) for one in finished]
    trials = pd.DataFrame(
        {
            **{key: one[key] for key in ("number", "run_id", "method")},
            "bits": result.bits,
            "memory_source": result.memory_source,
            **result.metrics(),
        }
        for one, result in zip(finished, results, strict=True)
    )
    trials.to_csv(REPORTS / "trials.csv", index=False)
    trials.to_parquet(REPORTS / "trials.parquet", index=False)
    exported = stage_.export_history(name, results)
    storage.write_text(REPORTS / "history.json", json.dumps(exported, indent=1))
    figures = {
        "finished": len(finished),
        "failed": ended.failed,
        **{f"best_{name}": max((one.score(name)[0] for one in results), default=None) for name in get_args(Objective)},
    }
    run.metrics(figures)
    summary = {"study": name, "search_run": run.run_id, "ended": ended.reason, **figures}
    storage.write_text(REPORTS / "search.json", json.dumps(summary, indent=1))
    for table in ("trials.csv", "trials.parquet", "history.json"):
        run.artifact(REPORTS / table)


@stage
def pareto(params: Params, run: Run) -> None:
    """The front, from the MLflow runs alone."""
    from pipeline import pareto as stage_

    every, members = _front(params)
    inside = {one.run_id for one in members}
    for one in every:
        if not one.reference:
            tracking.set_tag(one.run_id, "pareto", "true" if one.run_id in inside else "false")
            tracking.set_tag(one.run_id, "pareto_probability", f"{one.probability:.2f}")
    for path in stage_.write(every, members, params.pareto.objective, REPORTS):
        run.artifact(path)
    run.metrics({"front_size": len(members), "trials": sum(not one.reference for one in every)})


def _compared(objectives: Sequence[str]) -> list[list[Any]]:
    """Return the latest study's points for each objective, compared item by item, from MLflow."""
    from pipeline import pareto as stage_

    runs = tracking.trials(made("search")["study"])
    records = {run.info.run_id: tracking.items(run) for run in runs if run.info.status == "FINISHED"}
    found = []
    for objective in objectives:
        points = stage_.points(runs, objective)
        found.append(stage_.compared(points, [records[one.run_id] for one in points], objective))
    return found


def _front(params: Params) -> tuple[list[Any], list[Any]]:
    """Return (all points, the judged front) of the latest study."""
    from pipeline import pareto as stage_

    (every,) = _compared([params.pareto.objective])
    trials = [one for one in every if not one.reference]
    prior = made("importance")["sensitivity"]
    return every, stage_.judge(stage_.front(trials), trials, prior)


@stage
def build(params: Params, run: Run) -> None:
    """The chosen bit vector as the final checkpoint, verified in a fresh process."""
    from pipeline import build as stage_
    from pipeline import trial
    from pipeline.quantize import read_bits

    rows = made("pareto")
    text, chosen = stage_.choose(params.build.choose, rows)
    context = trial.load(params, PRUNED, BANK, ALPACA, BENCHMARKS)
    bits = read_bits(text, context.units)
    run.params({"bits": text, "chosen_run": chosen or ""})
    kept = unfinished(study_name(params, PRUNED, BANK), text, params.build.steps)
    result, model = trial.run(context, bits, steps=params.build.steps, progress=steps("build: recovery"), keep=kept)
    lineage = {
        "chosen_run": chosen or "none: bits given",
        "git_commit": tracking.git_commit(),
        "alpaca_md5": tracking.md5(ALPACA),
        "benchmarks_md5": tracking.md5(BENCHMARKS),
        "pruned_checkpoint": storage.sha256(PRUNED / storage.CHECKSUMS),
        "base_model": params.model.source,
        "search_run": made("search")["search_run"],
    }
    with storage.writing(FINAL) as folder:
        (folder / "README.md").write_text(
            stage_.card(params.register_.name, result, context, lineage), encoding="utf-8"
        )
        (folder / "lineage.json").write_text(stage_.lineage_json(lineage))
        figures = stage_.verified(context, bits, model, folder)
    run.metrics(result.metrics())
    log_losses(run, result)
    run.artifact(FINAL / "README.md")
    _figures(run, "build", figures | {key: value for key, value in result.metrics().items() if "seconds" not in key})


@stage
def evaluate(params: Params, run: Run) -> None:
    """Score the built checkpoint itself, with bitsandbytes' modules, on items that no trial saw."""
    from pipeline import checkpoint, device, tasks
    from pipeline import evaluate as stage_

    storage.verify(FINAL, "build")
    compute = device.choose(params.device, params.dtype)
    model = checkpoint.load_final(FINAL, compute.device, compute.dtype)
    loaded = tasks.load(params.evaluate.tasks, BENCHMARKS)
    skip = stage_.seen(loaded, params.evaluate.limit)
    if not skip:
        console.note("evaluate: the trials saw every item of a task, so the built model is scored on the same items")
    scores = stage_.run(
        model,
        checkpoint.load_tokenizer(FINAL),
        loaded,
        params.evaluate.final_limit,
        params.evaluate.batch_tokens,
        lambda found: console.progress(found, "evaluate: batches"),
        skip,
    )
    run.tags({"held_out": str(skip > 0).lower()})
    figures = {
        "accuracy": scores.mean,
        "accuracy_stderr": scores.mean_stderr,
        "gold_logprob": scores.gold_logprob,
        "gold_logprob_stderr": scores.gold_logprob_stderr,
        "items": scores.items,
        **scores.accuracy,
    }
    figures |= {f"{task}_stderr": error for task, error in scores.stderr.items()} | scores.other
    for task in params.evaluate.tasks:
        run.dataset(BENCHMARKS / f"{task}.jsonl", task, "evaluation")
    _figures(run, "evaluate", figures)


@stage
def register_(params: Params, run: Run) -> None:
    """The built checkpoint into the model registry, with an alias and its evidence."""
    storage.verify(FINAL, "build")
    figures = made("evaluate")
    lineage = storage.read_json(FINAL / "lineage.json", "build")
    run.metrics(figures)
    root = tracking.root()
    wanted = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
    pinned = [line for line in (root / "requirements.txt").read_text().splitlines() if line.split("==")[0] in wanted]
    tags = lineage | {key: f"{value:.4f}" for key, value in figures.items()}
    uri = tracking.register_model(
        run,
        params.register_.name,
        params.register_.alias,
        root / "pipeline" / "served.py",
        FINAL.absolute(),
        [str(root / "pipeline")],
        pinned,
        tags,
        ["What is the capital of France?"],
        max_new_tokens=64,
    )
    run.tags({"model": uri})
    storage.write_text(REPORTS / "register.json", json.dumps({"model": uri, "alias": params.register_.alias}, indent=1))
    console.note(f"registered {uri} as models:/{params.register_.name}@{params.register_.alias}")


@stage
def report(params: Params, run: Run) -> None:
    """One page: the table of methods, the front, the bits."""
    from pipeline import report as stage_

    search_ = made("search")
    priors = made("importance")
    every, members = _front(params)
    stage_.heat_map(members, priors["units"], REPORTS / "bits.png")
    methods, tasks = stage_.methods(every, members), params.evaluate.tasks
    stage_.accuracy_and_memory({"": stage_.bars_of(methods, tasks)}, tasks, REPORTS / "methods.png")
    stage_.benchmark_fronts(dict(zip(tasks, _compared(tasks), strict=True)), REPORTS / "benchmarks.png")
    ratio = made("prune")["ratio"]
    facts = [
        f"model: {params.model.source}; pruned by {100 * ratio:.1f} %",
        f"study {search_['study']}: {search_['finished']} finished trials, {len(members)} on the front",
        f"peak memory is {members[0].source if members else 'predicted'}; ± is one standard error",
    ]
    tables = [
        ("Methods", *stage_.method_table(methods, tasks)),
        ("Pareto front", *stage_.front_table(members, params.pareto.objective)),
    ]
    pictures = {
        "Quality against peak memory": REPORTS / "pareto.png",
        "Accuracy (bars) and peak memory (markers) of each method": REPORTS / "methods.png",
        "Accuracy against peak memory, each benchmark with its own front": REPORTS / "benchmarks.png",
        "Bits of the front's members": REPORTS / "bits.png",
        "Importance of the units": REPORTS / "importance.png",
    }
    written = stage_.write(tables, facts, pictures, REPORTS)
    owner = tracking.reopen(search_["search_run"]) or run
    for path in [*written, *pictures.values()]:
        owner.artifact(path, "report")


def show_front(params: Params) -> None:
    """Print the table of methods, the front and the command that opens it in the MLflow UI."""
    from pipeline import report as stage_

    study = made("search")["study"]
    every, members = _front(params)
    columns, rows = stage_.method_table(stage_.methods(every, members), ())
    console.table("Methods", columns, rows)
    columns, rows = stage_.front_table(members, params.pareto.objective, console.BITS)
    console.table("Pareto front: lowest memory first", columns, rows)
    experiment = tracking.run(members[0].run_id).info.experiment_id if members else tracking.experiment_id()
    console.note(
        "See every trial, best first, in the MLflow UI:\n"
        + tracking.ui_command(experiment, study, params.pareto.objective)
    )
    console.note(f"One page with tables and pictures: {REPORTS / 'report.html'}")


def show_plan(asked: Any) -> None:
    """Print which ratios and bits fit the memory that was asked for; keep tables and picture, tracked as a run."""
    from pipeline import plan as stage_

    setting = stage_.setting_of(asked.params)
    shown = {"config": asked.name, "memory_gib": asked.budget_gib, **asdict(setting)}
    with tracking.stage("plan", shown) as run:
        found = stage_.table(asked.config, setting, asked.budget_gib)
        sections = [(f"Peak of {step}, GiB", stage_.summary(found, step)) for step in ("training", "inference")]
        paper = stage_.beside_paper(asked)
        if paper is not None:
            sections.append(("The paper's measured memory of training, GB = 1e9 bytes", paper))
        for title, (columns, rows) in sections:
            console.table(title, columns, rows)
        for fact in stage_.facts(asked):
            console.note(fact)
        written = stage_.write(asked, found, sections, REPORTS)
        for path in written:
            run.artifact(path)
        fitting = found[found["training_fits"]]
        run.metrics({"fitting": len(fitting), "smallest_training_gib": float(found["training_gib"].min())})
    console.note(f"Written: {', '.join(map(str, written))}")


def _figures(run: Run, name: str, figures: Mapping[str, float]) -> None:
    """Keep a stage's figures as its DVC metrics and its MLflow metrics."""
    run.metrics(figures)
    storage.write_text(REPORTS / f"{name}.json", json.dumps(dict(figures), indent=1))
