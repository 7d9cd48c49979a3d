"""Score a checkpoint on benchmark items, with chance beside it.

python -m benchmarks.score artifacts/base data/benchmarks [items of a task, 0: all]
"""

import sys
from pathlib import Path

from pipeline import checkpoint, console, device
from pipeline.data import definitions, tasks
from pipeline.params import TASKS
from pipeline.trial import evaluate


def main(folder: Path, items: Path, limit: int) -> None:
    """Print accuracy, standard error and chance of each task as a Markdown table."""
    compute = device.choose("auto", "auto")
    model = checkpoint.load_model(folder, compute.device, compute.dtype)
    tokenizer = checkpoint.load_tokenizer(folder)
    scores = evaluate.run(model, tokenizer, tasks.load(TASKS, items), limit, 1024)
    print(f"{scores.items} items\n\n| task | metric | accuracy, % | chance, % |\n|---|---|---|---|")
    for task, value in scores.accuracy.items():
        error = 100 * scores.stderr[task]
        metric, chance = definitions.metric(task), 100 * tasks.CHANCE[task]
        print(f"| {task} | {metric} | {100 * value:.1f} ± {error:.1f} | {chance:.0f} |")
    print(f"| mean | | {100 * scores.mean:.1f} ± {100 * scores.mean_stderr:.1f} | |")
    console.note(str(scores.other))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
