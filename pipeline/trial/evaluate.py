"""Zero-shot accuracy through lm-eval, every shared prefix computed once. Stage ``evaluate``: score the built model.

lm-eval keeps its tasks, filters and metrics; only the language model below is ours. It scores the choices of one
question as branches of a tree: the tokens they share are fed once, the branches follow in the same sequence, and the
attention mask keeps them apart. Only positions that predict a scored token reach ``lm_head``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import fmean, variance
from typing import TypedDict, TypeVar

import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import definitions, tasks
from pipeline.errors import UserError
from pipeline.trial.scores import Scores
from pipeline.trial.scoring import Scored, score
from pipeline.trial.trees import Request, Row, batches, trees

T = TypeVar("T")
Tokens = tuple[object, list[int], list[int]]  # texts, context and continuation, as lm-eval hands them over
Pass = tuple[int, list[Row]]  # length and rows of one forward pass
Passes = Callable[[Sequence[Pass]], Iterable[Pass]]  # shows the progress of forward passes


class Sample(TypedDict):
    """What lm-eval tells of an item that it scored."""

    doc: Mapping[str, object]  # the item
    filtered_resps: Sequence[tuple[float, bool]]  # of each choice its log-likelihood, and whether it is the likeliest


def run(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Mapping[str, Task],
    limit: int,
    batch_tokens: int,
    progress: Passes = iter,
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
        UserError: A task has no item after those left out.
    """
    chosen = {name: items(len(task.eval_docs), limit, skip) for name, task in loaded.items()}
    if empty := [name for name, indices in chosen.items() if not indices]:
        raise UserError(f"{', '.join(empty)}: no item left after the first {skip}; lower evaluate.limit or add items")
    for task in loaded.values():
        task._instances = None
    lm = SharedPrefixLM(model, tokenizer, batch_tokens, progress)
    asked = {"tasks": dict(loaded), "groups": {}, "group_map": {}}
    accuracy, stderr, other, by_item = {}, {}, {}, {}
    with tasks.compiled_templates():
        evaluated = evaluator.evaluate(lm, asked, samples=chosen, bootstrap_iters=1)
        for name in loaded:
            result, metric = evaluated["results"][name], definitions.metric(name)
            accuracy[name] = result[f"{metric},none"]
            error = result[f"{metric}_stderr,none"]
            stderr[name] = 0.0 if isinstance(error, str) or math.isnan(error) else error
            for extra in ("acc", "acc_norm"):
                if extra != metric and f"{extra},none" in result:
                    other[f"{name}_{extra}"] = result[f"{extra},none"]
            by_item[name] = [
                (float(sample[metric]), gold_logprob(loaded[name], sample, metric))
                for sample in evaluated["samples"][name]
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


def seen(loaded: Mapping[str, Task], limit: int) -> int:
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


def gold_logprob(task: Task, sample: Sample, metric: str) -> float:
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
    normalized = torch.log_softmax(torch.tensor(values, dtype=torch.float64), 0)
    return float(normalized[tasks.gold(task, document)].logsumexp(0))


class SharedPrefixLM(TemplateLM):
    """A language model for lm-eval that computes shared prefixes once."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int,
        progress: Passes = iter,
    ):
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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return token ids; special tokens as the tokenizer adds them, unless told."""
        if add_special_tokens is None:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score (context, continuation) pairs."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Tokens], **_: object) -> list[tuple[float, bool]]:
        asked = [self._request(context, continuation) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        passes = list(batches(trees(asked), self.batch_tokens))

        @torch.inference_mode()  # of the thread that it runs in
        def scored(single: Pass) -> Scored:
            length, rows = single
            return score(self.model, asked, length, rows)

        with side_by_side(self.model, len(passes)) as mapped:
            for _pass, found in zip(self.progress(passes), behind(mapped(scored, passes)), strict=True):
                for index, value in found.read():
                    results[index] = value
        return results

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Request(tuple(tokens), len(tokens) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Perplexity tasks are not scored here."""
        raise NotImplementedError("tasks with rolling log-likelihood are not supported; use multiple-choice tasks")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generation tasks are not scored here."""
        raise NotImplementedError("tasks that generate text are not supported; use multiple-choice tasks")


def behind(items: Iterable[T]) -> Iterator[T]:
    """Yield each item when the next one is there: a pass's figures are read while a GPU computes the next."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


@contextmanager
def side_by_side(model: PreTrainedModel | PeftModel, passes: int) -> Iterator[Callable[..., Iterator]]:
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
