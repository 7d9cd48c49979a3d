"""Stage ``build``: the chosen bit vector as the final checkpoint, verified in a fresh process.

Reads ``reports/pareto.json``, ``artifacts/pruned``, ``artifacts/bank`` and the data. Writes ``artifacts/final`` and
``reports/build.json``.
"""

from __future__ import annotations

from pipeline import bits as bit_text
from pipeline import storage, tracking
from pipeline.params import Params
from pipeline.paths import ALPACA, BENCHMARKS, FINAL
from pipeline.stages import trials
from pipeline.stages.recorder import log_losses, steps, study_identity, unfinished
from pipeline.stages.shell import keep_figures, made
from pipeline.tracking import Run
from pipeline.trial import build, trial


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    text, chosen = build.choose(params.build.choose, made("pareto"))
    contexts = trials.Contexts(params, trials.folders(params))
    vector = trials.vector(text, params.prune.ratios, len(contexts.any.units))
    context, text = contexts.at(vector.ratio), bit_text.write(vector.bits)
    pruned, bank = contexts.folders[vector.ratio]
    run.params({"ratio": vector.ratio, "bits": text, "chosen_run": chosen or ""})
    kept = unfinished(study_identity(params, (pruned, bank)).name, text, params.build.steps)
    work = trial.Work(steps=params.build.steps)
    result, model = trial.run(context, vector.bits, work, progress=steps("build: recovery"), keep=kept)
    lineage = {
        "chosen_run": chosen or "none: bits given",
        "ratio": f"{vector.ratio:g}",
        "bits": text,
        "git_commit": tracking.git_commit(),
        "alpaca_md5": tracking.md5(ALPACA),
        "benchmarks_md5": tracking.md5(BENCHMARKS),
        "pruned_checkpoint": storage.sha256(pruned / storage.CHECKSUMS),
        "base_model": params.model.source,
        "prompt": params.data.prompt,
        "search_run": made("search")["search_run"],
    }
    with storage.writing(FINAL) as folder:
        card = build.card(params.register_.name, result, params.search.granularity, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "lineage.json").write_text(build.lineage_json(lineage))
        figures = build.verified(context, vector.bits, model, folder)
    run.metrics(result.metrics())
    log_losses(run, result)
    run.artifact(FINAL / "README.md")
    figures |= {"ratio": vector.ratio}
    figures |= {key: value for key, value in result.metrics().items() if "seconds" not in key}
    keep_figures(run, "build", figures)
