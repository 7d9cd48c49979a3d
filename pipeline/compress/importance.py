"""Stage ``importance``: which units need their bits: mutual information (eq. 7) and quantization sensitivity.

Reads ``artifacts/pruned`` and Alpaca rows. Writes ``reports/importance.json`` and ``reports/importance.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.architecture import Unit
from pipeline.bits import DENSE, WIDTHS
from pipeline.compress import quantize
from pipeline.compress.layer_bank import BITS, Bank
from pipeline.compress.modules import head_of, last_states, mean_embedding, weight_of
from pipeline.compress.priors import Priors
from pipeline.console import progress
from pipeline.data.alpaca import IGNORED, Batch


@dataclass(frozen=True)
class Settings:
    """How mutual information is estimated.

    Attributes:
        clusters: k-means codes of a block's output.
        outcomes: The most frequent predicted tokens told apart; the rest share one outcome.
    """

    clusters: int
    outcomes: int


def run(
    model: PreTrainedModel,
    calibration: Sequence[Batch],
    units: Sequence[Unit],
    settings: Settings,
    bank: Bank,
    seed: int,
    dense: Predictions | None = None,
) -> Priors:
    """Measure both importances.

    Args:
        model: The pruned model; its linears are left at 4 bits.
        calibration: Token batches; every labelled position counts.
        units: What one bit choice covers.
        settings: How mutual information is estimated.
        bank: Its layer bank; the codes are read.
        seed: Of k-means.
        dense: What the model before pruning predicts; None: it is this one.
    """
    model.eval()
    calibration = [part.to(model.device) for part in calibration]
    by_block = mutual_information(model, calibration, settings, seed)
    pruned = predictions(model, calibration)
    wanted = pruned if dense is None else dense.to(model.device)
    gains, losses = sensitivity(model, calibration, units, bank, pruned, wanted)
    return Priors(
        units=tuple(unit.name for unit in units),
        mutual_information=tuple(by_block[unit.block] for unit in units),
        sensitivity=tuple(gains[8]),
        dense_gains=tuple(gains[16]),
        divergence=losses[0],
        distance=losses[1],
        tokens=sum(int((part.labels != IGNORED).sum()) for part in calibration),
    )


@torch.inference_mode()
def mutual_information(
    model: PreTrainedModel, calibration: Sequence[Batch], settings: Settings, seed: int
) -> list[float]:
    """Return I(X; Y) of each block's output X and the model's prediction Y, in nats.

    X is the block's output at one token, coded by k-means; Y is the most likely next token, with the rare ones taken
    together. Plug-in estimate with the Miller-Madow correction (``discrete_mutual_information``).
    """
    outputs: list[list[torch.Tensor]] = [[] for _ in architecture.blocks(model)]
    predictions = []
    for part in progress(calibration, "mutual information: outputs"):
        real = part.labels != IGNORED
        with architecture.block_outputs(model) as of_blocks:
            last = last_states(model, part.tokens)
        predictions.append(head_of(model)(last[real]).argmax(-1).cpu())
        for block, value in enumerate(of_blocks):
            outputs[block].append(value[real].float().cpu())
    from sklearn.cluster import MiniBatchKMeans  # seconds to import, and the search only reads what this wrote

    outcome = common_outcomes(torch.cat(predictions).numpy(), settings.outcomes)
    result = []
    for block in progress(range(len(outputs)), "mutual information: codes"):
        points = F.normalize(torch.cat(outputs[block]), dim=1).numpy()
        clusters = min(settings.clusters, len(points))
        codes = MiniBatchKMeans(clusters, random_state=seed, n_init=1, batch_size=2048).fit_predict(points)
        result.append(discrete_mutual_information(codes, outcome))
    return result


def common_outcomes(values: np.ndarray, count: int) -> np.ndarray:
    """Number the ``count - 1`` most frequent values from 1 on; all others become 0."""
    names, frequency = np.unique(values, return_counts=True)
    kept = names[np.argsort(-frequency, kind="stable")[: count - 1]]
    numbers = {name: number for number, name in enumerate(kept, 1)}
    return np.array([numbers.get(value, 0) for value in values])


def discrete_mutual_information(x: np.ndarray, y: np.ndarray) -> float:
    """Estimate I(X; Y) in nats from paired samples (eq. 7).

    The plug-in estimate is biased upwards; Miller and Madow's correction of each entropy, (cells - 1) / 2N, takes off
    (cells_xy - cells_x - cells_y + 1) / 2N. Not below zero.

    Args:
        x: Codes, [N].
        y: Outcomes, [N].
    """
    _, x = np.unique(x, return_inverse=True)
    _, y = np.unique(y, return_inverse=True)
    joint = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(joint, (x, y), 1)
    total = joint.sum()
    p = joint / total
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    occupied = p > 0
    plug_in = float((p[occupied] * np.log(p[occupied] / independent[occupied])).sum())
    bias = (occupied.sum() - joint.shape[0] - joint.shape[1] + 1) / (2 * total)
    return max(plug_in - float(bias), 0.0)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at the labelled tokens of a calibration set.

    Attributes:
        wanted: Of each batch W'p of each prediction p, with W the head, [positions, hidden] in fp32.
        entropy: Sum of the predictions' entropies, in nats.
    """

    wanted: list[torch.Tensor]
    entropy: float

    def to(self, device: torch.device) -> Predictions:
        """Return the same on a device."""
        return Predictions([part.to(device) for part in self.wanted], self.entropy)


@torch.no_grad()
def predictions(model: nn.Module, calibration: Sequence[Batch]) -> Predictions:
    """Return what a model predicts at the labelled tokens."""
    wanted, entropy = [], 0.0
    for part in calibration:
        last = _states(model, part)
        wanted.append(mean_embedding(model, last))
        entropy += _cross_entropy(model, last, wanted[-1]).item()
    return Predictions(wanted, entropy)


def sensitivity(
    model: PreTrainedModel,
    calibration: Sequence[Batch],
    units: Sequence[Unit],
    bank: Bank,
    pruned: Predictions,
    dense: Predictions,
) -> tuple[dict[int, list[float]], tuple[float, float]]:
    """Return (what each unit alone gains by going from 4 bits to 8 and to 16, the divergences with all at 4 bits).

    The divergence is Kullback and Leibler's, of the predictions from those of the unquantized model: the rise of the
    loss that is to be expected, without the chance of which token came next. A gain is its fall to first order, the
    gradient with all units at 4 bits, where a search starts, along the change of the unit's weights: one pass back for
    all units. Raising each in turn costs a pass a unit and chooses no better (docs/log.md). All are in nats a token.

    The model's linears are left at 4 bits. What waits for its turn, changes of weights, waits in the CPU's memory.

    Args:
        model: The pruned model.
        calibration: Token batches.
        units: What one bit choice covers.
        bank: Its layer bank.
        pruned: What the model predicts itself; gains and the first divergence are of these.
        dense: What the model before pruning predicts; the second divergence is from these.
    """
    model.requires_grad_(False)
    names = [name for unit in units for name in unit.linears]
    weights = {name: weight_of(model, name) for name in names}
    changes: dict[str, dict[int, torch.Tensor]] = {}
    gains = {width: dict.fromkeys(names, 0.0) for width in WIDTHS[1:]}
    for name, weight in weights.items():
        four, eight = (quantize.dequantize(bank.codes(name, bits), weight.dtype) for bits in BITS)
        changes[name] = {8: eight - four, DENSE: weight.detach().to("cpu", copy=True) - four}
        weight.copy_(four)

    def take(name: str, weight: torch.Tensor) -> None:  # one weight's gradient exists at a time
        assert weight.grad is not None  # the hook runs after it was accumulated
        for width, change in changes[name].items():
            gains[width][name] -= (weight.grad.float() * change.to(weight.device).float()).sum().item()
        weight.grad = None

    handles = [
        weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(take, name))
        for name, weight in weights.items()
    ]
    from_pruned, from_dense = -pruned.entropy, -dense.entropy
    steps = zip(progress(calibration, "sensitivity"), pruned.wanted, dense.wanted, strict=True)
    for part, wanted, dense_wanted in steps:
        last = _states(model, part)
        from_dense += _cross_entropy(model, last.detach(), dense_wanted).item()
        value = _cross_entropy(model, last, wanted)
        value.backward()
        from_pruned += value.item()
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    count = sum(map(len, pruned.wanted))
    by_unit = {
        width: [sum(by_name[name] for name in unit.linears) / count for unit in units]
        for width, by_name in gains.items()
    }
    return by_unit, (from_pruned / count, from_dense / count)


def _states(model: nn.Module, part: Batch) -> torch.Tensor:
    """Return the model's last states at the positions that predict a labelled token, [positions, hidden]."""
    last = last_states(model, part.tokens)
    return last[:, :-1][part.labels[:, 1:] != IGNORED]


def _cross_entropy(model: nn.Module, last: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the sum over positions of the cross-entropy of predictions with the wanted ones.

    It is the divergence and a constant, the wanted ones' entropy. With p the wanted predictions, W the head and x a
    state it is log sum exp Wx - p'Wx, so of p it takes W'p alone, a vector of the hidden size.

    Args:
        model: Its head is read.
        last: States, [positions, hidden].
        wanted: W'p, [positions, hidden] in fp32.
    """
    likeliest = head_of(model)(last).float().logsumexp(-1)
    return (likeliest - (last.float() * wanted).sum(-1)).sum()
