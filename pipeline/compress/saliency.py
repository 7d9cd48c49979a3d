"""What the loss misses least: the importance of every coupled structure (paper section 3.1, eq. 4-6).

First and second order as in the paper, the Fisher information of a mask, activations, and the optimal brain surgeon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.architecture import KINDS
from pipeline.compress.grams import Grams, input_grams, reading
from pipeline.compress.modules import Scores, row_losses, weight_of
from pipeline.compress.structures import PruneError, Settings
from pipeline.compress.surgeon import surgeon
from pipeline.console import progress
from pipeline.data.alpaca import Batch

Tensors = dict[str, torch.Tensor]


def importance(
    model: PreTrainedModel, calibration: Sequence[Batch], settings: Settings, seed: int = 0, grams: Grams | None = None
) -> Scores:
    """Return the score of every coupled structure of a model, by the chosen measure, in the CPU's memory.

    Args:
        model: The model. Gradients of its parameters are used and cleared; ``order_experts`` changes it.
        calibration: Token batches, on the model's device.
        settings: The measure, ``level`` and ``aggregate`` are read, and for the surgeon what may go.
        seed: For random importance.
        grams: As ``input_grams`` returns them, if they are at hand.

    Raises:
        PruneError: A score is not a number.
    """
    scores = [
        {kind: values.cpu() for kind, values in block.items()}
        for block in _importance(model, calibration, settings, seed, grams)
    ]
    for index, block in enumerate(scores):
        for kind, values in block.items():
            if values.isnan().any():
                raise PruneError(
                    f"block {index}: the {settings.importance} scores of its {kind} structures are not numbers; the "
                    "model's activations or gradients are not finite: check its weights, or compute in another type "
                    "(dtype)"
                )
    return scores


def _importance(
    model: PreTrainedModel, calibration: Sequence[Batch], settings: Settings, seed: int, grams: Grams | None
) -> Scores:
    kind = settings.importance
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                # Selection divides by the parameters of a structure, which here must not tell.
                name: torch.rand(architecture.group_count(shape, name), generator=generator)
                * architecture.group_parameters(model.config, shape, name)
                for name in KINDS
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
    scores = weight_scores(model, first, second, kind)
    order_experts(model, scores, settings.level)
    return structure_scores(model, scores, settings.level, settings.aggregate)


def gradients(model: PreTrainedModel, calibration: Sequence[Batch], kind: str) -> tuple[Tensors, Tensors]:
    """Return each linear's mean gradient and mean squared gradient over the rows, as the measure needs them.

    The diagonal of the Hessian in eq. 6 is replaced by the diagonal of the empirical Fisher information, the mean over
    rows of the squared gradient of a row's mean loss. Both are kept in the CPU's memory: they are several times the
    model.
    """
    first: Tensors = {}
    second: Tensors = {}
    if kind == "magnitude":
        return first, second
    names = list(architecture.linears(model.config))
    squares = kind in ("taylor2", "taylor_mix")
    rows = [
        Batch(part.tokens[i : i + 1], part.labels[i : i + 1]) for part in calibration for i in range(len(part.tokens))
    ]
    parts = rows if squares else list(calibration)
    model.eval().requires_grad_(False)
    weights = {name: weight_of(model, name).requires_grad_(True) for name in names}
    for part in progress(parts, f"importance ({kind})"):
        loss(model, part).backward()
        share = len(part.tokens) / len(rows)
        for name, weight in weights.items():
            # None: an expert that none of these tokens was sent to.
            gradient = torch.zeros_like(weight, device="cpu") if weight.grad is None else weight.grad.cpu()
            gradient = gradient.float()
            if kind != "taylor2":
                first[name] = first.get(name, 0) + share * gradient
            if squares:
                second[name] = second.get(name, 0) + share * gradient.square()
            weight.grad = None
    model.requires_grad_(False)
    return first, second


def loss(model: PreTrainedModel, part: Batch) -> torch.Tensor:
    """Return the mean over rows of the mean next-token loss of a row, in nats."""
    return row_losses(model(input_ids=part.tokens, use_cache=False).logits, part.labels).mean()


def weight_scores(model: PreTrainedModel, first: Tensors, second: Tensors, kind: str) -> Tensors:
    """Return the signed score of every weight.

    ``taylor1`` is the first term of eq. 6 (Element1), ``taylor2`` its second term without the factor (Element2),
    ``taylor_mix`` both: g w, w^2 F and g w - w^2 F / 2.
    """
    scores = {}
    for name in architecture.linears(model.config):
        weight = weight_of(model, name).detach().cpu().float()
        if kind == "magnitude":
            scores[name] = weight
        elif kind == "taylor1":
            scores[name] = weight * first[name]
        elif kind == "taylor2":
            scores[name] = weight.square() * second[name]
        else:
            scores[name] = weight * first[name] - weight.square() * second[name] / 2
    return scores


@torch.no_grad()
def order_experts(model: PreTrainedModel, scores: Tensors, level: str) -> None:
    """Put each expert's channels in the order of their scores, so that one leaves each expert that can best spare it.

    A structure is the channel of one number in every expert of a block. In which order an expert has its channels does
    not change what it computes. Changes the model and the scores; without experts neither.

    Args:
        model: The model.
        scores: As for ``structure_scores``.
        level: As for ``structure_scores``.
    """
    if not architecture.experts(model.config):
        return
    for index in range(model.config.num_hidden_layers):
        for names in architecture.mlps(model.config):
            *readers, writer = [architecture.linear_name(index, name) for name in names]
            order = sum(
                [_vectors(scores[name], 0, level) for name in readers], start=_vectors(scores[writer], 1, level)
            ).argsort(descending=True, stable=True)
            for name, dim in (*((name, 0) for name in readers), (writer, 1)):
                weight = weight_of(model, name)
                scores[name] = scores[name].index_select(dim, order)  # first: a score may be the weight itself
                weight.copy_(weight.index_select(dim, order.to(weight.device)))


def _vectors(weights: torch.Tensor, dim: int, level: str) -> torch.Tensor:
    """Return the score of each row (``dim`` 0) or column (1) of a matrix of weights' scores."""
    return weights.abs().sum(1 - dim) if level == "parameter" else weights.sum(1 - dim).abs()


def structure_scores(model: PreTrainedModel, scores: Tensors, level: str, aggregate: str) -> Scores:
    """Sum the scores of weights to the score of each coupled structure.

    Args:
        model: The model.
        scores: Signed scores of every linear's weights, [out, in].
        level: ``parameter`` sums absolute values; ``vector`` takes the absolute value of a row's or column's sum.
        aggregate: How the members of a group (one for each coupled linear) become one score.
    """
    summed: Scores = []
    for index, shape in enumerate(architecture.shapes(model.config)):
        block = {}
        for kind in KINDS:
            by_member = []
            for member in architecture.members(model.config, shape, kind):
                weights = scores[architecture.linear_name(index, member.linear)]
                weights = weights.narrow(member.dim, member.start, member.size)
                vectors = _vectors(weights, member.dim, level)
                by_member.append(vectors.unflatten(0, (-1, member.width)).sum(1))
            block[kind] = aggregated(torch.stack(by_member), aggregate)
        summed.append(block)
    return summed


def aggregated(members: torch.Tensor, how: str) -> torch.Tensor:
    """Reduce the members of each group, [members, groups], to one score each, [groups]."""
    if how == "prod":
        # The geometric mean does not underflow; it orders structures of a kind as the product does, and makes those of
        # kinds with other numbers of members comparable.
        return members.clamp(min=1e-30).log().mean(0).exp()
    return {"sum": members.sum(0), "mean": members.mean(0), "max": members.amax(0), "last": members[-1]}[how]


def fisher_mask(model: PreTrainedModel, calibration: Sequence[Batch]) -> Scores:
    """Return the loss that removing each structure is expected to cost, from gradients of a mask of ones.

    With a mask m on what a structure hands to the linear that reads it, L(m = 0) - L(m = 1) is to second order
    F / 2, F being the mean over rows of (dL/dm)^2; the mean of dL/dm itself is near zero at a minimum.
    """
    squares = [
        {kind: torch.zeros(architecture.group_count(shape, kind), device=model.device) for kind in KINDS}
        for shape in architecture.shapes(model.config)
    ]
    model.eval().requires_grad_(False)
    rows = sum(len(part.tokens) for part in calibration)
    for part in progress(calibration, "importance (fisher_mask)"):
        with reading(model, lambda value: value.requires_grad_(True)) as seen:
            embedded = model.get_input_embeddings()(part.tokens).requires_grad_(True)
            per_row = row_losses(model(inputs_embeds=embedded, use_cache=False).logits, part.labels)
            gradients_ = torch.autograd.grad(per_row.sum(), list(seen.values()))
        for ((block, kind), value), gradient in zip(seen.items(), gradients_, strict=True):
            change = (value.detach() * gradient).float().sum(1)  # [B, inputs]
            squares[block][kind] += _by_structure(change, squares[block][kind].numel()).square().sum(0) / rows
    return squares


def activation(model: PreTrainedModel, grams: Grams) -> Scores:
    """Return the share of the residual stream's energy that each structure writes into it.

    The mean square of what the reading linear adds because of the structure, over that of its block's output; over that
    of all that the linear adds, where a norm scales it on its way there.
    """
    scaled = architecture.description(model.config).norm_after
    shares: Scores = []
    for index, block in enumerate(grams):
        scores = {}
        for kind, gram in block.items():
            if kind == "output":
                continue
            name = architecture.linear_name(index, architecture.reader(model.config, kind))
            reader = weight_of(model, name).detach().float()
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
            written = torch.einsum("oi,ij,oj->", reader, gram, reader) if scaled else block["output"].to(reader.device)
            scores[kind] = energy / written
        shares.append(scores)
    return shares


def _by_structure(values: torch.Tensor, count: int) -> torch.Tensor:
    """Sum [B, inputs] over the inputs of each structure: [B, count]. Inputs of a structure are neighbours."""
    return values.unflatten(1, (count, -1)).sum(2)
