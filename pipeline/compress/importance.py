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
from torch.nn import functional as F

from pipeline import architecture
from pipeline.architecture import Unit
from pipeline.compress.quantize import dequantize, quantize
from pipeline.console import progress
from pipeline.data.alpaca import IGNORED, Batch
from pipeline.params import Importance, Quantize


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
MEASURED = [*(one.name for one in fields(Priors)), "by gradient"]


def run(
    model: Any,
    calibration: Sequence[Batch],
    units: Sequence[Unit],
    settings: Importance,
    quantization: Quantize,
    seed: int,
) -> Priors:
    """Measure both importances.

    Args:
        model: The pruned model; its linears are left at 4 bits.
        calibration: Token batches; every labelled position counts.
        units: What one bit choice covers.
        settings: Section ``importance`` of the params.
        quantization: ``four_bit`` and ``double_quant`` are read.
        seed: Of k-means.
    """
    model.eval()
    calibration = [part.to(model.device) for part in calibration]
    by_block = mutual_information(model, calibration, settings, seed)
    gains, divergence = sensitivity(model, calibration, units, quantization)
    return Priors(
        units=tuple(unit.name for unit in units),
        mutual_information=tuple(by_block[unit.block] for unit in units),
        sensitivity=tuple(gains),
        divergence=divergence,
        tokens=sum(int((part.labels != IGNORED).sum()) for part in calibration),
    )


@torch.inference_mode()
def mutual_information(model: Any, calibration: Sequence[Batch], settings: Importance, seed: int) -> list[float]:
    """Return I(X; Y) of each block's output X and the model's prediction Y, in nats.

    X is the block's output at one token, coded by k-means; Y is the most likely next token, with the rare ones taken
    together. Plug-in estimate with the Miller-Madow correction (``discrete_mutual_information``).
    """
    outputs: list[list[torch.Tensor]] = [[] for _ in architecture.blocks(model)]
    predictions = []
    for part in progress(calibration, "mutual information: outputs"):
        real = part.labels != IGNORED
        with architecture.block_outputs(model) as found:
            last = model.model(input_ids=part.tokens, use_cache=False).last_hidden_state
        predictions.append(model.lm_head(last[real]).argmax(-1).cpu())
        for block, value in enumerate(found):
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
    model: Any, calibration: Sequence[Batch], units: Sequence[Unit], settings: Quantize
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
            wanted.append(_mean_embedding(model, last))
            entropy += _cross_entropy(model, last, wanted[-1]).item()
    names = [name for unit in units for name in unit.linears]
    weights = {name: model.get_submodule(name).weight for name in names}
    changes, gains = {}, dict.fromkeys(names, 0.0)
    for name, weight in weights.items():
        four, eight = (dequantize(quantize(weight, bits, settings), weight.dtype) for bits in (4, 8))
        changes[name] = (eight - four).cpu()
        weight.copy_(four)

    def take(name: str, weight: torch.Tensor) -> None:  # one weight's gradient exists at a time
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


def _states(model: Any, part: Batch) -> torch.Tensor:
    """Return the model's last states at the positions that predict a labelled token, [positions, hidden]."""
    last = model.model(input_ids=part.tokens, use_cache=False).last_hidden_state
    return last[:, :-1][part.labels[:, 1:] != IGNORED]


def _mean_embedding(model: Any, last: torch.Tensor) -> torch.Tensor:
    """Return what the head's rows, weighted by a model's predictions, add up to: [positions, hidden] in fp32.

    Args:
        model: Its head is read.
        last: The model's last states, [positions, hidden].
    """
    predicted = model.lm_head(last).float().softmax(-1).to(last.dtype)
    return (predicted @ model.lm_head.weight).float()


def _cross_entropy(model: Any, last: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the sum over positions of the cross-entropy of predictions with the wanted ones.

    It is the divergence and a constant, the wanted ones' entropy. With p the wanted predictions, W the head and x a
    state it is log sum exp Wx - p'Wx, so of p it takes W'p alone, a vector of the hidden size.

    Args:
        model: Its head is read.
        last: States, [positions, hidden].
        wanted: W'p, [positions, hidden] in fp32.
    """
    likeliest = model.lm_head(last).float().logsumexp(-1)
    return (likeliest - (last.float() * wanted).sum(-1)).sum()
