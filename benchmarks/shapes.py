"""One shape for all blocks against a shape for each: what it costs at 16 bits, at 4, and after a recovery.

    python -m benchmarks.shapes FOLDER text=FILE [ratios=0.1,0.2,0.35] [ways=free,uniform] [steps=32] [limit=200]
        [rounds=5] [KEY=VALUE ...]

In a folder with ``artifacts/base``, ``data/`` and ``params.yaml``; KEY=VALUE changes the params of all arms, as
``quantize.samples=24``. Ways: ``free`` with the block ranges of the params, ``everywhere`` (free shapes, all blocks may
lose) and ``uniform``. One calibration serves all ratios of a way. Models and banks are kept in ``artifacts/table``,
results in ``reports/shapes.json``, so that a killed run goes on.

A line for each ratio and way: what was removed, shapes and multiply-adds of a token; perplexity of 20 windows of 256
tokens of the text, loss of held-out responses and divergence from the dense model there: pruned in 16 bits, at 4 bits
with its adapters as they start, and after the recovery; gold answers and accuracy of ``limit`` items a task that trials
do not see. Then what uniform gains over the first way at the same ratio, with paired standard errors.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import recovery
from benchmarks.recovery import Arm, Judge
from pipeline import architecture, checkpoint
from pipeline.export import dense, gguf_file, llama, speed
from pipeline.identity import TRIAL, code
from pipeline.paths import BASE
from pipeline.trial.assemble import assemble

RESULTS = Path("reports/shapes.json")
EVERYWHERE = {
    f"prune.{kind}_blocks.{end}": block
    for kind in ("attention", "mlp")
    for end, block in (("first", "0"), ("last", "-1"))
}
WAYS = {
    "free": {"prune.shapes": "free"},
    "everywhere": {"prune.shapes": "free"} | EVERYWHERE,
    "uniform": {"prune.shapes": "uniform"} | EVERYWHERE,
}


def measure(arm: Arm, text: str, ratios: Sequence[float]) -> dict[str, Any]:
    """Return all figures of an arm."""
    params, context, _ = recovery.prepare(arm, ratios)
    judge, config = Judge(context, text), context.config
    pruned = asdict(judge.read(assemble(context, (16,) * len(context.units))))
    shapes = sorted({(shape.heads, shape.kv_heads, shape.channels) for shape in architecture.shapes(config)})
    sizes = speed.analytic(config) | {"shapes": shapes}
    return recovery.measure(arm, params, context, judge) | {"pruned": pruned, "sizes": sizes}


def line(name: str, found: dict[str, Any]) -> str:
    """Return an arm's figures as text."""
    sizes, shapes = found["sizes"], found["sizes"]["shapes"]
    shape = f"all blocks {tuple(shapes[0])}" if len(shapes) == 1 else f"{len(shapes)} shapes"
    states = " -> ".join(recovery.shown(found[state]) for state in ("pruned", "before", "after"))
    return (
        f"{name}: {sizes['parameters'] / 1e6:.2f} M parameters, {sizes['multiply_adds'] / 1e6:.2f} M multiply-adds, "
        f"{shape}: perplexity, response, divergence {states}; gold {found['gold_logprob']:.4f}; accuracy "
        f"{100 * found['accuracy']:.1f} ± {100 * found['accuracy_stderr']:.1f}"
    )


def speeds(pruned: Mapping[str, Path], rounds: int) -> dict[str, speed.Timed]:
    """Return the speed of models in llama.cpp, all linears at 4 bits.

    Args:
        pruned: Name -> checkpoint; the first one is what the others are compared with.
        rounds: How often each is timed.
    """
    files: dict[str, Path] = {}
    tokenizer = checkpoint.load_tokenizer(BASE)
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for name, folder in pruned.items():
            model = dense.read(folder)
            model = replace(model, bits=dict.fromkeys(architecture.linears(model.config), 4))
            files[name] = Path(scratch) / f"{len(files)}.gguf"
            gguf_file.write(files[name], model, tokenizer, name)
        return speed.interleaved(files, rounds, llama.threads(), model.config.vocab_size)


def main(folder: Path, given: dict[str, str]) -> None:
    """Print a line for each way to cut and ratio, then their speeds."""
    os.chdir(folder)
    text = Path(given.pop("text")).read_text(encoding="utf-8")
    ratios = [float(ratio) for ratio in given.pop("ratios", "0.1,0.2,0.35").split(",")]
    ways = given.pop("ways", "free,uniform").split(",")
    steps, limit, rounds = (int(given.pop(key, usual)) for key, usual in (("steps", 32), ("limit", 200), ("rounds", 5)))
    pruned = {"untouched": BASE}
    measured_by = code(*TRIAL, "pipeline.stages.prune", "pipeline.stages.quantize")
    for ratio in ratios:
        first = None
        for way in ways:
            changes = given | WAYS[way] | {"prune.ratios": str(ratio)}
            arm = Arm(f"{way} {ratio}", changes, steps, 4, limit)
            key = f"{json.dumps(asdict(arm), sort_keys=True)} {measured_by}"
            found = recovery.kept(RESULTS, key, partial(measure, arm, text, ratios))
            pruned[arm.name] = recovery.supplies(arm, ratios)[1].pruned
            print(line(arm.name, found), flush=True)
            if first is None:
                first = found
            else:
                print(f"    gains {recovery.gains(found, first)}", flush=True)
    if rounds and llama.installed():
        timed = speeds(pruned, rounds)
        whole = timed["untouched"]
        for name, each in timed.items():
            faster = speed.ratio([one.generated for one in each.rounds], [one.generated for one in whole.rounds])
            print(
                f"{name}: {each.prompt:.0f} prompt tokens a second, {each.generated:.0f} generated, {faster:.2f} times"
            )


if __name__ == "__main__":
    words = dict(word.split("=", 1) for word in sys.argv[2:])
    if "text" not in words:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), words)
