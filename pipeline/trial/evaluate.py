"""Zero-shot accuracy through lm-eval, every shared prefix computed once. Stage ``evaluate``: score the built model.

lm-eval keeps its tasks, filters and metrics; only the language model below is ours. It scores the choices of one
question as branches of a tree: the tokens they share are fed once, the branches follow in the same sequence, and the
attention mask keeps them apart. Only positions that predict a scored token reach ``lm_head``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM

from pipeline.data import definitions, tasks
from pipeline.trial.memory import LOSS_CHUNK

ROW = 128  # tokens of a row that trees are packed into
_LARGEST = 8 * ROW  # tokens of a tree; a mask has the square of it
_CACHED = 16  # rows of logits that a CPU's cache holds
_PREFIX, _PADDING = -1, -2  # branch of a prefix; tree of what fills a row up


@dataclass(frozen=True)
class Scores:
    """What an evaluation measured.

    Attributes:
        accuracy: Task -> accuracy in [0, 1] by the task's own metric (``definitions.metric``).
        stderr: Task -> standard error of that accuracy.
        other: ``<task>_<metric>`` -> the metric that is not the task's own, where there is one.
        mean: Mean accuracy, each task with equal weight.
        mean_stderr: Its standard error.
        gold_logprob: Mean over tasks of the mean log-probability of the gold choice among the choices, each choice's
            log-likelihood divided by its length where the task's metric does so; of a task without choices, the mean
            log-likelihood of its target. In nats, below zero.
        gold_logprob_stderr: Its standard error over the items.
        items: Items scored.
        by_item: Task -> of each item its own metric and the log-probability of its gold choice.
    """

    accuracy: dict[str, float]
    stderr: dict[str, float]
    other: dict[str, float]
    mean: float
    mean_stderr: float
    gold_logprob: float
    gold_logprob_stderr: float
    items: int
    by_item: dict[str, list[tuple[float, float]]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Request:
    """One continuation to score: token ids of the whole sequence and where the continuation starts."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Tree:
    """Requests that share their first ``prefix`` tokens; fed as that prefix and one branch a request."""

    requests: tuple[int, ...]
    prefix: int
    size: int


Row = list[Tree]  # trees that stand in one sequence


def run(
    model: Any,
    tokenizer: Any,
    loaded: Mapping[str, Any],
    limit: int,
    batch_tokens: int,
    progress: Callable[[Sequence[Any]], Any] = iter,
    skip: int = 0,
) -> Scores:
    """Score a model on lm-eval tasks.

    Args:
        model: A causal language model in evaluation mode, or one wrapped by PEFT.
        tokenizer: Its tokenizer.
        loaded: lm-eval's task objects by name, from ``tasks.load``; reused between calls.
        limit: Items of each task, or as many as there are; 0: all.
        batch_tokens: Tokens of one forward pass.
        progress: Wraps the list of batches.
        skip: First items of each task that are left out.

    Raises:
        ValueError: A task has no item after those left out.
    """
    chosen = {name: items(len(task.eval_docs), limit, skip) for name, task in loaded.items()}
    if empty := [name for name, indices in chosen.items() if not indices]:
        raise ValueError(f"{', '.join(empty)}: no item left after the first {skip}; lower evaluate.limit or add items")
    for task in loaded.values():
        task._instances = None
    lm = SharedPrefixLM(model, tokenizer, batch_tokens, progress)
    asked = {"tasks": dict(loaded), "groups": {}, "group_map": {}}
    accuracy, stderr, other, by_item = {}, {}, {}, {}
    with tasks.compiled_templates():
        found = evaluator.evaluate(lm, asked, samples=chosen, bootstrap_iters=1)
        for name in loaded:
            result, metric = found["results"][name], definitions.metric(name)
            accuracy[name] = result[f"{metric},none"]
            error = result[f"{metric}_stderr,none"]
            stderr[name] = 0.0 if isinstance(error, str) or math.isnan(error) else error
            for extra in ("acc", "acc_norm"):
                if extra != metric and f"{extra},none" in result:
                    other[f"{name}_{extra}"] = result[f"{extra},none"]
            by_item[name] = [
                (float(sample[metric]), gold_logprob(loaded[name], sample, metric)) for sample in found["samples"][name]
            ]
    logprobs = [[logprob for _, logprob in values] for values in by_item.values()]
    count = len(accuracy)
    return Scores(
        accuracy,
        stderr,
        other,
        mean=fmean(accuracy.values()),
        mean_stderr=math.sqrt(sum(error**2 for error in stderr.values())) / count,
        gold_logprob=fmean(map(fmean, logprobs)),
        gold_logprob_stderr=math.sqrt(sum(squared_error(values) for values in logprobs)) / count,
        items=sum(map(len, logprobs)),
        by_item=by_item,
    )


def seen(loaded: Mapping[str, Any], limit: int) -> int:
    """Return how many first items of each task to leave out because trials chose by them; 0 if none would be left."""
    return limit if all(len(task.eval_docs) > limit for task in loaded.values()) else 0


def items(count: int, limit: int, skip: int = 0) -> range:
    """Return which of ``count`` items are scored: ``limit`` (0: all) of those after the first ``skip``."""
    return range(skip, min(count, skip + limit) if limit else count)


def squared_error(values: Sequence[float]) -> float:
    """Return the squared standard error of a mean; of one value, which tells nothing of it, 0."""
    return variance(values) / len(values) if len(values) > 1 else 0.0


# What lm-eval's metrics divide a choice's log-likelihood by: characters, or bytes.
_LENGTHS: Mapping[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}


def gold_logprob(task: Any, sample: Mapping[str, Any], metric: str) -> float:
    """Return the log-probability of the gold choice, normalized over the choices of one question, in nats.

    Of several gold choices together; of a task without choices, the log-likelihood of its target.
    """
    document = sample["doc"]
    values = [response[0] for response in sample["filtered_resps"]]
    if task.OUTPUT_TYPE == "loglikelihood":
        return float(values[0])
    choices = task.doc_to_choice(document)
    if metric in _LENGTHS:
        values = [value / _LENGTHS[metric](choice) for value, choice in zip(values, choices, strict=True)]
    every = torch.log_softmax(torch.tensor(values, dtype=torch.float64), 0)
    return float(every[tasks.gold(task, document)].logsumexp(0))


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

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        passes = list(batches(trees(asked), self.batch_tokens))

        @torch.inference_mode()  # of the thread that it runs in
        def scored(one: tuple[int, list[Row]]) -> list[tuple[int, tuple[float, bool]]]:
            return list(score(self.model, asked, *one))

        with side_by_side(self.model, len(passes)) as mapped:
            for _, found in zip(self.progress(passes), mapped(scored, passes), strict=True):
                for index, value in found:
                    results[index] = value
        return results

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        tokens = (context + continuation)[-(self.max_length + 1) :]
        window = getattr(self.model.config, "sliding_window", None)
        if window and len(tokens) > window:
            raise ValueError(
                f"evaluate.tasks: a text has {len(tokens)} tokens, and the model sees {window} at a time (its sliding "
                "window), which the mask of shared contexts leaves out; take the task out"
            )
        return Request(tuple(tokens), len(tokens) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Perplexity tasks are not scored here."""
        raise NotImplementedError("tasks with rolling log-likelihood are not supported; use multiple-choice tasks")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generation tasks are not scored here."""
        raise NotImplementedError("tasks that generate text are not supported; use multiple-choice tasks")


@contextmanager
def side_by_side(model: Any, passes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a ``map`` for forward passes of a model: on a CPU with its cores shared out among several of them.

    Cores that work on one matrix product wait for the slowest of them at its end, some hundred times a pass; a pass of
    its own for each waits once, and rounds alike. Quantized modules change their state in a pass: one after the other.
    """
    cores = torch.get_num_threads()
    workers = min(cores, passes)
    quantized = getattr(model.config, "quantization_config", None) is not None
    if workers < 2 or quantized or model.device.type != "cpu":
        yield map
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # threads that torch starts later take over what was set last


def trees(requests: Sequence[Request]) -> list[Tree]:
    """Group neighbouring requests that share at least half of their contexts, up to ``_LARGEST`` tokens."""
    found: list[Tree] = []
    members: list[int] = []
    prefix = 0

    def size(prefix: int, members: Sequence[int]) -> int:
        return prefix + sum(len(requests[index].tokens) - 1 - prefix for index in members)

    def close() -> None:
        found.append(Tree(tuple(members), prefix, size(prefix, members)))

    for index, request in enumerate(requests):
        limit = len(request.tokens) - 1
        if members:
            shared = min(_common(requests[members[0]].tokens, request.tokens), limit, prefix)
            # Half of its own context, whatever the others share: a first token that all texts begin with is no kinship.
            if shared * 2 >= max(request.start, 1) and size(shared, [*members, index]) <= _LARGEST:
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


def batches(found: Sequence[Tree], batch_tokens: int) -> Iterator[tuple[int, list[Row]]]:
    """Yield (length, rows) of each forward pass: trees packed end to end into rows of few different lengths.

    Matrix kernels are generated for each shape they meet, so nearly all passes have the same one. Trees longer than
    ``ROW`` get rows of twice, four times ... that length.
    """
    open_rows: dict[int, list[tuple[int, Row]]] = {}
    for tree in sorted(found, key=lambda tree: -tree.size):
        length = ROW
        while length < tree.size:
            length *= 2
        rows = open_rows.setdefault(length, [])
        for place, (room, row) in enumerate(rows):  # first fit, longest first
            if tree.size <= room:
                rows[place] = (room - tree.size, [*row, tree])
                break
        else:
            rows.append((length - tree.size, [tree]))
    for length, rows in open_rows.items():
        count = max(batch_tokens // length, 1)
        for start in range(0, len(rows), count):
            yield length, [row for _, row in rows[start : start + count]]


def score(
    model: Any, requests: Sequence[Request], length: int, rows: Sequence[Row]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yield (request, (log-likelihood of its continuation, whether it is the greedy choice)) for one forward pass."""
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    owners = torch.full((len(rows), length), _PADDING, dtype=torch.long)  # the tree of each token
    branches = torch.full((len(rows), length), _PREFIX, dtype=torch.long)
    places: dict[tuple[int, int], int] = {}  # (row, column) -> index among the positions that reach lm_head
    wanted: list[tuple[int, int, int]] = []  # (request, index of the position, token it should predict)
    for row, packed in enumerate(rows):
        begin = 0
        for owner, tree in enumerate(packed):
            end = begin + tree.prefix
            tokens[row, begin:end] = torch.tensor(requests[tree.requests[0]].tokens[: tree.prefix])
            positions[row, begin:end] = torch.arange(tree.prefix)
            owners[row, begin : begin + tree.size] = owner
            for branch, index in enumerate(tree.requests):
                request = requests[index]
                own = request.tokens[tree.prefix : -1]
                here = slice(end, end + len(own))
                tokens[row, here] = torch.tensor(own, dtype=torch.long)
                positions[row, here] = torch.arange(tree.prefix, tree.prefix + len(own))
                branches[row, here] = branch
                for position in range(request.start - 1, len(request.tokens) - 1):
                    column = begin + position if position < tree.prefix else position - tree.prefix + end
                    place = places.setdefault((row, column), len(places))
                    wanted.append((index, place, request.tokens[position + 1]))
                end += len(own)
            begin += tree.size
    device = model.device
    wanted.sort(key=lambda one: one[1])  # by position, so that chunks of positions are chunks of this list
    values, greedy = choose(
        model,
        tokens.to(device),
        positions.to(device),
        additive(tree_mask(owners, branches), model.dtype).to(device),
        list(chunks(list(places), wanted, device)),
    )
    totals: dict[int, list[Any]] = {}
    for index, value, best in zip((one[0] for one in wanted), values.tolist(), greedy.tolist(), strict=True):
        total = totals.setdefault(index, [0.0, True])
        total[0] += value
        total[1] = total[1] and best
    for index, (value, best) in totals.items():
        yield index, (value, best)


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


def chunks(
    places: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int, int]], device: torch.device
) -> Iterator[Chunk]:
    """Cut positions and the tokens wanted of them, in the order of the positions, into chunks of ``LOSS_CHUNK``."""
    begin = 0
    for start in range(0, len(places), LOSS_CHUNK):
        end = bisect_left(wanted, start + LOSS_CHUNK, lo=begin, key=lambda one: one[1])
        rows, columns = torch.tensor(places[start : start + LOSS_CHUNK], device=device).unbind(1)
        _, at, targets = torch.tensor(wanted[begin:end], device=device).unbind(1)
        yield Chunk(rows, columns, at - start, targets)
        begin = end


def choose(
    model: Any, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, parts: Sequence[Chunk]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihoods of tokens and whether each is the greedy choice; ``memory`` traces it without data.

    Args:
        model: A causal language model, or one wrapped by PEFT.
        tokens: Token ids, [B, L].
        positions: Position ids, [B, L].
        mask: What is added to the attention scores, [B, 1, L, L].
        parts: What is wanted. All logits at once would take more than the model, and leave the cache.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    values, greedy = [], []
    for part in parts:
        logits = causal.lm_head(hidden[part.rows, part.columns])
        own = logits[part.at, part.targets].float()
        norms, tops = zip(*map(_norm_and_top, logits.split(_CACHED)), strict=True)
        del logits  # else they live until the next chunk's exist
        values.append(own - torch.cat(norms)[part.at])
        greedy.append(own == torch.cat(tops)[part.at])
    return torch.cat(values), torch.cat(greedy)


def _norm_and_top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exact = logits.float()
    top = exact.amax(-1)
    # logsumexp in its parts: it would look for the top again, and hide its memory from the trace.
    return (exact - top[:, None]).exp_().sum(-1).log() + top, top


def tree_mask(owners: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Return which earlier tokens each token sees: those of its tree that are in the prefix or in its own branch.

    Args:
        owners: Tree of each token, [B, L].
        branches: Branch of each token within its tree, ``_PREFIX`` for its prefix, [B, L].

    Returns:
        Booleans, [B, L, L]; every token sees at least itself.
    """
    length = branches.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    near = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == _PREFIX)
    return earlier & near & (owners[:, :, None] == owners[:, None, :])


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask to add to attention scores, [B, 1, L, L]: plain attention would add a boolean one as 0 and 1."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]
