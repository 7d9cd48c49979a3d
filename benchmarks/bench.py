"""What a trial costs, ours beside the plain way, both on the same work in one run.

    python -m benchmarks.bench [name ...] [--items FOLDER] [--limit N] [--repeats N]

Without names, everything is measured. Each figure is kept as soon as it is there: ``reports/bench.json`` holds
``{name: {ours, theirs, ratio, unit, n, against}}``, and names on the command line update only their own.
``reports/bench.md`` and ``reports/bench.png`` show all that is kept. What is compared stands in the docstrings of
``costs.py`` (trials) and ``services.py`` (what surrounds them).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import torch

from benchmarks import costs, harness, services
from benchmarks.harness import LeftOut
from benchmarks.setup import Options, Setup
from pipeline import console
from pipeline.paths import REPORTS

# In this order `trial` and `tracking` find what they need measured already.
MEASUREMENTS = {
    "evaluation": costs.evaluation,
    "recovery": costs.recovery,
    "assembly": costs.assembly,
    "loftq_svd": costs.loftq_svd,
    "trial": costs.trial,
    "trial_flops": costs.trial_flops,
    "tracking": services.tracking_share,
    "startup": services.startup,
    "repro_noop": services.repro_noop,
    "query": services.query,
    "suggestion": services.suggestion,
}


def machine() -> str:
    """Name what this runs on."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def run(names: list[str], options: Options, folder: Path) -> int:
    """Measure by name, keep each figure at once and show all; return the exit status."""
    setup, failed = Setup(options), 0
    for name in names:
        console.note(f"{name} ...")
        try:
            harness.keep(folder / "bench.json", MEASUREMENTS[name](setup))
        except LeftOut as reason:
            console.note(f"{name} is left out: {reason}")
        except (FileNotFoundError, RuntimeError) as error:
            console.note(f"error in {name}: {error}")
            failed = 1
    harness.show(harness.read(folder / "bench.json"), folder, machine())
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(MEASUREMENTS)}; none: all")
    parser.add_argument("--items", type=Path, default=Options.items, help="folder of <task>.jsonl")
    parser.add_argument("--limit", type=int, default=Options.limit, help="items of a task; 0: all")
    parser.add_argument("--repeats", type=int, default=Options.repeats)
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - set(MEASUREMENTS):
        parser.error(f"no measurement is called {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    return run(asked.names or list(MEASUREMENTS), Options(asked.items, asked.limit, asked.repeats), REPORTS)


if __name__ == "__main__":
    sys.exit(main())
