"""What the loss misses least: the importance of every coupled structure (paper section 3.1, eq. 4-6).

First and second order as in the paper, the Fisher information of a mask, activations, and the optimal brain surgeon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline import architecture, fits
from pipeline.architecture import ATTENTION, COUPLED, MLP
from pipeline.console import progress
from pipeline.data.alpaca import IGNORED, Batch
from pipeline.params import Prune

Scores = list[dict[str, torch.Tensor]]  # of each block: structure kind -> score of each structure
Grams = list[dict[str, torch.Tensor]]  # of each block: X^T X of what reads each kind, and the energy of its output
READER = {"attention": ATTENTION[3], "mlp": MLP[2]}  # the linear that reads a kind's structures
_HEAD_FACTOR = 4.0
_BLOCKS_AT_ONCE = 8  # whose Gram matrices a GPU holds; a pass over the text for each such lot
_TILE = 256  # columns of a Gram matrix computed at a time, from the diagonal on: the other half is the same
_ENERGY_BATCHES = 3  # batches that the gradient's energy is measured on: it varies far more by block than by row
_ENERGY_POWER = 0.7  # below 1: the error of an early block fades on its way
# Of the median of the Gram matrix's diagonal, added to it: the mean may be that of one massive activation.
_DAMPING = 1e-2  # while choosing


def importance(
    model: Any, calibration: Sequence[Batch], settings: Prune, seed: int = 0, grams: Grams | None = None
) -> Scores:
    """Return the score of every coupled structure of a model, by the chosen measure, in the CPU's memory.

    Args:
        model: The model. Gradients of its parameters are used and cleared.
        calibration: Token batches, on the model's device.
        settings: ``importance``, ``level`` and ``aggregate`` are read.
        seed: For random importance.
        grams: As ``input_grams`` returns them, if they are at hand.
    """
    scores = _importance(model, calibration, settings, seed, grams)
    return [{kind: values.cpu() for kind, values in block.items()} for block in scores]


def _importance(model: Any, calibration: Sequence[Batch], settings: Prune, seed: int, grams: Grams | None) -> Scores:
    kind = settings.importance
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                # Selection divides by the parameters of a structure, which here must not tell.
                name: torch.rand(architecture.group_count(shape, name), generator=generator)
                * architecture.group_parameters(model.config, shape, name)
                for name in COUPLED
            }
            for shape in architecture.shapes(model.config)
        ]
    if kind == "fisher_mask":
        return fisher_mask(model, calibration)
    if kind == "activation":
        return activation(model, grams or input_grams(model, calibration))
    if kind == "surgeon":
        return surgeon(model, calibration, settings, grams or input_grams(model, calibration))
    first, second = gradients(model, calibration, kind)
    return structure_scores(model, weight_scores(model, first, second, kind), settings.level, settings.aggregate)


def gradients(
    model: Any, calibration: Sequence[Batch], kind: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return each linear's mean gradient and mean squared gradient over the rows, as the measure needs them.

    The diagonal of the Hessian in eq. 6 is replaced by the diagonal of the empirical Fisher information, the mean over
    rows of the squared gradient of a row's mean loss. Both are kept in the CPU's memory: they are several times the
    model.
    """
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}
    if kind == "magnitude":
        return first, second
    names = list(architecture.linears(model.config))
    squares = kind in ("taylor2", "taylor_mix")
    rows = [Batch(one.tokens[i : i + 1], one.labels[i : i + 1]) for one in calibration for i in range(len(one.tokens))]
    parts = rows if squares else list(calibration)
    model.eval().requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    for part in progress(parts, f"importance ({kind})"):
        loss(model, part).backward()
        share = len(part.tokens) / len(rows)
        for name, weight in weights.items():
            gradient = weight.grad.cpu().float()
            if kind != "taylor2":
                first[name] = first.get(name, 0) + share * gradient
            if squares:
                second[name] = second.get(name, 0) + share * gradient.square()
            weight.grad = None
    model.requires_grad_(False)
    return first, second


def loss(model: Any, part: Batch) -> torch.Tensor:
    """Return the mean over rows of the mean next-token loss of a row, in nats."""
    return _row_losses(model(input_ids=part.tokens, use_cache=False).logits, part.labels).mean()


def weight_scores(
    model: Any, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], kind: str
) -> dict[str, torch.Tensor]:
    """Return the signed score of every weight.

    ``taylor1`` is the first term of eq. 6 (Element1), ``taylor2`` its second term without the factor (Element2),
    ``taylor_mix`` both: g w, w^2 F and g w - w^2 F / 2.
    """
    scores = {}
    for name in architecture.linears(model.config):
        weight = model.get_submodule(name).weight.detach().cpu().float()
        if kind == "magnitude":
            scores[name] = weight
        elif kind == "taylor1":
            scores[name] = weight * first[name]
        elif kind == "taylor2":
            scores[name] = weight.square() * second[name]
        else:
            scores[name] = weight * first[name] - weight.square() * second[name] / 2
    return scores


def structure_scores(model: Any, scores: dict[str, torch.Tensor], level: str, aggregate: str) -> Scores:
    """Sum the scores of weights to the score of each coupled structure.

    Args:
        model: The model.
        scores: Signed scores of every linear's weights, [out, in].
        level: ``parameter`` sums absolute values; ``vector`` takes the absolute value of a row's or column's sum.
        aggregate: How the members of a group (one for each coupled linear) become one score.
    """
    found: Scores = []
    for index, shape in enumerate(architecture.shapes(model.config)):
        block = {}
        for kind, members in COUPLED.items():
            every = []
            for name, side in members:
                weights = scores[architecture.linear_name(index, name)]
                dim = 1 if side == "out" else 0
                vectors = weights.abs().sum(dim) if level == "parameter" else weights.sum(dim).abs()
                width = architecture.group_width(model.config, shape, name)
                every.append(vectors.unflatten(0, (-1, width)).sum(1))
            block[kind] = aggregated(torch.stack(every), aggregate)
        found.append(block)
    return found


def aggregated(members: torch.Tensor, how: str) -> torch.Tensor:
    """Reduce the members of each group, [members, groups], to one score each, [groups]."""
    if how == "prod":
        # The geometric mean does not underflow; it orders structures of a kind as the product does, and makes those of
        # kinds with other numbers of members comparable.
        return members.clamp(min=1e-30).log().mean(0).exp()
    return {"sum": members.sum(0), "mean": members.mean(0), "max": members.amax(0), "last": members[-1]}[how]


def fisher_mask(model: Any, calibration: Sequence[Batch]) -> Scores:
    """Return the loss that removing each structure is expected to cost, from gradients of a mask of ones.

    With a mask m on what a structure hands to the linear that reads it, L(m = 0) - L(m = 1) is to second order
    F / 2, F being the mean over rows of (dL/dm)^2; the mean of dL/dm itself is near zero at a minimum.
    """
    squares = [
        {kind: torch.zeros(architecture.group_count(shape, kind), device=model.device) for kind in COUPLED}
        for shape in architecture.shapes(model.config)
    ]
    model.eval().requires_grad_(False)
    rows = sum(len(part.tokens) for part in calibration)
    for part in progress(calibration, "importance (fisher_mask)"):
        with _reading(model, lambda value: value.requires_grad_(True)) as seen:
            embedded = model.get_input_embeddings()(part.tokens).requires_grad_(True)
            per_row = _row_losses(model(inputs_embeds=embedded, use_cache=False).logits, part.labels)
            gradients_ = torch.autograd.grad(per_row.sum(), list(seen.values()))
        for ((block, kind), value), gradient in zip(seen.items(), gradients_, strict=True):
            change = (value.detach() * gradient).float().sum(1)  # [B, inputs]
            squares[block][kind] += _by_structure(change, squares[block][kind].numel()).square().sum(0) / rows
    return squares


def activation(model: Any, grams: Grams) -> Scores:
    """Return the share of the residual stream's energy that each structure writes into it.

    The mean square of what the reading linear adds because of the structure, over that of its block's output.
    """
    found: Scores = []
    for index, block in enumerate(grams):
        scores = {}
        for kind, gram in block.items():
            if kind == "output":
                continue
            reader = model.get_submodule(architecture.linear_name(index, READER[kind])).weight.detach().float()
            count = architecture.group_count(architecture.shapes(model.config)[index], kind)
            width, gram = gram.shape[0] // count, gram.to(reader.device)
            energy = (
                torch.stack(
                    [
                        torch.einsum("oi,ij,oj->", reader[:, here], gram[here, here], reader[:, here])
                        for here in (slice(start, start + width) for start in range(0, gram.shape[0], width))
                    ]
                )
                if width > 1
                else gram.diagonal() * reader.square().sum(0)
            )
            scores[kind] = energy / block["output"].to(reader.device)
        found.append(scores)
    return found


def surgeon(model: Any, calibration: Sequence[Batch], settings: Prune, grams: Grams) -> Scores:
    """Return what removing each structure costs after the rest was refitted to make up for it; infinite if it may not.

    The rise of a reading linear's squared output error (``surgeon_order``), times a power of the mean square of the
    loss's gradient at its block's output: the scale of the rise of the loss, so that blocks compare. Meant for
    ``compensate: true``. A head's error is multiplied by ``_HEAD_FACTOR``: what it moves to other tokens is felt beyond
    its own output.
    """
    energy = gradient_energy(model, calibration[:: -(-len(calibration) // _ENERGY_BATCHES)])
    shapes = architecture.shapes(model.config)
    found: Scores = []
    for index, block in enumerate(progress(grams, "importance (surgeon)")):
        scores, shape = {}, shapes[index]
        for kind, name in READER.items():
            if not fits.prunable(model.config, settings, index, kind):
                scores[kind] = torch.full((architecture.group_count(shape, kind),), float("inf"))
                continue
            weight = model.get_submodule(architecture.linear_name(index, name)).weight.detach()
            width = architecture.group_width(model.config, shape, name)
            factor = _HEAD_FACTOR if kind == "attention" else 1.0
            scores[kind] = (
                surgeon_order(weight, block[kind].to(weight.device), width) * energy[index] ** _ENERGY_POWER * factor
            )
        found.append(scores)
    return found


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
    damped.diagonal().add_(_DAMPING * damped.diagonal().median())
    inverse, rest = torch.linalg.inv(damped).float(), weight.float().clone()
    device = gram.device
    alive = torch.ones(count, dtype=torch.bool, device=device)
    costs, highest = torch.full((count,), float("inf"), device=device), torch.zeros((), device=device)
    each = torch.arange(count, device=device)
    while int(alive.sum()) > 1:
        if width == 1:  # the same without a thousand matrices of one number
            now = rest.square().sum(0) / inverse.diagonal()
        else:
            own = inverse.unflatten(1, (count, width)).unflatten(0, (count, width))[each, :, each, :].clone()
            own[~alive] = torch.eye(width, device=device)
            columns = rest.unflatten(1, (count, width))
            now = torch.einsum("ogi,gij,ogj->g", columns, torch.linalg.inv(own), columns)
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


def gradient_energy(model: Any, calibration: Sequence[Batch]) -> torch.Tensor:
    """Return the mean over tokens of ||dL/dh||^2 at each block's output h, L summed over tokens: [blocks]."""
    total, tokens = torch.zeros(len(architecture.blocks(model)), device=model.device), 0
    model.eval().requires_grad_(False)
    for part in progress(calibration, "gradient energy"):
        embedded = model.get_input_embeddings()(part.tokens).requires_grad_(True)
        with architecture.block_outputs(model) as outputs:
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        value = token_losses(logits, part.labels).sum()
        total += torch.stack([gradient.float().square().sum() for gradient in torch.autograd.grad(value, outputs)])
        tokens += int((part.labels != IGNORED).sum())
    return total / tokens


def input_grams(model: Any, calibration: Sequence[Batch]) -> Grams:
    """Return, for each block, X^T X of the inputs X of the reading linears, and the energy of the block's output.

    Padding is left out. Divided by the number of tokens. They are kept in the CPU's memory: those of a large model are
    more than the model, so a GPU holds them for a few blocks at a time.
    """
    model.eval()
    count = model.config.num_hidden_layers
    at_once = count if model.device.type == "cpu" else _BLOCKS_AT_ONCE
    found: Grams = []
    for first in range(0, count, at_once):
        found += _grams_of(model, calibration, range(first, min(first + at_once, count)))
    return found


@torch.no_grad()
def _grams_of(model: Any, calibration: Sequence[Batch], blocks: range) -> Grams:
    halves: dict[tuple[int, str], torch.Tensor] = {}
    energy = torch.zeros(len(blocks), device=model.device)
    total = 0
    for part in progress(calibration, f"activations, blocks {blocks[0]} to {blocks[-1]}"):
        real = part.labels != IGNORED
        real[:, 0] = True
        total += int(real.sum())
        with _reading(model, lambda value: value) as seen, architecture.block_outputs(model) as outputs:
            model.model(input_ids=part.tokens, use_cache=False)
        for place, block in enumerate(blocks):
            energy[place] += outputs[block][real].float().square().sum()
            for kind in READER:
                inputs = seen[block, kind][real].float()
                width = inputs.shape[1]
                half = halves.setdefault((block, kind), torch.zeros(width, width, device=model.device))
                for start in range(0, width, _TILE):
                    here = slice(start, start + _TILE)
                    half[here, start:].addmm_(inputs[:, here].T, inputs[:, start:])
    return [
        {kind: _whole(halves[block, kind] / total).cpu() for kind in READER} | {"output": (energy[place] / total).cpu()}
        for place, block in enumerate(blocks)
    ]


def _whole(half: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrix whose upper half is given."""
    return half.triu() + half.triu(1).T


@contextmanager
def _reading(
    model: Any, through: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """Collect what the reading linears of every block receive: (block, kind) -> [B, L, inputs]."""
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def hook(place: tuple[int, str], _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen[place] = through(inputs[0]) if inputs[0].is_leaf else inputs[0]
        return (seen[place],)

    places = [(block, kind) for block in range(model.config.num_hidden_layers) for kind in READER]
    with ExitStack() as hooks:
        for block, kind in places:
            linear = model.get_submodule(architecture.linear_name(block, READER[kind]))
            handle = linear.register_forward_pre_hook(partial(hook, (block, kind)))
            hooks.callback(handle.remove)
        yield seen


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each next token, zero where it is not labelled: [B, T - 1]."""
    # Flat, as the sum over the vocabulary is several times slower on a CPU where that is not the last dimension.
    each = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(len(labels), -1)


def _row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each row's labelled tokens: [B]."""
    return token_losses(logits, labels).sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)


def _by_structure(values: torch.Tensor, count: int) -> torch.Tensor:
    """Sum [B, inputs] over the inputs of each structure: [B, count]. Inputs of a structure are neighbours."""
    return values.unflatten(1, (count, -1)).sum(2)
