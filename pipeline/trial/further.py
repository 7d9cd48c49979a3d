"""Tasks beside those that a search goes by, through lm-eval: generated answers, groups, examples, perplexity of texts.

Log-likelihoods take the search's way (``evaluate``). Text is written by lm-eval's own generation on the same model, in
batches and with its cache of keys and values. A long text is read in windows, cut as lm-eval cuts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval import evaluator
from lm_eval import utils as lm_utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data import tasks
from pipeline.data.further import TEXT
from pipeline.errors import UserError
from pipeline.trial.evaluate import SharedPrefixLM, items
from pipeline.trial.setting import ROW

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

WINDOW = 2048  # tokens of a long text that are read at once
_SEED = 1234  # lm-eval's own, of the examples that it draws
_WRITTEN = 256  # tokens that lm-eval lets a model write where a task does not say
Progress = Callable[[Sequence[Any]], Iterable[Any]]  # shows how much is done


@dataclass(frozen=True)
class Further:
    """What is measured beside a search.

    Attributes:
        loaded: lm-eval's tasks and groups, from ``data.further.load``.
        limit: Items of a task; 0: all.
    """

    loaded: TaskDict
    limit: int

    @property
    def reported(self) -> list[str]:
        """Return the groups, and the tasks that are in none: of a group's many tasks its means are told."""
        groups = self.loaded["groups"]
        inside = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        return sorted({*self.loaded["tasks"], *groups} - inside)

    def measured(self, figures: Mapping[str, float]) -> bool:
        """Return whether figures hold some of each of them."""
        return all(any(key.startswith(f"{name}_") for key in figures) for name in self.reported)


def run(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    further: Further,
    batch_tokens: int,
    progress: Progress = iter,
) -> dict[str, float]:
    """Return what lm-eval reports of each task and group, as ``<task>_<metric>``, and their standard errors.

    Of a metric that is taken after a filter the filter's name follows, such as ``gsm8k_exact_match_strict-match``.

    Args:
        model: A causal language model in evaluation mode, or one wrapped by PEFT.
        tokenizer: Its tokenizer.
        further: What is measured.
        batch_tokens: Tokens of one forward pass.
        progress: Wraps the forward passes, and the batches of generated answers.

    Raises:
        UserError: An answer may be longer than the model can hold.
    """
    loaded = further.loaded["tasks"]
    if not loaded:
        return {}
    _must_hold(loaded, model.config.max_position_embeddings)
    for task in loaded.values():
        task._instances = None
        task.set_fewshot_seed(_SEED)  # the same examples for each model
    lm = GeneratingLM(model, tokenizer, batch_tokens, progress)
    chosen = {name: list(items(len(task.eval_docs), further.limit)) for name, task in loaded.items()}
    with tasks.compiled_templates():
        evaluated = evaluator.evaluate(lm, dict(further.loaded), samples=chosen, bootstrap_iters=1)
    figures: dict[str, float] = {}
    for name in further.reported:
        figures |= _figures(name, evaluated["results"][name])
    if TEXT in loaded:
        figures[f"{TEXT}_perplexity"] = _token_perplexity(evaluated["samples"][TEXT], tokenizer)
    return figures


def _figures(name: str, result: Mapping[str, Any]) -> dict[str, float]:
    figures = {}
    for key, value in result.items():
        metric, _, rule = key.partition(",")
        if rule and isinstance(value, int | float) and math.isfinite(value):
            figures[f"{name}_{metric}" + ("" if rule == "none" else f"_{rule}")] = float(value)
    return figures


def _token_perplexity(samples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> float:
    total = sum(sample["filtered_resps"][0] for sample in samples)
    return math.exp(-total / sum(len(tokenizer.encode(sample["doc"]["text"])) for sample in samples))


def _must_hold(loaded: Mapping[str, Any], context: int) -> None:
    for name, task in loaded.items():
        wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", _WRITTEN)
        if task.OUTPUT_TYPE == "generate_until" and wanted >= context:
            raise UserError(
                f"evaluate.further: {name} lets a model write {wanted} tokens, and this one holds {context} with what "
                "it is asked; take the task out"
            )


class GeneratingLM(SharedPrefixLM):
    """A language model for lm-eval that also writes text and reads long ones."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int,
        progress: Progress = iter,
    ):
        super().__init__(model, tokenizer, batch_tokens, progress)
        self.shown = progress

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what lm-eval's own model class writes for each request, batch by batch, longest prompts first."""
        size = max(1, self.batch_tokens // ROW)
        theirs = HFLM(pretrained=self.model, tokenizer=self.tokenizer, backend="causal", batch_size=size)
        order = sorted(range(len(requests)), key=lambda n: (-len(self.tok_encode(requests[n].args[0])), n))
        answers = [""] * len(requests)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        for part in self.shown(parts):
            said = theirs.generate_until([requests[number] for number in part], disable_tqdm=True)
            for number, answer in zip(part, said, strict=True):
                answers[number] = answer
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of ``WINDOW`` tokens at most."""
        asked: list[tuple[object, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = lm_utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=min(self.max_length, WINDOW),
                context_len=1,
            )
            for context, continuation in map(lm_utils.make_disjoint_window, windows):
                asked.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(asked), strict=True):
            totals[number] += value
        return totals
