"""``python -m pipeline <stage>`` runs one stage, as DVC does; ``... run <entry>`` an MLproject entry point."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from pipeline import runtime
from pipeline.stages import PAPER, STAGES

if TYPE_CHECKING:
    from pipeline.params import Params

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
_LESS_MEMORY = (
    "\nLower recover.micro_batch_size (training), evaluate.batch_tokens (evaluation) or prune.max_length (pruning), or "
    "set device to cpu; `mlflow run . -e plan` tells what fits"
)
# Faults of the machine that a user can mend: what to do about each.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room (`dvc gc -w` removes old versions from DVC's cache)",
    errno.EDQUOT: "your quota is used up: make room (`dvc gc -w` removes old versions from DVC's cache)",
    errno.EACCES: "you may not read or write it: change its owner or mode, or work in another folder",
    errno.EPERM: "you may not change it: change its owner or mode, or work in another folder",
    errno.EROFS: "this file system cannot be written: work in another folder",
    errno.ENOTDIR: "a part of this path is a file: rename that file",
    errno.EISDIR: "it is a folder where a file is wanted: rename the folder",
    errno.ENAMETOOLONG: "the name is too long for this file system: take a shorter one",
    errno.EMFILE: "too many files are open: raise the limit (`ulimit -n 4096`)",
    errno.EIO: "the disk cannot be read or written: check it",
}
# Short parameters of the entry points -> the keys that they set.
_SHORT = {
    "n_trials": "search.n_trials",
    "memory_budget_gib": "search.memory_budget_gib",
    "memory": "search.memory",
    "ratios": "prune.ratios",
}
_AS_IT_SAYS = "params.yaml"  # the default of MLproject's parameters


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (failed), 2 (the user's mistake) or 130 (interrupted)."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        print("interrupted; finished trials and cells are kept, run the same command to go on", file=sys.stderr)
        return INTERRUPTED


def _main(arguments: list[str] | None) -> int:
    runtime.prepare()
    asked = _parser().parse_args(arguments)
    if asked.command == "doctor":
        from pipeline import doctor

        return doctor.report()
    try:
        from pipeline.errors import UserError
        from pipeline.params import ParamsError
    except ModuleNotFoundError as error:
        print(
            f"error: package {error.name} is missing in {sys.prefix}; run: make setup. An environment that "
            "`mlflow run` made stays incomplete when its making was interrupted: delete it and run again",
            file=sys.stderr,
        )
        return FAILED

    try:
        return _run(asked)
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else _mendable(error)
        if message is None:
            raise
        where = f" in stage {asked.command}" if asked.command in (*STAGES, *PAPER) else ""
        print(f"error{where}: {message}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in STAGES:
        commands.add_parser(
            name, help=f"run stage {name}; what it needs must be there (`dvc repro {name}` sees to that)"
        )
    for name in PAPER:
        commands.add_parser(name, help=f"run the paper's {name}; `dvc repro fetch` must have run")
    entry = commands.add_parser("run", help="run an entry point and all that is upstream of it")
    entry.add_argument("entry", choices=(*STAGES, *PAPER, "plan"))
    entry.add_argument("--preset", default=_AS_IT_SAYS, help="a preset's name, in place of params.yaml")
    entry.add_argument("--set", default="", help="changed keys: 'prune.ratios=0.3 evaluate.tasks=[boolq, piqa]'")
    for name, key in _SHORT.items():
        entry.add_argument(f"--{name.replace('_', '-')}", default=_AS_IT_SAYS, help=f"the same as --set {key}=...")
    entry.add_argument("--config", default=_AS_IT_SAYS, help="plan: params.yaml, a preset, a folder or a config.json")
    entry.add_argument("--memory-gib", default="24", help="plan: what must hold the peak")
    check = commands.add_parser("check", help="check params.yaml, a preset or another file; nothing is started")
    check.add_argument("--preset", default=_AS_IT_SAYS, help="a preset's name")
    check.add_argument("--set", default="", help="changed keys")
    check.add_argument("file", nargs="?", help="a file of params")
    commands.add_parser("doctor", help="say what this machine is and how long the main job will take")
    commands.add_parser("ui", help="serve MLflow's UI on this machine, or say where a server has it")
    return parser


def _run(asked: argparse.Namespace) -> int:
    """Run what was asked for; return the exit status."""
    from pipeline import checks, overrides

    if asked.command in ("run", "check"):
        named = {name: (key, getattr(asked, name, _AS_IT_SAYS)) for name, key in _SHORT.items()}
        if faults := overrides.adopt(asked.preset, asked.set, named):
            checks.load(asked.file if asked.command == "check" else None, faults)
    if asked.command == "ui":
        from pipeline import tracking

        return tracking.serve_ui()
    _quiet_environment()
    if asked.command == "check":
        checks.load(asked.file)
        print(f"{asked.file or overrides.path()}: no faults")
        return 0
    if asked.command == "run":
        from pipeline import project

        if asked.entry == "plan":
            return project.plan(asked.config, asked.memory_gib)
        return project.run(asked.entry)
    _stage(asked.command, checks.load())
    return 0


def _stage(name: str, params: Params) -> None:
    from pipeline import tracking
    from pipeline.stages import shell

    tracking.on_termination_interrupt()
    shell.start(name, params)


def _mendable(error: Exception) -> str | None:
    """Return what to tell of an error of the machine or the store that a user can mend; None for any other."""
    if isinstance(error, OSError):
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            return None
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {remedy}"
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"{error}{_LESS_MEMORY}"
    from pipeline.tracking import StoreError

    return str(error) if isinstance(error, StoreError) else None


def _quiet_environment() -> None:
    """No remote calls except those that `fetch` makes for a hub source, and no advertisement in the log."""
    from pipeline import overrides

    if not overrides.uses_hub():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars for what takes milliseconds; ours ask to be shown
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # On a GPU, once for each shape; what it costs stands at prune.multiple_of.
    warnings.filterwarnings("ignore", message="inner dimension .* is not aligned", category=UserWarning)


if __name__ == "__main__":
    sys.exit(main())
