"""The optimal brain surgeon on coupled structures: what removing each costs after the rest was refitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.architecture import KINDS
from pipeline.compress.grams import Grams, typical_energy
from pipeline.compress.modules import Scores, token_losses, weight_of
from pipeline.compress.structures import Limits, prunable
from pipeline.console import progress
from pipeline.data.alpaca import IGNORED, Batch

_HEAD_FACTOR = 4.0
_ENERGY_BATCHES = 3  # batches that the gradient's energy is measured on: it varies far more by block than by row
_ENERGY_POWER = 0.7  # below 1: the error of an early block fades on its way
_DAMPING = 1e-2  # of ``typical_energy``, added to the diagonal while choosing


def surgeon(model: PreTrainedModel, calibration: Sequence[Batch], limits: Limits, grams: Grams) -> Scores:
    """Return what removing each structure costs after the rest was refitted to make up for it; infinite if it may not.

    The rise of a reading linear's squared output error (``surgeon_order``), times a power of the mean square of the
    loss's gradient at its block's output: the scale of the rise of the loss, so that blocks compare. Meant for
    ``compensate: true``. A head's error is multiplied by ``_HEAD_FACTOR``: what it moves to other tokens is felt beyond
    its own output.
    """
    energy = _energies(model, calibration[:: -(-len(calibration) // _ENERGY_BATCHES)])
    shapes = architecture.shapes(model.config)
    scores: Scores = []
    for index, block in enumerate(progress(grams, "importance (surgeon)")):
        costs, shape = {}, shapes[index]
        for kind in KINDS:
            if not prunable(model.config, limits, index, kind):
                costs[kind] = torch.full((architecture.group_count(shape, kind),), float("inf"))
                continue
            name = architecture.linear_name(index, architecture.reader(model.config, kind))
            weight = weight_of(model, name).detach()
            width = weight.shape[1] // architecture.group_count(shape, kind)
            factor = _HEAD_FACTOR if kind == "attention" else 1.0
            costs[kind] = (
                surgeon_order(weight, block[kind].to(weight.device), width)
                * energy[kind][index] ** _ENERGY_POWER
                * factor
            )
        scores.append(costs)
    return scores


def surgeon_order(weight: torch.Tensor, gram: torch.Tensor, width: int, chunk: int | None = None) -> torch.Tensor:
    """Remove structures one after another, cheapest first, refitting the rest each time; return the cost of each.

    The optimal brain surgeon on groups of columns: with H = X^T X (damped) and P its inverse, the least rise of
    ||X (W - W')^T||^2 when the columns S become zero is tr(W_S (P_SS)^-1 W_S^T), reached by
    W' = W - W_S (P_SS)^-1 P_S; afterwards P' = P - P_:S (P_SS)^-1 P_S:.

    Args:
        weight: W, [out, in].
        gram: X^T X, [in, in].
        width: Neighbouring columns of a structure.
        chunk: Structures removed at a time; None: a fiftieth of them.

    Returns:
        Cost of each structure at its turn, not below that of any before it, [in / width]; infinite for the last one.
    """
    count = gram.shape[0] // width
    chunk = max(count // 50, 1) if chunk is None else chunk
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(_DAMPING * typical_energy(damped))
    inverse, rest = torch.linalg.inv(damped).float(), weight.float().clone()
    device = gram.device
    alive = torch.ones(count, dtype=torch.bool, device=device)
    costs, highest = torch.full((count,), float("inf"), device=device), torch.zeros((), device=device)
    each = torch.arange(count, device=device)
    while int(alive.sum()) > 1:
        if width == 1:  # the same without a thousand matrices of one number
            now = rest.square().sum(0) / inverse.diagonal()
        else:
            diagonal = inverse.unflatten(1, (count, width)).unflatten(0, (count, width))[each, :, each, :].clone()
            diagonal[~alive] = torch.eye(width, device=device)
            columns = rest.unflatten(1, (count, width))
            now = torch.einsum("ogi,gij,ogj->g", columns, torch.linalg.inv(diagonal), columns)
        now[~alive] = float("inf")
        taken = now.topk(min(chunk, int(alive.sum()) - 1), largest=False).indices
        highest = torch.maximum(highest, now[taken].max())
        costs[taken] = highest
        gone = (taken[:, None] * width + torch.arange(width, device=device)).flatten()
        step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        rest.addmm_(rest[:, gone], step, alpha=-1)
        inverse.addmm_(inverse[:, gone], step, alpha=-1)
        alive[taken] = False
        rest[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0
    return costs


def _energies(model: PreTrainedModel, calibration: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Return ``gradient_energy`` where a kind's errors arise: at a block's output, or before a norm on the way."""
    if not architecture.description(model.config).norm_after:
        return dict.fromkeys(KINDS, gradient_energy(model, calibration))
    return {kind: gradient_energy(model, calibration, architecture.reader(model.config, kind)) for kind in KINDS}


def gradient_energy(model: PreTrainedModel, calibration: Sequence[Batch], linear: str | None = None) -> torch.Tensor:
    """Return the mean over tokens of ||dL/dh||^2 at each block's output h, L summed over tokens: [blocks].

    Args:
        model: The model.
        calibration: Token batches.
        linear: One of a block's linears, whose output is meant instead.
    """
    total, tokens = torch.zeros(len(architecture.blocks(model)), device=model.device), 0
    model.eval().requires_grad_(False)
    for part in progress(calibration, "gradient energy"):
        embedded = model.get_input_embeddings()(part.tokens).requires_grad_(True)
        with architecture.block_outputs(model, linear) as outputs:
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        value = token_losses(logits, part.labels).sum()
        total += torch.stack([gradient.float().square().sum() for gradient in torch.autograd.grad(value, outputs)])
        tokens += int((part.labels != IGNORED).sum())
    return total / tokens
