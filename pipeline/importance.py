"""Stage ``importance``: which units need their bits: mutual information (eq. 7) and quantization sensitivity.

Reads ``artifacts/pruned`` and Alpaca rows. Writes ``reports/importance.json`` and ``reports/importance.png``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline import architecture
from pipeline.alpaca import IGNORED, Batch
from pipeline.architecture import Unit
from pipeline.console import progress
from pipeline.params import Importance, Quantize
from pipeline.quantize import dequantize, quantize


@dataclass(frozen=True)
class Priors:
    """What is known of the units before any trial.

    Attributes:
        units: Names of the units.
        mutual_information: Of each unit's block with the prediction, in nats.
        sensitivity: Rise of the loss, in nats a token, when the unit alone goes from 8 to 4 bits.
        loss: Loss with every unit at 8 bits.
        tokens: Positions that the figures come from.
    """

    units: tuple[str, ...]
    mutual_information: tuple[float, ...]
    sensitivity: tuple[float, ...]
    loss: float
    tokens: int

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Priors:
        """Return the priors from what JSON made of them."""
        return Priors(
            units=tuple(values["units"]),
            mutual_information=tuple(values["mutual_information"]),
            sensitivity=tuple(values["sensitivity"]),
            loss=values["loss"],
            tokens=values["tokens"],
        )


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
        model: The pruned model; its linears are left at 8 bits.
        calibration: Token batches; every labelled position counts.
        units: What one bit choice covers.
        settings: Section ``importance`` of the params.
        quantization: ``four_bit`` and ``double_quant`` are read.
        seed: Of k-means.
    """
    model.eval()
    calibration = [part.to(model.device) for part in calibration]
    by_block = mutual_information(model, calibration, settings, seed)
    rises, loss = sensitivity(model, calibration, units, quantization)
    return Priors(
        units=tuple(unit.name for unit in units),
        mutual_information=tuple(by_block[unit.block] for unit in units),
        sensitivity=tuple(rises),
        loss=loss,
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


@torch.inference_mode()
def sensitivity(
    model: Any, calibration: Sequence[Batch], units: Sequence[Unit], settings: Quantize
) -> tuple[list[float], float]:
    """Return (rise of the loss for each unit that alone goes from 8 to 4 bits, the loss with all at 8).

    The states that enter a block do not depend on what comes after, so each unit's pass starts at its own block.
    The model's linears are left at 8 bits. What waits for its turn, weights and states, waits in the CPU's memory.
    """
    weights = {name: model.get_submodule(name).weight for unit in units for name in unit.linears}
    dense = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
    for weight in weights.values():
        weight.copy_(dequantize(quantize(weight, 8, settings), weight.dtype))
    entering: list[list[torch.Tensor]] = []
    base = 0.0
    for part in calibration:
        found = model.model(input_ids=part.tokens, use_cache=False, output_hidden_states=True)
        entering.append([states.cpu() for states in found.hidden_states[:-1]])
        base += _loss_sum(model, found.last_hidden_state, part)
    count = sum(int((part.labels[:, 1:] != IGNORED).sum()) for part in calibration)
    rises = []
    for unit in progress(list(units), "sensitivity"):
        eight = {name: weights[name].clone() for name in unit.linears}
        for name in unit.linears:
            weights[name].copy_(dequantize(quantize(dense[name].to(model.device), 4, settings), weights[name].dtype))
        total = sum(
            _loss_sum(model, architecture.forward_from(model, unit.block, states[unit.block].to(model.device)), part)
            for states, part in zip(entering, calibration, strict=True)
        )
        for name in unit.linears:
            weights[name].copy_(eight[name])
        rises.append((total - base) / count)
    return rises, base / count


def _loss_sum(model: Any, hidden: torch.Tensor, part: Batch) -> float:
    chosen = part.labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][chosen]).float()
    return F.cross_entropy(logits, part.labels[:, 1:][chosen], reduction="sum").item()
