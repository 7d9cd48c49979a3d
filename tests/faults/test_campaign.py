"""The quick part of the campaign: its own counting, generated params, damaged journals.

The kills of ``tests/end_to_end`` belong to it; all else takes hours: ``python -m tests.faults.campaign FOLDER``.
"""

import json

import pytest
from conftest import ROOT

from tests.faults import damage, fuzz
from tests.faults.tally import Tally, Try


@pytest.fixture
def checked(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def check(name, text):
        return fuzz.check(name, text, tmp_path / "params.yaml")

    return check


@pytest.mark.parametrize("seed", range(2))
def test_generated_params_are_refused_with_a_message_or_make_sense(checked, monkeypatch, seed):
    monkeypatch.chdir(ROOT)
    special = len(fuzz.TEXTS)
    cases = fuzz.texts(special + 60, seed)[0 if seed == 0 else special :]
    faults = [done for done in (checked(name, text) for name, text in cases) if not done.clean]
    assert faults == []


def test_generated_params_are_the_same_for_a_seed(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert fuzz.texts(80, 3) == fuzz.texts(80, 3) != fuzz.texts(80, 4)


def test_default_params_are_clean(checked):
    assert checked("default", (ROOT / "params.yaml").read_text()).clean


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"prune": {"ratios": (float("nan"),)}}, "prune.ratios is nan"),
        ({"search": {"n_trials": 10**30}}, f"search.n_trials is {10**30}"),
        ({"table": {"ratios": (0.2, 0.2)}}, "table.ratios names something more than once"),
        ({"register_": {"name": "x" * 5000}}, "register_.name is a text of 5000 characters"),
        ({"seed": 1, "search": {"references": ["dense"]}}, None),
    ],
)
def test_accepted_params_that_make_no_sense_are_found(values, problem):
    problems = fuzz.strange(values)
    assert [text.startswith(problem) for text in problems] == [True] if problem else problems == []


def test_tally_goes_on_where_a_kill_left_it(tmp_path):
    tally = Tally(tmp_path / "tries.jsonl")
    tally.add(Try("kills", "0: search"))
    tally.add(Try("kills", "1: build", lost=2, note="two trials"))
    with tally.path.open("a") as file:
        file.write('{"kind": "kills", "na')
    again = Tally(tmp_path / "tries.jsonl")
    assert again.begins("kills", "1: ") and not again.begins("kills", "2: ")
    again.add(Try("params", "text 3", tracebacks=1))
    table = Tally(tmp_path / "tries.jsonl").table().splitlines()
    assert table[2:5] == [
        "| kills | 2 | 2 | 0 | 0 | 0 | 0 |",
        "| params | 1 | 0 | 0 | 0 | 0 | 1 |",
        "| all | 3 | 2 | 0 | 0 | 0 | 1 |",
    ]
    assert table[5:] == ["kills, 1: build: lost 2: two trials", "params, text 3: tracebacks 1: "]


def test_traceback_in_an_output_is_counted_with_its_last_line():
    done = Try("kills", "0")
    done.read("all is well\n")
    assert done.clean
    done.read("Traceback (most recent call last):\n  File \"x.py\", line 1\nKeyError: 'a bug'\n")
    assert done.tracebacks == 1 and done.note == "KeyError: 'a bug'"


@pytest.mark.parametrize("how", [damage.cut, damage.halved, damage.garbled, damage.emptied, damage.braces])
def test_damage_changes_its_file_and_no_other(tmp_path, how):
    for name in ("hurt", "well"):
        (tmp_path / name).write_text(json.dumps(list(range(100))))
    how(tmp_path / "hurt")
    assert (tmp_path / "hurt").read_bytes() != (tmp_path / "well").read_bytes()
    assert json.loads((tmp_path / "well").read_text()) == list(range(100))


def test_damages_have_names_of_their_own():
    names = [damage.name_of(each) for each in damage.DAMAGES]
    assert len(set(names)) == len(names)
