"""How well do mutual information and sensitivity foretell what a unit gains by 8 bits?

    python -m benchmarks.priors [vectors=80]

Assembles random bit vectors without recovery, up to a third of the units at 8 bits, and measures the loss of the
held-out responses and of as many training rows; additive gains are fitted to it by ridge regression. Prints, for each
prior, its correlation with the gains, and what the quarter of the units that it ranks highest gains, as a share of what
the best quarter does. Needs the stages up to ``importance``; the pruned
model is that of the ratio next to the paper's. 80 vectors of the default model take 6 minutes on two cores.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict

from benchmarks import setup
from pipeline import checks
from pipeline.console import progress
from pipeline.data import alpaca
from pipeline.data.alpaca import Example
from pipeline.paths import ALPACA
from pipeline.stages import priors as kept
from pipeline.trial import loss
from pipeline.trial.assemble import assemble, merged
from pipeline.trial.context import Context


@torch.inference_mode()
def losses(context: Context, rows: list[Example], vectors: np.ndarray) -> np.ndarray:
    """Return the mean loss of a response token of each vector's model as it is assembled: [vectors], nats.

    Args:
        context: What trials share.
        rows: What is judged on.
        vectors: [vectors, units], True at 8 bits.
    """
    found = []
    for raised in progress(vectors.tolist(), "random vectors"):
        model = assemble(context, [8 if up else 4 for up in raised]).eval()
        with merged(model):
            each = loss.row_losses(
                model, rows, context.settings.recover.micro_batch_size, context.tokenizer.pad_token_id
            )
        found.append(loss.mean_loss(each)[0])
    return np.array(found)


def drawn(count: int, units: int, seed: int) -> np.ndarray:
    """Return random vectors of up to a third of the units, the first one with none: [count, units]."""
    generator = random.Random(seed)
    vectors = np.zeros((count, units), dtype=bool)
    for vector in vectors[1:]:
        vector[generator.sample(range(units), generator.randint(1, max(units // 3, 1)))] = True
    return vectors


def gains(vectors: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (the fall of the loss by each unit, [units]; R^2 on held-out vectors)."""
    model = RidgeCV(alphas=np.logspace(-4, 2, 25))
    left = found - cross_val_predict(model, vectors, found, cv=min(10, len(found)))
    return -model.fit(vectors, found).coef_, 1 - float((left**2).sum() / ((found - found.mean()) ** 2).sum())


def judged(prior: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Return (correlation with the true gains, gain of the prior's best quarter over that of the true best one)."""
    quarter = max(len(true) // 4, 1)
    best = np.sort(true)[-quarter:].sum()
    return float(np.corrcoef(prior, true)[0, 1]), float(true[np.argsort(-prior, kind="stable")[:quarter]].sum() / best)


def main(count: int) -> None:
    """Measure and print."""
    settings = checks.load()
    context = setup.context_of(settings)
    priors = kept.read(settings)[context.ratio]
    train, _ = alpaca.split(alpaca.read(ALPACA), settings.data.validation_rows, settings.seed)
    last = alpaca.encode(train[-settings.data.validation_rows :], context.tokenizer, settings.recover.max_length)
    vectors = drawn(count, len(context.units), settings.seed)
    true, fit = gains(vectors, losses(context, [*context.validation, *last], vectors))
    print(f"{count} vectors of {len(true)} units; additive gains: R^2 {fit:.3f} on held-out vectors")
    for name in ("mutual_information", "sensitivity"):
        correlation, share = judged(np.array(getattr(priors, name)), true)
        print(f"{name}: correlation with the gains {correlation:.2f}; its best quarter gains {share:.2f} of the most")


if __name__ == "__main__":
    options = dict(item.split("=") for item in sys.argv[1:])
    main(int(options.get("vectors", 80)))
