"""Stage ``prune``: remove the coupled structures that the loss misses least (paper section 3.1, eq. 4-6).

Reads ``artifacts/base`` and Alpaca rows for calibration. Writes ``artifacts/pruned``, a ``pruned_*`` checkpoint that
``from_pretrained`` loads. A structure is one key/value head with its query heads, or one MLP channel; removing it
removes every row and column that is coupled with it (``architecture.members``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pipeline import architecture, checkpoint
from pipeline.architecture import KINDS, BlockShape
from pipeline.compress import saliency, uniform
from pipeline.compress.grams import Grams, input_grams, typical_energy
from pipeline.compress.modules import Keep, Scores
from pipeline.compress.structures import (
    PruneError,
    Settings,
    block_range,
    experts_fault,
    fitted,
    kept,
    prunable,
    spared,
)
from pipeline.compress.structures import ratio as ratio_fault
from pipeline.data.alpaca import Batch
from pipeline.data.calibration import noised

_REFIT_DAMPING = 1.0  # of ``typical_energy``; more than the surgeon adds, as the fit has to hold on other text


@dataclass(frozen=True)
class Pruned:
    """Result of pruning.

    Attributes:
        config: Config of the smaller model.
        state: Its tensors.
        parameters: Parameters before and after.
        kept: Of each block, the structures that stayed, in the numbering of the original model; channels of experts in
            the order that scoring put them in.
    """

    config: PretrainedConfig
    state: dict[str, torch.Tensor]
    parameters: tuple[int, int]
    kept: Keep

    @property
    def ratio(self) -> float:
        """Fraction of the parameters that was removed."""
        return 1 - self.parameters[1] / self.parameters[0]


def run(model: PreTrainedModel, calibration: Sequence[Batch], settings: Settings, seed: int) -> Pruned:
    """Prune a model to the settings' ratio.

    Args:
        model: The model; left as it is except for gradients, and for the order of channels within experts.
        calibration: Token batches with every position labelled.
        settings: How it is pruned.
        seed: For random importance and noise.

    Raises:
        PruneError: The settings do not fit this model, or its weights are not finite.
    """
    return next(at_ratios(model, calibration, settings, [settings.ratio], seed))


def at_ratios(
    dense: PreTrainedModel, calibration: Sequence[Batch], settings: Settings, ratios: Sequence[float], seed: int
) -> Iterator[Pruned]:
    """Prune a model to each of several ratios as ``run`` does; the dense model is scored once for all."""
    before = architecture.parameters(dense.config)
    whole: Keep = [
        {kind: torch.arange(architecture.group_count(shape, kind)) for kind in KINDS}
        for shape in architecture.shapes(dense.config)
    ]
    for ratio in ratios:
        check(dense.config, replace(settings, ratio=ratio))
    check_finite(dense)
    first = scored(dense, calibration, settings, seed) if any(ratios) else ([], None)
    for ratio in ratios:
        if not ratio:
            yield Pruned(*remove(dense, whole), (before, before), whole)
            continue
        model, config, left, (scores, grams) = dense, dense.config, whole, first
        state: dict[str, torch.Tensor] = {}
        for step in range(1, settings.steps + 1):
            if step > 1:
                model = checkpoint.from_state(config, state, dense.device)
                scores, grams = scored(model, calibration, settings, seed)
            target = round(before * ratio * step / settings.steps) - (before - architecture.parameters(config))
            keep = select(scores, config, target, settings)
            config, state = remove(model, keep, grams)
            left = [{kind: old[kind][new[kind]] for kind in KINDS} for old, new in zip(left, keep, strict=True)]
        yield Pruned(config, state, (before, architecture.parameters(config)), left)


def scored(
    model: PreTrainedModel, calibration: Sequence[Batch], settings: Settings, seed: int
) -> tuple[Scores, Grams | None]:
    """Return the score of every structure, and what ``remove`` refits with if ``compensate`` asks for it."""
    grams = None
    if fitted(settings.importance, settings.compensate):
        text = list(noised(calibration, settings.noise, model.config.vocab_size, seed))
        grams = input_grams(model, text)
    return saliency.importance(model, calibration, settings, seed, grams), grams if settings.compensate else None


def check(config: PretrainedConfig, settings: Settings) -> None:
    """Refuse settings that do not fit a model.

    Raises:
        PruneError: A block range lies outside the model, the ratio asks for more than the ranges hold, or one shape is
            asked for and the ranges spare blocks.
    """
    faults = [
        experts_fault(config, settings.importance, settings.compensate, [settings.ratio]),
        spared(settings, len(architecture.shapes(config))),
        block_range(config, "attention_blocks", settings.attention_blocks),
        block_range(config, "mlp_blocks", settings.mlp_blocks),
        ratio_fault(config, settings, "prune.ratios", settings.ratio),
    ]
    if any(faults):
        raise PruneError("\n".join(filter(None, faults)))


def check_finite(model: PreTrainedModel) -> None:
    """Refuse a model with weights that are no finite numbers: its scores would order nothing.

    Raises:
        PruneError: Naming the first such tensor.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise PruneError(
                f"{name} of the model holds values that are not finite (NaN or infinite); its file is damaged or was "
                "saved from a training that diverged: name another model in model.source"
            )


def select(scores: Scores, config: PretrainedConfig, target: int, settings: Settings) -> Keep:
    """Choose what stays so that ``target`` parameters go, to within half a head or half of ``multiple_of`` channels.

    ``global`` ranks all structures by score per parameter and takes the lowest. ``local`` takes the same share of every
    block in range, lowest scores first. Channels go in lots, cheapest first, so that a multiple of ``multiple_of``
    stays. Each block keeps at least one head and one lot. With ``shapes: uniform`` all blocks get one shape instead
    (``uniform.select``), and the target is met to within half a lot of channels in each block.

    Args:
        scores: Of each block and kind, [structures].
        config: The model's config.
        target: Parameters to remove.
        settings: ``shapes``, ``scope``, ``structures``, ``multiple_of`` and the block ranges are read.
    """
    if settings.shapes == "uniform":
        return uniform.select(scores, config, target, settings)
    # (rank, parameters, block, kind, structures), cheapest to lose first
    ranked: list[tuple[float, int, int, str, list[int]]] = []
    for index, (shape, block) in enumerate(zip(architecture.shapes(config), scores, strict=True)):
        for kind in KINDS:
            if not prunable(config, settings, index, kind):
                continue
            cost = architecture.group_parameters(config, shape, kind)
            order = block[kind].argsort(stable=True).tolist()
            score = block[kind].tolist()
            gone_so_far = 0
            for lot in _lots(order, kept(settings, shape, kind))[:-1]:  # the best one always stays
                gone_so_far += len(lot)
                local_rank = gone_so_far / len(order)
                mean = sum(score[structure] for structure in lot) / len(lot)
                rank = local_rank if settings.scope == "local" else mean / cost
                ranked.append((rank, cost * len(lot), index, kind, lot))
    ranked.sort(key=lambda item: (item[0], item[2], item[3], item[4]))
    gone: list[dict[str, set[int]]] = [{kind: set() for kind in KINDS} for _ in scores]
    left = target
    for _, cost, index, name, lot in ranked:
        if cost / 2 <= left:  # a large head may not fit where channels still do
            gone[index][name].update(lot)
            left -= cost
    return [
        {
            kind: torch.tensor([i for i in range(architecture.group_count(shape, kind)) if i not in removed[kind]])
            for kind in KINDS
        }
        for shape, removed in zip(architecture.shapes(config), gone, strict=True)
    ]


def _lots(order: list[int], size: int) -> list[list[int]]:
    """Cut a list into lots of a size, the first one smaller if it does not come out even."""
    first = len(order) % size
    cuts = [*([0] if first else []), *range(first, len(order), size)]
    return [order[start:end] for start, end in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def remove(
    model: PreTrainedModel, keep: Keep, grams: Grams | None = None
) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """Return (config, tensors) of the model without the structures that are not kept, in the CPU's memory.

    Args:
        model: The model; not changed.
        keep: Of each block, the structures that stay.
        grams: If given, the reading linears are refitted to their dense outputs (``refit``).
    """
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    shapes = architecture.shapes(model.config)
    smaller = []
    for index, (shape, block) in enumerate(zip(shapes, keep, strict=True)):
        state |= _cut(model, state, index, shape, block, None if grams is None else grams[index])
        queries = shape.heads // shape.kv_heads
        smaller.append(BlockShape(len(block["attention"]) * queries, len(block["attention"]), len(block["mlp"])))
    return checkpoint.pruned_config(model.config, smaller), state


def _cut(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    index: int,
    shape: BlockShape,
    keep: Mapping[str, torch.Tensor],
    grams: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Return those tensors of a block that lose something, without it; arguments as for ``remove``."""
    config, about, smaller = model.config, architecture.description(model.config), {}
    for linear in about.linears:
        name = architecture.linear_name(index, linear.name)
        weight = state[f"{name}.weight"]
        if (rows := architecture.kept(config, shape, linear.outputs, keep)) is not None:
            weight = smaller[f"{name}.weight"] = weight[rows].contiguous()
            if (bias := f"{name}.bias") in state:
                smaller[bias] = state[bias][rows].contiguous()
        if (columns := architecture.kept(config, shape, [linear.inputs], keep)) is not None:
            if grams is None:
                left = weight[:, columns]
            else:
                (kind,) = (kind for kind in KINDS if linear.inputs in KINDS[kind])
                left = refit(weight.to(model.device), grams[kind].to(model.device), columns).cpu()
            smaller[f"{name}.weight"] = left.contiguous()
    for norm, axis in about.norms.items():
        if (values := architecture.kept(config, shape, [axis], keep)) is not None:
            name = architecture.linear_name(index, f"{norm}.weight")
            smaller[name] = state[name][values].contiguous()
    return smaller


def refit(weight: torch.Tensor, gram: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the columns of W that stay, changed so that X_S W'^T is nearest to X W^T (ridge regression).

    W' = W G[:, S] (G[S, S] + damping)^-1 with G = X^T X.

    Args:
        weight: W, [out, in].
        gram: G, [in, in].
        columns: S, [kept].
    """
    inner = gram[columns][:, columns].double()
    outer = weight.double() @ gram[:, columns].double()
    pull = _REFIT_DAMPING * typical_energy(gram)
    inner.diagonal().add_(pull)
    outer += weight[:, columns].double() * pull  # towards the unchanged columns, not towards zero
    return torch.linalg.solve(inner, outer.T).T.to(weight.dtype)
