"""Stage ``importance``: which units need their bits: mutual information (eq. 7) and quantization sensitivity.

Reads ``artifacts/pruned`` and Alpaca rows. Writes ``reports/importance.json`` and ``reports/importance.png``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.architecture import Unit
from pipeline.compress import quantize
from pipeline.compress.layer_bank import BITS, Bank
from pipeline.compress.modules import head_of, last_states, mean_embedding, weight_of
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


@dataclass(frozen=True)
class Priors:
    """What is known of the units before any trial.

    Attributes:
        units: Names of the units.
        mutual_information: Of each unit's block with the prediction, in nats.
        sensitivity: Fall of the divergence, in nats a token and to first order, when the unit goes from 4 to 8 bits.
        divergence: Of the predictions with every unit at 4 bits from those of the unquantized model.
        tokens: Positions that the figures come from.
    """

    units: tuple[str, ...]
    mutual_information: tuple[float, ...]
    sensitivity: tuple[float, ...]
    divergence: float
    tokens: int

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Priors:
        """Return the priors from what JSON made of them."""
        return Priors(
            units=tuple(values["units"]),
            mutual_information=tuple(values["mutual_information"]),
            sensitivity=tuple(values["sensitivity"]),
            divergence=values["divergence"],
            tokens=values["tokens"],
        )


# Part of what names kept priors: a version that measures something else, or otherwise, measures anew.
MEASURED = [*(figure.name for figure in fields(Priors)), "by gradient", "of the bank"]


def run(
    model: PreTrainedModel,
    calibration: Sequence[Batch],
    units: Sequence[Unit],
    settings: Settings,
    bank: Bank,
    seed: int,
) -> Priors:
    """Measure both importances.

    Args:
        model: The pruned model; its linears are left at 4 bits.
        calibration: Token batches; every labelled position counts.
        units: What one bit choice covers.
        settings: How mutual information is estimated.
        bank: Its layer bank; the codes are read.
        seed: Of k-means.
    """
    model.eval()
    calibration = [part.to(model.device) for part in calibration]
    by_block = mutual_information(model, calibration, settings, seed)
    gains, divergence = sensitivity(model, calibration, units, bank)
    return Priors(
        units=tuple(unit.name for unit in units),
        mutual_information=tuple(by_block[unit.block] for unit in units),
        sensitivity=tuple(gains),
        divergence=divergence,
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


def sensitivity(
    model: PreTrainedModel, calibration: Sequence[Batch], units: Sequence[Unit], bank: Bank
) -> tuple[list[float], float]:
    """Return (what each unit alone gains by going from 4 to 8 bits, the divergence with all at 4 bits), nats a token.

    The divergence is Kullback and Leibler's, of the predictions from those of the unquantized model: the rise of the
    loss that is to be expected, without the chance of which token came next. A gain is its fall to first order, the
    gradient with all units at 4 bits, where a search starts, along the change of the unit's weights: one pass back for
    all units. Raising each in turn costs a pass a unit and chooses no better (docs/log.md).

    The model's linears are left at 4 bits. What waits for its turn, changes of weights, waits in the CPU's memory.
    """
    model.requires_grad_(False)
    wanted, entropy = [], 0.0
    with torch.no_grad():
        for part in calibration:
            last = _states(model, part)
            wanted.append(mean_embedding(model, last))
            entropy += _cross_entropy(model, last, wanted[-1]).item()
    names = [name for unit in units for name in unit.linears]
    weights = {name: weight_of(model, name) for name in names}
    changes: dict[str, torch.Tensor] = {}
    gains = dict.fromkeys(names, 0.0)
    for name, weight in weights.items():
        four, eight = (quantize.dequantize(bank.codes(name, bits), weight.dtype) for bits in BITS)
        changes[name] = eight - four
        weight.copy_(four)

    def take(name: str, weight: torch.Tensor) -> None:  # one weight's gradient exists at a time
        assert weight.grad is not None  # the hook runs after it was accumulated
        change = changes[name].to(weight.device)
        gains[name] -= (weight.grad.float() * change.float()).sum().item()
        weight.grad = None

    handles = [
        weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(take, name))
        for name, weight in weights.items()
    ]
    base = 0.0
    for part, target in zip(progress(calibration, "sensitivity"), wanted, strict=True):
        value = _cross_entropy(model, _states(model, part), target)
        value.backward()
        base += value.item()
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    count = sum(map(len, wanted))
    return [sum(gains[name] for name in unit.linears) / count for unit in units], (base - entropy) / count


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
