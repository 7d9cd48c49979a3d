"""How cost grows with the model, the work and the study, and what a search of a 7B model costs on paper.

    python -m benchmarks.growth [--repeats N]

Trials are run on random models of three sizes, and on one of them with more items and more tokens to train on;
suggestions after more trials of more units; storing and querying up to 2,000 trials. ``exponent`` is the slope of
log(seconds) over log(size): 1 is proportional. Writes ``reports/growth.md`` and ``reports/growth.png``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import services
from benchmarks.harness import interleaved, markdown, timed
from benchmarks.setup import Options, Setup
from pipeline import architecture, checkpoint, console, storage
from pipeline.compress import bank_writer, layer_bank
from pipeline.paths import REPORTS
from pipeline.trial import evaluate, trial
from pipeline.trial.context import Context
from pipeline.trial.trees import trees

MODELS = ((128, 4), (256, 6), (384, 8))  # hidden size and blocks; MLPs are three times as wide
ITEMS, STEPS = (4, 8, 16), (1, 2, 4)
TRIALS, UNITS, STORED = (10, 50, 100), (30, 60, 120), (250, 500, 1000, 2000)
SMALL = 2  # items of a task and steps where another size is varied


@dataclass(frozen=True)
class Series:
    """Seconds against one size.

    Attributes:
        name: What takes the time.
        size: What is varied.
        points: (size, seconds), ascending.
    """

    name: str
    size: str
    points: tuple[tuple[float, float], ...]

    @property
    def exponent(self) -> float:
        """Return the least-squares slope of log(seconds) over log(size)."""
        x, y = zip(*((math.log(size), math.log(seconds)) for size, seconds in self.points), strict=True)
        across = [value - fmean(x) for value in x]
        return sum(one * value for one, value in zip(across, y, strict=True)) / sum(one**2 for one in across)


@dataclass(frozen=True)
class Assumptions:
    """What the cost on paper takes for granted; the shares are those that ``gpu.py`` measured on an H100.

    Attributes:
        parameters: Of the blocks' linears, after pruning.
        layers: Blocks.
        trials: Of the search.
        steps: Optimizer steps of a recovery.
        batch_size: Rows of a step.
        items: Items of an evaluation, all tasks together.
        flops: Dense bf16 operations a second of the GPU (H100 SXM by its data sheet).
        training_share: Share of them that recovery reaches.
        inference_share: Share of them that evaluation reaches.
        bytes_per_second: At which codes are read and put on the GPU.
    """

    parameters: float = 0.8 * 6.5e9
    layers: int = 32
    trials: int = 50
    steps: int = 200
    batch_size: int = 64
    items: int = 7 * 200
    flops: float = 989e12
    training_share: float = 0.037
    inference_share: float = 0.078
    bytes_per_second: float = 1e9


def on_paper(assumed: Assumptions, row_tokens: float, item_tokens: float, suggestion: float) -> dict[str, float]:
    """Return the seconds of a search by phase, and of the whole, on one GPU.

    With P parameters and T tokens, evaluation does ``2 P T`` operations and LoRA's recovery ``4 P T`` (forward, and
    the gradient of the inputs); 4-bit weights are dequantized on the way, which the shares of the peak must cover.

    Args:
        assumed: The assumptions.
        row_tokens: Mean tokens of a training row, as measured.
        item_tokens: Mean tokens that an item feeds, as measured.
        suggestion: Seconds of a suggestion, as measured.
    """
    recovered = assumed.steps * assumed.batch_size * row_tokens * 4 * assumed.parameters
    evaluated = assumed.items * item_tokens * 2 * assumed.parameters
    one = {
        "assembly": assumed.parameters / 2 / assumed.bytes_per_second,
        "recovery": recovered / (assumed.flops * assumed.training_share),
        "evaluation": evaluated / (assumed.flops * assumed.inference_share),
        "suggestion": suggestion,
    }
    found = {phase: seconds * assumed.trials for phase, seconds in one.items()}
    return found | {"whole search": sum(found.values())}


def random_context(context: Context, hidden: int, layers: int, folder: Path) -> tuple[Context, int]:
    """Return a context of a random pruned model in bf16 with its bank, and the parameters of its linears."""
    from transformers import LlamaConfig

    config: Any = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=context.config.vocab_size,
        max_position_embeddings=context.config.max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=context.tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = AutoModelForCausalLM.from_config(config).to(context.compute.dtype).state_dict()
    pruned = checkpoint.pruned_config(config, architecture.shapes(config))
    folder.mkdir(parents=True)
    plain = replace(context.bank.settings, method="nearest", init="loftq")  # weights that are drawn read no text
    bank_writer.write(state, layer_bank.groups_of(pruned), plain, 0, folder)
    units = architecture.units(pruned, "block")
    made = replace(context, config=pruned, state=state, bank=layer_bank.Bank(folder), units=units)
    return made, sum(state[f"{name}.weight"].numel() for name in layer_bank.names_of(pruned))


def trial_seconds(context: Context, steps: int, limit: int, repeats: int) -> float:
    """Return the median seconds of a trial at 4 bits, after one that is not counted."""

    def once() -> float:
        return sum(trial.run(context, (4,) * len(context.units), trial.Work(steps, limit))[0].seconds.values())

    once()
    return median(once() for _ in range(repeats))


def trials(context: Context, repeats: int) -> list[Series]:
    """Measure trials against parameters, items and tokens."""
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for hidden, layers in MODELS:
            made, parameters = random_context(context, hidden, layers, Path(scratch) / f"{hidden}x{layers}")
            found.append((parameters, trial_seconds(made, SMALL, SMALL, repeats)))
            if (hidden, layers) == MODELS[0]:
                small = made
        total = len(small.tasks)
        items = [(limit * total, trial_seconds(small, 0, limit, repeats)) for limit in ITEMS]
        tokens = [(tokens_of(small, steps), trial_seconds(small, steps, SMALL, repeats)) for steps in STEPS]
    return [
        Series("trial", "parameters of the linears (head and embeddings not counted)", tuple(found)),
        Series("trial without training", "items", tuple(items)),
        Series("trial", "tokens trained on", tuple(tokens)),
    ]


def tokens_of(context: Context, steps: int) -> int:
    """Return the tokens that a recovery of so many steps sees, padding left out."""
    from itertools import islice

    from pipeline.trial.recover import endless

    settings = context.settings
    parts = islice(endless(context.train, settings.recover.batch_size, settings.seed), steps)
    return sum(len(row.tokens) for part in parts for row in part)


def item_tokens(context: Context) -> float:
    """Return the mean tokens that an item feeds into the model: shared prefixes once, no padding."""
    found: list[int] = []

    class Counting(evaluate.SharedPrefixLM):
        def _loglikelihood_tokens(self, requests: list, **_: object) -> list[tuple[float, bool]]:
            asked = [self._request(before, after) for _, before, after in requests]
            found.append(sum(tree.size for tree in trees(asked)))
            return [(0.0, False)] * len(asked)

    from benchmarks.plain import samples

    model = checkpoint.from_state(context.config, context.state)
    scored = samples(Counting(model, context.tokenizer, 1024), context.tasks, context.settings.limit)
    return sum(found) / sum(len(one) for one in scored.values())


def suggestions(repeats: int) -> list[Series]:
    """Measure our suggestions against trials and units."""

    def seconds(done: int, units: int) -> float:
        ours, _ = services.suggesters(done, units)
        return interleaved(lambda: timed(ours), repeats=repeats)[0]

    return [
        Series(f"suggestion, {UNITS[0]} units", "trials", tuple((done, seconds(done, UNITS[0])) for done in TRIALS)),
        Series("suggestion, 50 trials", "units", tuple((units, seconds(50, units)) for units in UNITS)),
    ]


def store(repeats: int) -> list[Series]:
    """Measure storing one more trial and getting the front of all, against trials in the store."""
    found = services.query_seconds(STORED, repeats)
    return [
        Series("storing a trial", "trials stored", tuple((size, pair[0]) for size, pair in found.items())),
        Series("front out of the store", "trials stored", tuple((size, pair[1]) for size, pair in found.items())),
    ]


def write(found: Sequence[Series], paper: Mapping[str, float], assumed: Assumptions, folder: Path) -> None:
    """Print the tables and write ``growth.md`` and ``growth.png``."""
    columns = ["what", "against", "sizes", "seconds", "exponent"]
    cells = [
        [
            one.name,
            one.size,
            ", ".join(f"{size:,.0f}" for size, _ in one.points),
            ", ".join(f"{seconds:.3g}" for _, seconds in one.points),
            f"{one.exponent:.2f}",
        ]
        for one in found
    ]
    stated = ", ".join(f"{name} {value:.4g}" for name, value in vars(assumed).items())
    rows = [[phase, f"{seconds / 3600:.2f}"] for phase, seconds in paper.items()]
    page = f"# How cost grows\n\n`python -m benchmarks.growth`. Measured:\n\n{markdown(columns, cells)}"
    page += (
        "\n## A search on one GPU, on paper\n\nNot measured; computed from tokens and suggestions measured here and "
    )
    page += f"these assumptions: {stated}.\n\n{markdown(['phase', 'hours'], rows)}"
    storage.write_text(folder / "growth.md", page)
    console.note(page)
    _picture(found, folder / "growth.png")


def _picture(found: Sequence[Series], path: Path) -> None:
    from matplotlib import pyplot

    across = 3
    down = -(-len(found) // across)
    figure, grid = pyplot.subplots(down, across, figsize=(10, 2.8 * down), dpi=150, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for one, axes in zip(found, grid.flat, strict=False):
        axes.loglog(*zip(*one.points, strict=True), "o-", color="#2f6fbb")
        axes.set_title(f"{one.name} (exponent {one.exponent:.2f})", fontsize=8)
        axes.set_xlabel(one.size.partition(" (")[0], fontsize=8)
        axes.set_ylabel("s", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args(arguments).repeats
    try:
        context = Setup(Options()).context
    except FileNotFoundError as error:
        console.note(f"error: {error}")
        return 1
    found = trials(context, repeats) + store(repeats)
    found += suggestions(repeats)
    assumed = Assumptions()
    ours, _ = services.suggesters(assumed.trials, assumed.layers)
    suggestion = timed(ours)
    train = [len(row.tokens) for row in context.train]
    paper = on_paper(assumed, fmean(train), item_tokens(context), suggestion)
    write(found, paper, assumed, REPORTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
