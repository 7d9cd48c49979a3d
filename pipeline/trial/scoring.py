"""One forward pass of evaluation: log-likelihoods of continuations, out of rows of trees.

Only positions that predict a scored token reach the head, and their logits exist a chunk at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from pipeline import architecture
from pipeline.compress.modules import cap_of, capped, head_of
from pipeline.trial.loss import sent, unwrapped
from pipeline.trial.setting import LOSS_CHUNK
from pipeline.trial.trees import Packed, Request, Row, Wanted, additive, pack, tree_mask, within

Masks = torch.Tensor | Mapping[str, torch.Tensor]  # as transformers' models take them

_CACHED = 16  # rows of logits that a CPU's cache holds


@dataclass(frozen=True)
class Scored:
    """What one forward pass gives; a GPU may still be computing it.

    Attributes:
        wanted: What was asked of it.
        values: Log-likelihood of each token that was wanted.
        greedy: Whether it is the greedy choice.
    """

    wanted: Sequence[Wanted]
    values: torch.Tensor
    greedy: torch.Tensor

    def read(self) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield (request, (log-likelihood of its continuation, whether it is the greedy choice)); wait for a GPU."""
        totals: dict[int, tuple[float, bool]] = {}
        for (index, _, _), value, best in zip(self.wanted, self.values.tolist(), self.greedy.tolist(), strict=True):
            total, all_best = totals.get(index, (0.0, True))
            totals[index] = total + value, all_best and best
        yield from totals.items()


def score(model: PreTrainedModel | PeftModel, requests: Sequence[Request], length: int, rows: Sequence[Row]) -> Scored:
    """Score what is asked in the rows of one forward pass."""
    packed, device = pack(requests, length, rows), model.device
    values, greedy = choose(
        model,
        sent(packed.tokens, device),
        sent(packed.positions, device),
        _masks(cast("PreTrainedModel", unwrapped(model)), packed),
        list(chunks(packed.places, packed.wanted, device)),
    )
    return Scored(packed.wanted, values, greedy)


def _masks(model: PreTrainedModel, packed: Packed) -> Masks:
    """Return what is added to attention scores, or that by type of blocks where some have a window that texts reach."""
    whole, window = tree_mask(packed.owners, packed.branches), architecture.window(model.config)

    def added(mask: torch.Tensor) -> torch.Tensor:
        return sent(additive(mask, model.dtype), model.device)

    if window is None or int(packed.positions.max()) < window:
        return added(whole)
    near = added(whole & within(packed.positions, window))
    if architecture.description(model.config).window == "all":
        return near
    return {"full_attention": added(whole), "sliding_attention": near}


@dataclass(frozen=True)
class Chunk:
    """Positions whose logits exist at once, and the tokens they should predict.

    Attributes:
        rows: Row of each position, [m].
        columns: Its column, [m].
        at: Which of the positions predicts each token, [n].
        targets: The tokens, [n].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    at: torch.Tensor
    targets: torch.Tensor


def chunks(places: Sequence[tuple[int, int]], wanted: Sequence[Wanted], device: torch.device) -> Iterator[Chunk]:
    """Cut positions and the tokens wanted of them, in the order of the positions, into chunks of ``LOSS_CHUNK``."""
    begin = 0
    for start in range(0, len(places), LOSS_CHUNK):
        end = bisect_left(wanted, start + LOSS_CHUNK, lo=begin, key=itemgetter(1))
        rows, columns = sent(torch.tensor(places[start : start + LOSS_CHUNK]), device).unbind(1)
        _, at, targets = sent(torch.tensor(wanted[begin:end]), device).unbind(1)
        yield Chunk(rows, columns, at - start, targets)
        begin = end


def choose(
    model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor, mask: Masks, parts: Sequence[Chunk]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihoods of tokens and whether each is the greedy choice; ``memory`` traces it without data.

    Args:
        model: A causal language model, or one wrapped by PEFT.
        tokens: Token ids, [B, L].
        positions: Position ids, [B, L].
        mask: What is added to the attention scores, [B, 1, L, L]; or that by type of blocks.
        parts: What is wanted. All logits at once would take more than the model, and leave the cache.
    """
    causal = unwrapped(model)
    head = head_of(causal)
    hidden = causal.get_submodule("model")(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    cap, values, greedy = cap_of(causal), [], []
    for part in parts:
        logits = capped(head(hidden[part.rows, part.columns]), cap)
        wanted = logits[part.at, part.targets].float()
        norms, tops = zip(*map(_norm_and_top, logits.split(_CACHED)), strict=True)
        del logits  # else they live until the next chunk's exist
        values.append(wanted - torch.cat(norms)[part.at])
        greedy.append(wanted == torch.cat(tops)[part.at])
    return torch.cat(values), torch.cat(greedy)


def _norm_and_top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = logits.float()
    top = exact.amax(-1)
    # logsumexp in its parts: it would look for the top again, and hide its memory from the trace.
    return (exact - top[:, None]).exp_().sum(-1).log() + top, top
