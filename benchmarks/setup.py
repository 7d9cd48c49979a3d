"""What the measurements work on, loaded once: a trial's context and what was measured of it so far.

Where a measurement needs one pruned model, it is that of the ratio next to the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline import checks
from pipeline.params import Params
from pipeline.paths import ALPACA, BASE, BENCHMARKS
from pipeline.search.history import paper_ratio
from pipeline.stages import trials
from pipeline.stages.trials import Contexts
from pipeline.trial.context import Context

MAX_LENGTH = 256  # tokens of a row of Alpaca, as in the paper


def contexts(settings: Params, items: Path = BENCHMARKS) -> Contexts:
    """Return the contexts of all pruning ratios."""
    return Contexts(settings, trials.folders(settings), items)


def context_of(settings: Params, items: Path = BENCHMARKS) -> Context:
    """Return the context of the ratio next to the paper's."""
    ratio = paper_ratio(settings.prune.ratios)
    return Contexts(settings, {ratio: trials.folders(settings)[ratio]}, items).any


@dataclass(frozen=True)
class Options:
    """What the command line may change.

    Attributes:
        items: Folder of ``<task>.jsonl``.
        limit: First items of each task; 0: all.
        repeats: Of each side.
        matrix: Shape of the matrix of ``loftq_svd``.
    """

    items: Path = BENCHMARKS
    limit: int = 24
    repeats: int = 3
    matrix: tuple[int, int] = (4096, 11008)


class Setup:
    """The options, the context (loaded when it is first asked for), and measurements that others build on.

    Attributes:
        options: The options.
        seconds: (side, phase) -> seconds, as measured in this process; ``costs`` fills it.
    """

    def __init__(self, options: Options):
        self.options = options
        self.seconds: dict[tuple[str, str], float] = {}
        self.work: dict[str, float] = {}

    @cached_property
    def context(self) -> Context:
        """Return what trials share: ``params.yaml`` with rows of 256 tokens, on the CPU.

        Raises:
            FileNotFoundError: The pipeline has not made what a trial needs.
        """
        given = checks.load()
        pair = trials.folders(given)[paper_ratio(given.prune.ratios)]
        needed = (BASE, *pair, ALPACA, self.options.items)
        if missing := [str(path) for path in needed if not path.exists()]:
            raise FileNotFoundError(f"{', '.join(missing)}: not there; run: dvc repro quantize")
        recover = given.recover.model_copy(update={"max_length": MAX_LENGTH})
        evaluate = given.evaluate.model_copy(update={"limit": self.options.limit})
        wanted = given.model_copy(update={"recover": recover, "evaluate": evaluate, "device": "cpu"})
        return context_of(wanted, self.options.items)

    @property
    def low(self) -> tuple[int, ...]:
        """Return the bit vector that is measured: 4 bits everywhere."""
        return (4,) * len(self.context.units)
