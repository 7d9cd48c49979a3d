"""Files of a finished project that were cut, overwritten or emptied, and the command that reads them next."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.project import command
from tests.faults import state
from tests.faults.kills import run
from tests.faults.tally import Try

STAGE = (sys.executable, "-m", "pipeline")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-17])


def halved(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def garbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def braces(path: Path) -> None:
    path.write_text("{}")


def garbage(path: Path) -> None:
    path.write_text("this is no database\n" * 500)


def locked(path: Path) -> None:
    """The lock that Optuna leaves beside its journal when it is killed: a symbolic link to a name that is no file.

    Former versions let it; now the journal has no lock of its own, and an entry point removes old ones.
    """
    path.with_name(path.name + ".lock").symlink_to("gone")


@dataclass(frozen=True)
class Damage:
    """A fault in a file, the command that meets it, and a word of the message if it may refuse (None: it may not)."""

    path: str
    how: Callable[[Path], None]
    command: tuple[str, ...]
    says: str | None


JOURNAL = "artifacts/study/journal.log"
DAMAGES = [
    *(Damage(JOURNAL, how, run("search"), None) for how in (cut, garbled, locked)),
    *(Damage("artifacts/base/model.safetensors", how, (*STAGE, "prune"), "base") for how in (cut, halved)),
    *(
        Damage(f"artifacts/pruned/0.2/{name}", how, (*STAGE, "importance"), "pruned")
        for name, how in [
            ("model.safetensors", cut),
            ("model.safetensors", emptied),
            ("config.json", braces),
            ("checksums.json", braces),
            ("checksums.json", cut),
        ]
    ),
    *(Damage("artifacts/bank/0.2/codes4.safetensors", how, (*STAGE, "build"), "bank") for how in (halved, garbled)),
    Damage("artifacts/final/model.safetensors", halved, (*STAGE, "evaluate"), "final"),
    *(
        Damage(f"reports/{report}.json", how, (*STAGE, stage), report)
        for report, stage in [
            ("importance", "search"),
            ("search", "pareto"),
            ("pareto", "build"),
            ("evaluate", "register"),
            ("export", "register"),
            ("search", "report"),
        ]
        for how in (braces, cut, emptied)
    ),
    Damage("data/alpaca.jsonl", cut, (*STAGE, "prune"), "alpaca"),
    Damage("data/benchmarks/piqa.jsonl", cut, (*STAGE, "evaluate"), "piqa"),
    *(Damage("mlflow.db", how, (*STAGE, "pareto"), "mlflow.db") for how in (garbage, halved)),
    *(Damage(".dvc/tmp/qpruner.sources.json", how, run("fetch"), None) for how in (braces, garbage)),
    *(Damage(path, how, run("fetch"), None) for path in (".dvc/tmp/rwlock", "dvc.lock") for how in (emptied, cut)),
]


KEPT = ("artifacts", "reports", "data", "mlflow.db", ".dvc/tmp", "dvc.lock")  # copied away before, put back after


def name_of(damage: Damage) -> str:
    words = damage.command[3:] if damage.command[0] == sys.executable else damage.command[:5]
    return f"{damage.path} {damage.how.__name__}, then {' '.join(words)}"


def inflict(project: Path, damage: Damage) -> Try:
    """Damage one file of a finished project, run the command, put everything back as it was."""
    done = Try("damaged files", name_of(damage))
    before = state.journal_trials(project)
    with _restored(project):
        damage.how(project / damage.path)
        ended = command(project, *damage.command, timeout=1800)
        text = ended.stdout + ended.stderr
        done.read(text)
        if ended.returncode and damage.says is None:
            done.unclear += 1
            done.remark(f"exit status {ended.returncode}: {text.strip()[-300:]}")
        elif ended.returncode and damage.says not in text:
            done.unclear += 1
            done.remark(f"the message does not name {damage.says!r}: {text.strip()[-300:]}")
        elif not ended.returncode and damage.says is not None:
            done.unclear += 1
            done.remark("accepted")
        if damage.path == JOURNAL and not ended.returncode:
            # A torn line may be the last trial's end; it is run again. Nothing else may go.
            done.lost += len(set(before) - set(state.journal_trials(project)))
    return done


class _restored:
    """Puts back what ``KEPT`` names: hard links would share the damage, so files are copied."""

    def __init__(self, project: Path):
        self.project, self.copy = project, project.parent / "copy"

    def __enter__(self):
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir()
        for name in KEPT:
            source = self.project / name
            if source.is_dir():
                shutil.copytree(source, self.copy / name, symlinks=True)
            elif source.exists():
                (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, self.copy / name)
        for path in (self.project / "artifacts").rglob("*"):  # DVC makes what it caches read-only
            if path.is_file() and not path.is_symlink():
                os.chmod(path, 0o644)

    def __exit__(self, *_):
        for name in KEPT:
            target = self.project / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            source = self.copy / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            elif source.exists():
                shutil.copy2(source, target)
