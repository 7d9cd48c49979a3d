"""``python -m pipeline <stage>`` runs one stage, as DVC does; ``... run <entry>`` an MLproject entry point."""

from __future__ import annotations

import argparse
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 (failed), 2 (the user's mistake) or 130 (interrupted)."""
    runtime.prepare()
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
    entry.add_argument("--n-trials", default="params.yaml")
    entry.add_argument("--config", default="params.yaml", help="plan: params.yaml, a preset, a folder or a config.json")
    entry.add_argument("--memory-gib", default="24", help="plan: what must hold the peak")
    commands.add_parser("check", help="check params.yaml")
    asked = parser.parse_args(arguments)
    _quiet_environment()
    from pipeline.params import ParamsError, load

    try:
        if asked.command == "check":
            load()
            return 0
        if asked.command == "run":
            from pipeline import project

            if asked.entry == "plan":
                return project.plan(asked.config, asked.memory_gib)
            return project.run(asked.entry, asked.n_trials)
        _stage(asked.command, load())
        return 0
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; finished trials and cells are kept, run the same command to go on", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, expected_errors()):
            raise
        where = "" if asked.command in ("check", "run") else f" in stage {asked.command}"
        advice = _LESS_MEMORY if type(error).__name__ == "OutOfMemoryError" else ""
        print(f"error{where}: {error}{advice}", file=sys.stderr)
        return FAILED


def _stage(name: str, params: Params) -> None:
    from pipeline import tracking
    from pipeline.stages import shell

    tracking.on_termination_interrupt()
    shell.start(name, params)


def expected_errors() -> tuple[type[Exception], ...]:
    """Return the errors whose message says all that a user needs; any other one shows its traceback."""
    import torch

    from pipeline.errors import UserError
    from pipeline.tracking import StoreError

    return (
        UserError,
        StoreError,
        torch.OutOfMemoryError,
        OSError,  # a disk that is full, a folder that cannot be written
        ValueError,
    )


def _quiet_environment() -> None:
    """No remote calls except those that `fetch` makes for a hub source, and no advertisement in the log."""
    from pipeline.params import uses_hub

    if not uses_hub():
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
