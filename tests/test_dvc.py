"""DVC reruns a stage when code that computes its output changes."""

import yaml
from conftest import ROOT

from pipeline import identity
from pipeline.stages import STAGES

TEXT = (ROOT / "dvc.yaml").read_text()
LISTED = {name: stage["deps"] for name, stage in yaml.safe_load(TEXT)["stages"].items()}


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
