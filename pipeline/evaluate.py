"""Zero-shot accuracy through lm-eval, every shared prefix computed once. Stage ``evaluate``: score the built model.

lm-eval keeps its tasks, filters and metrics; only the language model below is ours. It scores the choices of one
question as branches of a tree: the tokens they share are fed once, the branches follow in the same sequence, and the
attention mask keeps them apart. Only positions that predict a scored token reach ``lm_head``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from torch.nn import functional as F

from pipeline import tasks
from pipeline.memory import LOSS_CHUNK

_PREFIX, _PADDING = -1, -2  # branch numbers of tokens that belong to no branch


@dataclass(frozen=True)
class Scores:
    """What an evaluation measured.

    Attributes:
        accuracy: Task -> accuracy in [0, 1] by the task's own metric (``tasks.METRIC``).
        stderr: Task -> standard error of that accuracy.
        other: ``<task>_<metric>`` -> the metric that is not the task's own, where there is one.
        mean: Mean accuracy, each task with equal weight.
        mean_stderr: Its standard error.
        gold_logprob: Mean over tasks of the mean log-probability of the gold choice among the choices, each choice's
            log-likelihood divided by its length in bytes where the task's metric does so. In nats, below zero.
        items: Items scored.
    """

    accuracy: dict[str, float]
    stderr: dict[str, float]
    other: dict[str, float]
    mean: float
    mean_stderr: float
    gold_logprob: float
    items: int


@dataclass(frozen=True)
class Request:
    """One continuation to score: token ids of the whole sequence and where the continuation starts."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Tree:
    """Requests that share their first ``prefix`` tokens."""

    requests: tuple[int, ...]
    prefix: int
    size: int

    @property
    def plain(self) -> bool:
        """Whether it is one sequence, so that causal attention needs no mask."""
        return self.size == self.prefix or len(self.requests) == 1


def run(
    model: Any,
    tokenizer: Any,
    loaded: Mapping[str, Any],
    limit: int,
    batch_tokens: int,
    progress: Callable[[Sequence[Any]], Any] = iter,
) -> Scores:
    """Score a model on lm-eval tasks.

    Args:
        model: A causal language model in evaluation mode, or one wrapped by PEFT.
        tokenizer: Its tokenizer.
        loaded: lm-eval's task objects by name, from ``tasks.load``; reused between calls.
        limit: First items of each task; 0: all.
        batch_tokens: Tokens of one forward pass.
        progress: Wraps the list of batches.
    """
    for task in loaded.values():
        task._instances = None
    lm = SharedPrefixLM(model, tokenizer, batch_tokens, progress)
    found = evaluator.evaluate(
        lm, {"tasks": dict(loaded), "groups": {}, "group_map": {}}, limit=limit or None, bootstrap_iters=1
    )
    accuracy, stderr, other, logprob = {}, {}, {}, []
    for name in loaded:
        result, metric = found["results"][name], tasks.METRIC.get(name, "acc")
        accuracy[name] = result[f"{metric},none"]
        error = result[f"{metric}_stderr,none"]
        stderr[name] = 0.0 if isinstance(error, str) or math.isnan(error) else error
        for extra in ("acc", "acc_norm"):
            if extra != metric and f"{extra},none" in result:
                other[f"{name}_{extra}"] = result[f"{extra},none"]
        samples = found["samples"][name]
        logprob.append(fmean(gold_logprob(loaded[name], sample, metric) for sample in samples))
    count = len(accuracy)
    return Scores(
        accuracy,
        stderr,
        other,
        mean=fmean(accuracy.values()),
        mean_stderr=math.sqrt(sum(error**2 for error in stderr.values())) / count,
        gold_logprob=fmean(logprob),
        items=sum(len(samples) for samples in found["samples"].values()),
    )


def gold_logprob(task: Any, sample: Mapping[str, Any], metric: str) -> float:
    """Return the log-probability of the gold choice, normalized over the choices of one question, in nats."""
    document = sample["doc"]
    values = [response[0] for response in sample["filtered_resps"]]
    choices = task.doc_to_choice(document)
    if metric == "acc_norm":
        values = [value / len(choice.encode()) for value, choice in zip(values, choices, strict=True)]
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    gold = choices.index(gold) if isinstance(gold, str) else int(gold)
    return float(torch.log_softmax(torch.tensor(values, dtype=torch.float64), 0)[gold])


class SharedPrefixLM(TemplateLM):
    """A language model for lm-eval that computes shared prefixes once."""

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, progress: Callable[[Sequence[Any]], Any] = iter):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.progress = batch_tokens, progress
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token that an empty context stands for."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids; special tokens as the tokenizer adds them, unless told."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs."""
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        for batch in self.progress(list(batches(trees(asked), self.batch_tokens))):
            for index, value in score(self.model, asked, batch):
                results[index] = value
        return results

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Request(tuple(tokens), len(tokens) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Perplexity tasks are not scored here."""
        raise NotImplementedError("tasks with rolling log-likelihood are not supported; use multiple-choice tasks")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generation tasks are not scored here."""
        raise NotImplementedError("tasks that generate text are not supported; use multiple-choice tasks")


def trees(requests: Sequence[Request]) -> list[Tree]:
    """Group neighbouring requests that share at least half of what they would feed before the continuation."""
    found: list[Tree] = []
    members: list[int] = []
    prefix = 0

    def close() -> None:
        size = prefix + sum(len(requests[index].tokens) - 1 - prefix for index in members)
        found.append(Tree(tuple(members), prefix, size))

    for index, request in enumerate(requests):
        limit = len(request.tokens) - 1
        if members:
            shared = min(_common(requests[members[0]].tokens, request.tokens), limit, prefix)
            if shared * 2 >= max(min(prefix, request.start), 1):
                members.append(index)
                prefix = shared
                continue
            close()
        members, prefix = [index], limit
    if members:
        close()
    return found


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    for position, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return position
    return min(len(first), len(second))


def batches(found: Sequence[Tree], batch_tokens: int) -> Iterator[list[Tree]]:
    """Yield trees of similar size, longest first, up to ``batch_tokens`` tokens with padding; plain ones apart."""
    for plain in (False, True):
        batch: list[Tree] = []
        for tree in sorted((tree for tree in found if tree.plain is plain), key=lambda tree: -tree.size):
            if batch and (len(batch) + 1) * batch[0].size > batch_tokens:
                yield batch
                batch = []
            batch.append(tree)
        if batch:
            yield batch


def score(model: Any, requests: Sequence[Request], batch: Sequence[Tree]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yield (request, (log-likelihood of its continuation, whether it is the greedy choice)) for a batch of trees."""
    length = batch[0].size
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    positions = torch.arange(length).repeat(len(batch), 1)  # of padding too: a jump would look like packed sequences
    branches = torch.full((len(batch), length), _PADDING, dtype=torch.long)
    rows, columns, targets, owners = [], [], [], []
    for row, tree in enumerate(batch):
        first = requests[tree.requests[0]].tokens
        tokens[row, : tree.prefix] = torch.tensor(first[: tree.prefix])
        branches[row, : tree.prefix] = _PREFIX
        offset = tree.prefix
        for number, index in enumerate(tree.requests):
            request = requests[index]
            own = request.tokens[tree.prefix : -1]
            here = slice(offset, offset + len(own))
            tokens[row, here] = torch.tensor(own, dtype=torch.long)
            positions[row, here] = torch.arange(tree.prefix, tree.prefix + len(own))
            branches[row, here] = number
            for position in range(request.start - 1, len(request.tokens) - 1):
                rows.append(row)
                columns.append(position if position < tree.prefix else position - tree.prefix + offset)
                targets.append(request.tokens[position + 1])
                owners.append(index)
            offset += len(own)
    device = model.device
    mask = None if batch[0].plain else additive(tree_mask(branches), model.dtype)[:, None].to(device)
    values, greedy = choose(
        model,
        tokens.to(device),
        positions.to(device),
        mask,
        (torch.tensor(rows), torch.tensor(columns)),
        torch.tensor(targets, device=device),
    )
    totals: dict[int, list[Any]] = {}
    for owner, value, best in zip(owners, values.tolist(), greedy.tolist(), strict=True):
        total = totals.setdefault(owner, [0.0, True])
        total[0] += value
        total[1] = total[1] and best
    for owner, (value, best) in totals.items():
        yield owner, (value, best)


def choose(
    model: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    where: tuple[torch.Tensor, torch.Tensor],
    wanted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihoods of tokens and whether each is the greedy choice; ``memory`` traces it without data.

    The logits of ``LOSS_CHUNK`` positions exist at once: of all of them they would take more than the model.

    Args:
        model: A causal language model, or one wrapped by PEFT.
        tokens: Token ids, [B, L].
        positions: Position ids, [B, L].
        mask: What is added to the attention scores, [B, 1, L, L]; None: causal attention.
        where: Row and column of each position that predicts, [n] each.
        wanted: The token that follows each, [n].
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[where]
    values, greedy = [], []
    for part, tokens_ in zip(hidden.split(LOSS_CHUNK), wanted.split(LOSS_CHUNK), strict=True):
        logits = causal.lm_head(part).float()
        values.append(-F.cross_entropy(logits, tokens_, reduction="none"))
        greedy.append(logits.argmax(-1) == tokens_)
        del logits  # else they live until the next chunk's exist
    return torch.cat(values), torch.cat(greedy)


def tree_mask(branches: torch.Tensor) -> torch.Tensor:
    """Return which earlier tokens each token sees: the prefix and its own branch.

    Args:
        branches: Branch of each token, [B, L].

    Returns:
        Booleans, [B, L, L]; every row sees at least itself.
    """
    length = branches.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    same = branches[:, :, None] == branches[:, None, :]
    return earlier & (same | (branches[:, None, :] == _PREFIX))


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a boolean mask as what is added to attention scores: 0, or minus infinity where nothing is seen.

    Plain (eager) attention adds whatever it is given, and would add a boolean as 0 and 1.
    """
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
