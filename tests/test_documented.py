"""Every command that a page names or the code prints can be typed: target, entry point, keys and files are there."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from mlflow.projects import _project_spec

from pipeline import overrides

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
VARIABLES = set(re.findall(r"\$\(([A-Z_]+)\)", MAKEFILE))
PRINTED = re.compile(r"(mlflow run \. -e [a-z]+|dvc repro(?: --[a-z-]+)* [a-z]+|make (?:setup|search|doctor|check|ui))")


def blocks(page):
    """The commands of a page's blocks of shell, in order."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```(?:sh|bash)?\n(.*?)^```$", text, re.M | re.S):
        yield from (line.strip() for line in block.splitlines() if re.match(r"(make|mlflow run|dvc|python -m) ", line))


DOCUMENTED = sorted({(page.name, line) for page in PAGES for line in blocks(page)})


def known_keys(text):
    """Whether values of keys are given as SET and -P set take them."""
    return overrides.adopt("params.yaml", text, {}) == []


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in (overrides.PRESET, overrides.OVERRIDES):
        monkeypatch.setenv(name, "")  # what `adopt` sets is taken back


@pytest.mark.parametrize("page, line", DOCUMENTED)
def test_documented_command_can_be_typed(page, line):
    words = shlex.split(re.sub(r"<[^<>]*>", "x", line), comments=True)
    words = words[: words.index("&&")] if "&&" in words else words
    if words[0] == "make":
        given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        assert set(words[1:]) - {f"{key}={value}" for key, value in given.items()} <= TARGETS
        assert given.keys() <= VARIABLES
        assert known_keys(given.get("SET", ""))
        assert (ROOT / f"presets/{given.get('PRESET', 'default')}.yaml").is_file()
    elif words[:2] == ["mlflow", "run"]:
        entry = _project_spec.load_project(ROOT).get_entry_point(words[words.index("-e") + 1])
        given = dict(word.split("=", 1) for before, word in zip(words, words[1:], strict=False) if before == "-P")
        assert "--env-manager=local" in words and given.keys() <= entry.parameters.keys()
        assert known_keys(given.get("set", ""))
    elif words[0] == "dvc":
        changed = [word.split("=")[0] for before, word in zip(words, words[1:], strict=False) if before == "-S"]
        assert set(changed) <= set(overrides.keys())
    else:
        assert words[2].startswith("tests.") or importlib.util.find_spec(words[2])


def test_environment_is_activated_before_the_first_command_that_needs_it():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if not line.startswith(" ")]
    activated = lines.index("source .venv/bin/activate")
    assert not [line for line in lines[:activated] if re.match(r"(mlflow|dvc|python) ", line)]


def test_printed_commands_name_what_there_is():
    stages = _project_spec.load_project(ROOT)._entry_points
    printed = {
        command for path in (ROOT / "pipeline").rglob("*.py") for command in PRINTED.findall(Path(path).read_text())
    }
    assert len(printed) >= 5
    for command in printed:
        assert command.split()[-1] in (TARGETS if command.startswith("make") else stages), command
