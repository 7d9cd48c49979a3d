"""Where things lie, relative to the project's root."""

from pathlib import Path

BASE, PRUNED, BANK, FINAL = (Path("artifacts") / name for name in ("base", "pruned", "bank", "final"))
# PRUNED and BANK hold a folder for each pruning ratio.
EXPORT = Path("artifacts/export")  # the built model in the forms that other programs run
STUDY = Path("artifacts/study")
TEACHER = Path("artifacts/teacher")  # what base models predict for rows that trials train on
UNTOUCHED = Path("artifacts/untouched")  # results of base models, which all searches share
UNFINISHED = Path("artifacts/unfinished")  # recoveries that were interrupted, with `recover.save_every`
CACHE = Path("artifacts/cache")  # of libraries, where the user's home cannot be written
ALPACA, BENCHMARKS = Path("data/alpaca.jsonl"), Path("data/benchmarks")
REPORTS = Path("reports")


def at_ratio(folder: Path, ratio: float) -> Path:
    """Return what a folder with a part for each pruning ratio holds for one of them."""
    return folder / f"{ratio:g}"
