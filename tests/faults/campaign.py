"""The whole campaign: ``python -m tests.faults.campaign FOLDER``. Hours; killed, it goes on where it was.

It makes clones with a tiny model in FOLDER, does to them what computers, networks and people do, and counts in
``FOLDER/tries.jsonl``. At its end, and with ``--table`` at any time, it prints the counts by kind. All but the first
should be 0; the lines below the table say what was not.
"""

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from tests.end_to_end.project import command
from tests.faults import damage, fuzz, kills, outage
from tests.faults.tally import Tally, Try
from tests.fixtures.models import ROOT

KINDS = ("params", "kills", "outages", "damaged files", "bad models and data")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--params", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print what has been counted so far")
    asked = parser.parse_args(arguments)
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tally = Tally(folder / "tries.jsonl")
    if not asked.table:
        os.chdir(ROOT)
        campaigns = {
            "params": lambda: generated(tally, folder, asked.params, asked.seed),
            "kills": lambda: killed(tally, folder, asked.kills, asked.seed),
            "outages": lambda: outages(tally, folder),
            "damaged files": lambda: damaged(tally, folder),
            "bad models and data": lambda: bad_inputs(tally, folder),
        }
        for kind in asked.kinds:
            campaigns[kind]()
    print(tally.table())
    return 0 if all(done.clean for done in tally.tries) else 1


def noted(tally: Tally, done: Try) -> None:
    tally.add(done)
    print(f"{done.kind}, {done.name}: {'clean' if done.clean else 'NOT CLEAN'}; {done.note}", flush=True)


def generated(tally: Tally, folder: Path, count: int, seed: int) -> None:
    for name, text in fuzz.texts(count, seed):
        if not tally.has("params", name):
            tally.add(fuzz.check(name, text, folder / "params.yaml"))


def killed(tally: Tally, folder: Path, count: int, seed: int) -> None:
    project, seconds = kills.prepared(folder / "kills"), {}
    for number in range(count):
        if not tally.begins("kills", f"{number}: "):
            noted(tally, kills.kill(project, number, seed, seconds))


def outages(tally: Tally, folder: Path) -> None:
    project = kills.prepared(folder / "outages")
    for number, seconds in enumerate((5, 30, 120, None, None)):
        if not tally.begins("outages", f"{number}: "):
            noted(tally, outage.outage(project, number, seconds))


def damaged(tally: Tally, folder: Path) -> None:
    project = kills.prepared(folder / "damages")
    ended = command(project, *kills.run("search"), timeout=3600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for each in damage.DAMAGES:
        if not tally.has("damaged files", damage.name_of(each)):
            noted(tally, damage.inflict(project, each))


def bad_inputs(tally: Tally, folder: Path) -> None:
    """Run the tables of bad models and bad data, which are tests; a test that fails is a case that is unclear."""
    report = folder / "bad.xml"
    files = sorted(str(path) for path in (ROOT / "tests/faults").glob("test_bad_*.py"))
    if not files:
        return
    subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files], cwd=ROOT, check=False)
    for case in xml.parse(report).iter("testcase"):
        kind = case.get("classname", "").split(".")[-1].removeprefix("test_").replace("_", " ")
        name = case.get("name", "")
        if tally.has(kind, name) or case.find("skipped") is not None:
            continue
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        done = Try(kind, name)
        if failure is not None:
            done.unclear += 1
            done.remark((failure.get("message") or "")[:200])
        tally.add(done)


if __name__ == "__main__":
    sys.exit(main())
