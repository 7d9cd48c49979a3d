"""Stage ``prune``: remove the coupled structures that the loss misses least (paper section 3.1, eq. 4-6).

Reads ``artifacts/base`` and Alpaca rows for calibration. Writes ``artifacts/pruned``, a ``pruned_*`` checkpoint that
``from_pretrained`` loads. A structure is one key/value head with its query heads, or one MLP channel; removing it
removes every row and column that is coupled with it (``architecture.COUPLED``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import architecture, checkpoint, fits
from pipeline.architecture import COUPLED, BlockShape
from pipeline.compress import saliency
from pipeline.compress.saliency import Grams, Scores, input_grams
from pipeline.data.alpaca import Batch
from pipeline.data.calibration import noised
from pipeline.params import Prune

Keep = list[dict[str, torch.Tensor]]  # of each block: structure kind -> indices of those that stay, ascending
# Of the median of the Gram matrix's diagonal; more than ``saliency`` adds, as the fit has to hold on other text.
_REFIT_DAMPING = 1.0


@dataclass(frozen=True)
class Pruned:
    """Result of pruning.

    Attributes:
        config: Config of the smaller model.
        state: Its tensors.
        parameters: Parameters before and after.
        kept: Of each block, the structures that stayed, in the numbering of the original model.
    """

    config: Any
    state: dict[str, torch.Tensor]
    parameters: tuple[int, int]
    kept: Keep

    @property
    def ratio(self) -> float:
        """Fraction of the parameters that was removed."""
        return 1 - self.parameters[1] / self.parameters[0]


def run(model: Any, calibration: Sequence[Batch], settings: Prune, seed: int) -> Pruned:
    """Prune a model to the settings' ratio.

    Args:
        model: The model; left as it is except for gradients.
        calibration: Token batches with every position labelled.
        settings: Section ``prune`` of the params.
        seed: For random importance and noise.

    Raises:
        ValueError: The settings do not fit this model.
    """
    return next(at_ratios(model, calibration, settings, [settings.ratio], seed))


def at_ratios(
    dense: Any, calibration: Sequence[Batch], settings: Prune, ratios: Sequence[float], seed: int
) -> Iterator[Pruned]:
    """Prune a model to each of several ratios as ``run`` does; the dense model is scored once for all."""
    before = architecture.parameters(dense.config)
    every: Keep = [
        {kind: torch.arange(architecture.group_count(shape, kind)) for kind in COUPLED}
        for shape in architecture.shapes(dense.config)
    ]
    for ratio in ratios:
        check(dense.config, settings.model_copy(update={"ratio": ratio}))
    first = scored(dense, calibration, settings, seed)
    for ratio in ratios:
        model, config, kept, (scores, grams) = dense, dense.config, every, first
        state: dict[str, torch.Tensor] = {}
        for step in range(1, settings.steps + 1):
            if step > 1:
                model = checkpoint.from_state(config, state, dense.device)
                scores, grams = scored(model, calibration, settings, seed)
            target = round(before * ratio * step / settings.steps) - (before - architecture.parameters(config))
            keep = select(scores, config, target, settings)
            config, state = remove(model, keep, grams)
            kept = [{kind: old[kind][new[kind]] for kind in COUPLED} for old, new in zip(kept, keep, strict=True)]
        yield Pruned(config, state, (before, architecture.parameters(config)), kept)


def scored(model: Any, calibration: Sequence[Batch], settings: Prune, seed: int) -> tuple[Scores, Grams | None]:
    """Return the score of every structure, and what ``remove`` refits with if ``compensate`` asks for it."""
    grams = None
    if fits.fitted(settings.importance, settings.compensate):
        text = list(noised(calibration, settings.noise, model.config.vocab_size, seed))
        grams = input_grams(model, text)
    return saliency.importance(model, calibration, settings, seed, grams), grams if settings.compensate else None


def check(config: Any, settings: Prune) -> None:
    """Refuse settings that do not fit a model.

    Raises:
        ValueError: A block range lies outside the model, or the ratio asks for more than the ranges hold.
    """
    faults = [
        fits.block_range(config, "attention_blocks", settings.attention_blocks),
        fits.block_range(config, "mlp_blocks", settings.mlp_blocks),
        fits.ratio(config, settings, "prune.ratio", settings.ratio),
    ]
    if any(faults):
        raise ValueError("\n".join(filter(None, faults)))


def select(scores: Scores, config: Any, target: int, settings: Prune) -> Keep:
    """Choose what stays so that ``target`` parameters go, to within half a head or half of ``multiple_of`` channels.

    ``global`` ranks all structures by score per parameter and takes the lowest. ``local`` takes the same share of every
    block in range, lowest scores first. Channels go in lots, cheapest first, so that a multiple of ``multiple_of``
    stays. Each block keeps at least one head and one lot.

    Args:
        scores: Of each block and kind, [structures].
        config: The model's config.
        target: Parameters to remove.
        settings: ``scope``, ``structures``, ``multiple_of`` and the block ranges are read.
    """
    # (rank, parameters, block, kind, structures), cheapest to lose first
    ranked: list[tuple[float, int, int, str, list[int]]] = []
    for index, (shape, block) in enumerate(zip(architecture.shapes(config), scores, strict=True)):
        for kind in COUPLED:
            if not fits.prunable(config, settings, index, kind):
                continue
            cost = architecture.group_parameters(config, shape, kind)
            order = block[kind].argsort(stable=True).tolist()
            score = block[kind].tolist()
            gone_so_far = 0
            for lot in _lots(order, fits.kept(settings, shape, kind))[:-1]:  # the best one always stays
                gone_so_far += len(lot)
                local_rank = gone_so_far / len(order)
                mean = sum(score[structure] for structure in lot) / len(lot)
                rank = local_rank if settings.scope == "local" else mean / cost
                ranked.append((rank, cost * len(lot), index, kind, lot))
    ranked.sort(key=lambda item: (item[0], item[2], item[3], item[4]))
    gone: list[dict[str, set[int]]] = [{kind: set() for kind in COUPLED} for _ in scores]
    left = target
    for _, cost, index, name, lot in ranked:
        if cost / 2 <= left:  # a large head may not fit where channels still do
            gone[index][name].update(lot)
            left -= cost
    return [
        {
            kind: torch.tensor([i for i in range(architecture.group_count(shape, kind)) if i not in removed[kind]])
            for kind in COUPLED
        }
        for shape, removed in zip(architecture.shapes(config), gone, strict=True)
    ]


def _lots(order: list[int], size: int) -> list[list[int]]:
    """Cut a list into lots of a size, the first one smaller if it does not come out even."""
    first = len(order) % size
    cuts = [*([0] if first else []), *range(first, len(order), size)]
    return [order[start:end] for start, end in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def remove(model: Any, keep: Keep, grams: Grams | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
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
        for kind, members in COUPLED.items():
            if len(block[kind]) == architecture.group_count(shape, kind):
                continue
            for name, side in members:
                full = architecture.linear_name(index, name)
                rows = architecture.member_indices(model.config, shape, name, block[kind])
                weight = state[f"{full}.weight"]
                if side == "in":
                    if grams:
                        fitted = refit(weight.to(model.device), grams[index][kind].to(model.device), rows).cpu()
                    else:
                        fitted = weight[:, rows]
                    state[f"{full}.weight"] = fitted.contiguous()
                else:
                    state[f"{full}.weight"] = weight[rows].contiguous()
                    if f"{full}.bias" in state:
                        state[f"{full}.bias"] = state[f"{full}.bias"][rows].contiguous()
        queries = shape.heads // shape.kv_heads
        smaller.append(BlockShape(len(block["attention"]) * queries, len(block["attention"]), len(block["mlp"])))
    return checkpoint.pruned_config(model.config, smaller), state


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
    pull = _REFIT_DAMPING * gram.diagonal().double().median()
    inner.diagonal().add_(pull)
    outer += weight[:, columns].double() * pull  # towards the unchanged columns, not towards zero
    return torch.linalg.solve(inner, outer.T).T.to(weight.dtype)
