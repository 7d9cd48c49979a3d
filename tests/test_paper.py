import dataclasses
import json
import shutil
import types

import pandas as pd
import pytest
import torch
from conftest import ROOT, tiny_model

from pipeline import architecture, checkpoint, paths, storage, tracking
from pipeline.bits import write as write_bits
from pipeline.checks import load
from pipeline.identity import Identity
from pipeline.params import ParamsError
from pipeline.results import figures
from pipeline.results.cells import at_ratio, changed, qpruner3
from pipeline.search import search
from pipeline.search.allocate import Spaces
from pipeline.search.history import export_history
from pipeline.stages import cells, importance, prune, quantize, shell, supplies
from pipeline.stages import trials as stage_trials
from pipeline.stages.cells import CellsFailed
from pipeline.stages.supplies import Supplies
from pipeline.trial import trial
from pipeline.trial.result import Result
from tests.fixtures.searches import PRIORS, SPACE, UNITS, result

TASK = "piqa"
PICTURE = figures.accuracy_and_memory


@pytest.fixture
def params(default, tmp_path, empty_store_here):
    """Params of one ratio on one task, in a folder with a base model's checksums and data."""
    (tmp_path / "data/benchmarks").mkdir(parents=True)
    shutil.copy(ROOT / "data/sample/alpaca.jsonl", "data")
    shutil.copy(ROOT / f"data/sample/benchmarks/{TASK}.jsonl", "data/benchmarks")
    with storage.writing(paths.BASE) as folder:
        (folder / "model").write_text("weights")
    changes = {
        "table": {"ratios": (0.2,), "steps": 9, "limit": 5, "n_trials": 4},
        "evaluate": {"tasks": (TASK,), "limit": 7},
        "search": {"n_random": 1, "references": ()},
        "recover": {"steps": 2},
    }
    sections = {name: getattr(default, name).model_copy(update=values) for name, values in changes.items()}
    return default.model_copy(update=sections)


@dataclasses.dataclass
class Trials:
    """Stands for ``trial.run``: looks results up, notes its calls, fails or is killed where told."""

    calls: list = dataclasses.field(default_factory=list)
    broken: object = None  # bits whose cell fails
    killed_at: int = 0  # number of the call that a kill ends

    def run(self, context, bits, work=None, progress=iter, keep=None):
        work = work or trial.Work()
        steps, limit, skip, trained = work.steps, work.limit, work.skip, work.trained
        if len(self.calls) + 1 == self.killed_at:
            self.killed_at = 0
            raise KeyboardInterrupt
        if steps is not None and tuple(bits) == self.broken:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        self.calls.append((write_bits(bits), steps, limit, skip, trained))
        found = result(bits)
        changes = {"ratio": context.ratio, "bits": write_bits(bits), "validation_loss": 1 - found.accuracy}
        return Result.from_json(found.as_json() | changes), None


@pytest.fixture
def trials(monkeypatch):
    """Trials without training, and no picture of them."""
    made = Trials()
    monkeypatch.setattr(figures, "accuracy_and_memory", lambda *given: given[-1].touch())
    monkeypatch.setattr(trial, "run", made.run)

    def untouched(params, context, work):
        return trial.run(context, (16,) * UNITS, dataclasses.replace(work, trained=False), keep="untouched")[0]

    monkeypatch.setattr(stage_trials, "untouched", untouched)
    monkeypatch.setattr(
        cells,
        "study_identity",
        lambda params, folders, prefix="": Identity(f"{prefix}{params.prune.ratio}", "code"),
    )

    def supplied(params, ratios=()):
        ratio = params.prune.ratio
        context = types.SimpleNamespace(units=[None] * UNITS, ratio=ratio, further=None)
        contexts = types.SimpleNamespace(any=context, folders={ratio: None}, at=lambda ratio: context)
        shared = {"context": context, "contexts": contexts, "spaces": Spaces({ratio: SPACE}, {}), "priors": PRIORS}
        return types.SimpleNamespace(params=params, pruned="", bank="", **shared)

    monkeypatch.setattr(cells, "Supplies", supplied)
    return made


def runs(stage, status="FINISHED"):
    return [run for run in tracking.tagged("stage", stage) if run.status == status]


def parent(run):
    return run.tags["mlflow.parentRunId"]


def bits(call):
    return call[0]


def test_table_has_one_run_a_cell_with_the_searchs_trials_below_qpruner3(params, trials, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "accuracy_and_memory", lambda *given: drawn.append(given[0]) or PICTURE(*given))
    shell.start("table", params)
    assert [[bar.label for bar in bars] for bars in drawn[0].values()] == [
        ["LLM-Pruner (16-bit)", "QPruner1", "QPruner2", "QPruner3"]
    ]
    (top,) = runs("table")
    found = runs("cell")
    assert [run.tags["method"] for run in found] == ["dense", "llm_pruner", "qpruner1", "qpruner2", "qpruner3"]
    assert {parent(run) for run in found} == {top.run_id}
    assert {parent(run) for run in runs("trial")} == {found[-1].run_id} and len(runs("trial")) == 4
    assert found[3].tags["bits"] == "48484444"
    assert paths.REPORTS.joinpath("figure1.png").stat().st_size > 1000
    text = paths.REPORTS.joinpath("table.md").read_text()
    assert "| 20 % | QPruner3 |" in text and "pending" not in text
    assert {path.name for path in paths.REPORTS.iterdir()} == {"table.md", "table.csv", "table.tex", "figure1.png"}


def test_table_3_has_the_five_methods_at_half_of_the_parameters(params, trials):
    preset = load(ROOT / "presets/llama-13b.yaml").model_copy(update={"evaluate": params.evaluate, "device": "cpu"})
    shell.start("table", changed(preset, "table", n_trials=4))
    written = pd.read_csv(paths.REPORTS / "table.csv")
    assert written["method"].tolist() == ["dense", "llm_pruner", "qpruner1", "qpruner2", "qpruner3"]
    assert written["ratio"].tolist() == [0, 0.5, 0.5, 0.5, 0.5] and set(written["state"]) == {"done"}


def test_cells_are_judged_on_items_that_the_searchs_trials_never_see(params, trials):
    shell.start("table", params)
    in_search = [call for call in trials.calls if call[1] is None]
    in_cells = [call for call in trials.calls if call[1] is not None]
    assert {call[2:] for call in in_search} == {(None, 0, True)}  # the first evaluate.limit, by the params' own
    assert {call[1:4] for call in in_cells} == {(9, 5, 7)}
    assert [call[4] for call in in_cells] == [False, True, True, True, True]


@pytest.mark.parametrize("call", [1, 3, 6, 9])
def test_killed_table_goes_on_without_repeating_what_is_finished(params, trials, call):
    trials.killed_at = call
    with pytest.raises(KeyboardInterrupt):
        shell.start("table", params)
    assert not runs("table", "RUNNING") + runs("cell", "RUNNING") + runs("trial", "RUNNING")
    kept = {run.run_id for run in runs("cell") + runs("trial")}
    assert len(trials.calls) == call - 1 == len(kept)
    shell.start("table", params)
    assert len(trials.calls) == 9  # five cells and four trials
    after = runs("cell") + runs("trial")
    assert len(after) == 9 and kept <= {run.run_id for run in after}
    assert {parent(run) for run in runs("cell")} == {runs("table")[-1].run_id}
    assert {parent(run) for run in runs("trial")} == {runs("cell")[-1].run_id}


@pytest.mark.parametrize("call", [3, 6])  # a cell's own recovery, and one of a trial below QPruner3's
def test_interrupted_recovery_is_taken_up_from_a_file_of_its_own(params, trials, monkeypatch, call):
    kept = []

    def run(*arguments, keep, **named):
        kept.append(keep)
        return trials.run(*arguments, **named)

    monkeypatch.setattr(trial, "run", run)
    trials.killed_at = call
    with pytest.raises(KeyboardInterrupt):
        shell.start("table", params)
    shell.start("table", params)
    assert kept[call - 1] == kept[call]
    assert len(kept) == 9 + 1 and len(set(kept)) == 9


def test_finished_table_runs_nothing_again(params, trials):
    shell.start("table", params)
    before = (paths.REPORTS / "table.md").read_text()
    shell.start("table", params)
    assert len(trials.calls) == 9 and len(runs("cell")) == 5
    assert (paths.REPORTS / "table.md").read_text() == before


def test_more_trials_continue_the_search_and_keep_the_other_cells(params, trials):
    shell.start("table", params)
    shell.start("table", params.model_copy(update={"table": params.table.model_copy(update={"n_trials": 6})}))
    assert len(trials.calls) == 9 + 2 + 1


def test_search_of_a_table_is_taught_by_the_history(params, trials, monkeypatch):
    taught = []
    own = search.run

    def run(study, settings, problem, attempt):
        taught.append([one.vector.bits for one in problem.history])
        return own(study, settings, problem, attempt)

    monkeypatch.setattr(search, "run", run)
    vectors = [(4,) * UNITS, (8,) + (4,) * (UNITS - 1)]
    earlier = export_history("earlier", [result(bits) for bits in vectors])
    storage.write_text(paths.REPORTS / "earlier.json", json.dumps(earlier))
    shell.start("table", changed(params, "search", history="reports/earlier.json"))
    assert taught == [vectors]


def test_qpruner3_is_the_best_of_its_searchs_trials(params, trials):
    shell.start("table", params)
    tried = [bits(call) for call in trials.calls if call[1] is None]
    chosen = runs("cell")[-1].tags["bits"]
    assert chosen in tried and result(chosen_bits(chosen)).accuracy == max(
        result(chosen_bits(one)).accuracy for one in tried
    )


def chosen_bits(text):
    return tuple(int(digit) for digit in text)


def test_failed_cell_is_failed_with_its_cause_and_the_others_go_on(params, trials):
    trials.broken = (4,) * UNITS
    with pytest.raises(CellsFailed, match=r"1 of 5 cells failed: 20% QPruner1 \(OutOfMemoryError.*run the same comm"):
        shell.start("table", params)
    (failed,) = runs("cell", "FAILED")
    assert failed.tags["error"] == "OutOfMemoryError: tried to allocate 20 GiB"
    assert not failed.metrics and len(runs("cell")) == 4
    assert "| 20 % | QPruner1 | failed |" in (paths.REPORTS / "table.md").read_text()
    assert [run.status for run in tracking.tagged("stage", "table")] == ["FAILED"]
    trials.broken = None
    shell.start("table", params)
    assert [bits(call) for call in trials.calls[8:]] == ["4" * UNITS]
    assert "failed" not in (paths.REPORTS / "table.md").read_text()


def test_cell_kept_but_not_ended_by_a_kill_is_ended(params, trials):
    shell.start("table", params)
    victim = runs("cell")[1].run_id
    tracking.client().set_terminated(victim, "KILLED")
    shell.start("table", params)
    assert tracking.run(victim).status == "FINISHED" and len(runs("cell")) == 5


def test_lost_store_is_filled_again_once(params, trials, tmp_path, monkeypatch, empty_store):
    shell.start("table", params)
    before = [(run.tags["bits"], run.metrics["accuracy"]) for run in runs("cell") + runs("trial")]
    shutil.copy(empty_store, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    for _ in range(2):
        shell.start("table", params)
        after = [(run.tags["bits"], run.metrics["accuracy"]) for run in runs("cell") + runs("trial")]
        assert after == before
    assert len(trials.calls) == 9


def test_damaged_cell_runs_again(params, trials):
    shell.start("table", params)
    victim = next(iter((supplies.KEPT / "cells").iterdir()))
    victim.write_text("")
    shell.start("table", params)
    assert len(trials.calls) == 10 and json.loads(victim.read_text())["result"]


def test_ablation_takes_the_tables_qpruner3_and_leaves_it_in_its_place(params, trials):
    shell.start("table", params)
    (kept,) = [run for run in runs("cell") if run.tags["method"] == "qpruner3"]
    shell.start("ablation", params)
    own = [run for run in runs("cell") if run.tags["command"] == "ablation"]
    assert len(trials.calls) == 9 + 9 == 9 + len(own)
    assert {bits(call) for call in trials.calls[9:]} == {kept.tags["bits"]}
    assert parent(tracking.run(kept.run_id)) == runs("table")[0].run_id
    assert {parent(run) for run in own} == {runs("ablation")[0].run_id}
    shell.start("ablation", params)
    assert len(trials.calls) == 18


def test_ablation_alone_holds_the_search_itself(params, trials):
    shell.start("ablation", params)
    assert len(trials.calls) == 4 + 1 + 9
    lines = (paths.REPORTS / "ablation.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| PIQA")]
    assert row.count("±") == 15


@pytest.mark.parametrize("limit, wanted", [(0, "see all items"), (64, "the first 64"), (100, r"piqa \(64\)")])
def test_search_that_sees_every_item_is_refused_before_anything_runs(params, trials, limit, wanted):
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"limit": limit})})
    with pytest.raises(ParamsError, match=rf"evaluate\.limit: {limit} .*{wanted}.*between 1 and 63"):
        shell.start("table", params)
    assert not trials.calls


def test_supplies_are_made_once_and_a_damaged_one_again(params, tokenizer, monkeypatch):
    with storage.writing(paths.BASE) as folder:
        tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    small = {"prune": {"samples": 2}, "importance": {"samples": 2, "clusters": 2, "outcomes": 2}}
    sections = {name: getattr(params, name).model_copy(update=values) for name, values in small.items()}
    params = params.model_copy(update=sections)
    made = []
    for stage, function, name in (
        (prune, "write", "pruned"),
        (quantize, "write", "bank"),
        (importance, "measure", "priors"),
    ):
        real = getattr(stage, function)
        monkeypatch.setattr(stage, function, lambda *given, real=real, name=name: made.append(name) or real(*given))
    first = Supplies(params)
    assert len(first.priors.units) == len(first.context.units) == 4 and first.spaces.units == 4
    assert made == ["pruned", "bank", "priors"]
    assert Supplies(params).context.config.to_dict() == first.context.config.to_dict() and len(made) == 3
    other = Supplies(params.model_copy(update={"quantize": params.quantize.model_copy(update={"r": 4})}))
    assert other.pruned == first.pruned and other.bank != first.bank and made[3:] == ["bank"]
    codes = first.bank / "codes4.safetensors"
    codes.write_bytes(codes.read_bytes()[:-1])
    assert Supplies(params).bank == first.bank and made[4:] == ["bank"]
    assert storage.verify(first.bank, "quantize")


def test_one_calibration_serves_all_ratios_of_a_table(params, tokenizer, monkeypatch):
    with storage.writing(paths.BASE) as folder:
        tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    params = changed(params, "prune", samples=2)
    real, asked = prune.write, []
    monkeypatch.setattr(prune, "write", lambda *given: asked.append([*given[1]]) or real(*given))
    found = {ratio: Supplies(at_ratio(params, ratio), (0.1, 0.2, 0.3)).pruned for ratio in (0.2, 0.1, 0.3)}
    assert asked == [[0.1, 0.2, 0.3]] and len(set(found.values())) == 3
    sizes = [architecture.parameters(checkpoint.load_config(found[ratio])) for ratio in (0.1, 0.2, 0.3)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    (found[0.2] / "config.json").write_text("{}")  # damaged: this one alone is made again
    assert Supplies(params, (0.1, 0.2, 0.3)).pruned == found[0.2] and asked[1:] == [[0.2]]
    assert Supplies(params).pruned == found[0.2] and len(asked) == 2


def test_cells_title_tells_ratio_and_method(params):
    assert qpruner3(params).title == "20% QPruner3"
