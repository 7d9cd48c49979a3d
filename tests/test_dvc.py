"""DVC reruns a stage when code that computes its output changes."""

import pytest
import yaml
from conftest import ROOT

from pipeline import identity
from pipeline.stages import STAGES

TEXT = (ROOT / "dvc.yaml").read_text()
GRAPH = yaml.safe_load(TEXT)["stages"]
LISTED = {name: stage["deps"] for name, stage in GRAPH.items()}


def _outputs(stage):
    """Paths, or mappings of one path to its options."""
    return [out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]


def repeated(key):
    """The stages that DVC runs again when a key of the params changes, if each writes something else than before."""
    stale, written = set(), set()
    for name, stage in GRAPH.items():  # in the order of the pipeline
        reads = any(f"{key}.".startswith(f"{listed}.") for listed in stage["params"])
        if reads or written & set(stage["deps"]):
            stale.add(name)
            written |= set().union(*([out] if isinstance(out, str) else out for out in _outputs(stage)))
    return stale


def test_every_stage_depends_on_the_code_that_computes_its_output():
    faults = []
    for stage in STAGES:
        listed = {name for name in LISTED[stage] if name.startswith("pipeline")}
        needed = set(identity.stage_files(stage))
        faults += [f"{stage}: {name} is missing" for name in sorted(needed - listed)]
        faults += [f"{stage}: {name} does not compute its output" for name in sorted(listed - needed)]
    assert faults == [], "mend dvc.yaml with: python -m pipeline.identity --write"


def test_list_of_code_is_what_the_command_writes():
    assert identity.with_code(TEXT) == TEXT


def test_command_puts_back_what_was_taken_out():
    lines = [line for line in TEXT.splitlines() if "pipeline/trial/recover.py" not in line]
    assert identity.with_code("\n".join(lines)) == TEXT


def test_code_that_trains_and_scores_counts_for_the_search():
    wanted = {"trial/trial", "trial/recover", "trial/evaluate", "data/tasks", "checkpoint/__init__", "device"}
    assert {f"pipeline/{name}.py" for name in wanted} <= set(LISTED["search"])


def test_other_versions_of_the_libraries_repeat_what_they_compute():
    unpinned = {stage for stage, listed in LISTED.items() if "requirements.txt" not in listed}
    assert unpinned == {"pareto", "report"}  # which arrange what others computed


def test_served_code_counts_for_the_registry():
    assert "pipeline/stages/served.py" in LISTED["register"]


@pytest.mark.parametrize(
    "key, kept",
    [
        ("data.alpaca", set()),
        ("prune.ratios", {"fetch"}),
        ("quantize.r", {"fetch", "prune"}),
        ("recover.learning_rate", {"fetch", "prune", "quantize", "importance"}),
        ("build.steps", {"fetch", "prune", "quantize", "importance", "search", "pareto"}),
        ("register.promote", {*STAGES} - {"register", "report"}),
    ],
)
def test_changed_key_repeats_what_depends_on_it_and_nothing_upstream(key, kept):
    assert repeated(key) == {*STAGES} - kept
