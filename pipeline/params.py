"""The params as frozen, typed sections. What a key alone may hold is judged here; ``checks`` judges the rest.

Each section is named after the stage (module, DVC stage, MLproject entry point) that reads it.
Sections that several stages share (``model``, ``data``, ``recover``, ``tasks``) are named after the module.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from pipeline import bits, sources
from pipeline.errors import UserError, shown

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
Granularity = Literal["block", "group", "linear"]
Objective = Literal["accuracy", "gold_logprob", "response_logprob"]
MOST = 0.9  # of the parameters may go
_MOST_COUNT = 10**9
_MOST_WORKERS = 1000
_LONGEST_NAME = 250  # characters
_LONGEST_TEXT = 10_000


def _each_once(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each value may be named once; remove the repeated ones")
    return values


Count = Annotated[int, Field(ge=0, le=_MOST_COUNT)]
Positive = Annotated[int, Field(gt=0, le=_MOST_COUNT)]
Length = Annotated[int, Field(ge=2, le=_MOST_COUNT)]  # tokens: the first one predicts the second
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]
RowName = Literal["instruction", "input", "output", "messages", "role", "content", "system", "user", "assistant"]
Text = Annotated[str, Field(max_length=_LONGEST_TEXT)]
# A number stands for a list of it.
_ALONE = BeforeValidator(
    lambda value: (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value
)
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML knows lists only
EachOnce = AfterValidator(_each_once)


class ParamsError(UserError):
    """The user's mistakes in ``params.yaml``, all of them in one message."""


class Section(BaseModel):
    """A frozen section of ``params.yaml`` that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    """The model to compress."""

    source: Text = Field(description=f"Where the model comes from: {', '.join(sources.FORMS.values())}.")
    sha256: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="Checksum of a package's wheel; empty: not checked."
    )

    @field_validator("source")
    @classmethod
    def _known_form(cls, source: str) -> str:
        return sources.check(source)


class Data(Section):
    """The rows for calibration and recovery, and the benchmark items."""

    alpaca: Text = Field(description="Rows in `format`: path:<file> or hub:<org>/<name>@<revision>.")
    format: Literal["alpaca", "chat"] = Field(
        "alpaca", description="alpaca: rows of instruction, input, output. chat: rows of messages with role, content."
    )
    prompt: Literal["alpaca", "chat"] = Field(
        "alpaca", description="What rows are written in: Alpaca's prompt, or the model's own chat template."
    )
    names: dict[RowName, Name | None] = Field(
        default_factory=dict,
        description="Our name of a field or role -> the rows' own where it differs; of input null: there is none.",
    )
    benchmarks: Text = Field(description="Benchmark items: path:<folder of <task>.jsonl> or the word `hub`.")
    validation_rows: Positive = Field(description="Rows held out of calibration and recovery for the validation loss.")
    max_skipped: Fraction = Field(0.01, description="Share of a file's rows or items that may be left out as faulty.")

    @field_validator("alpaca")
    @classmethod
    def _known_form(cls, source: str) -> str:
        return sources.must_be(sources.check(source, ("hub:", "path:")), Path.is_file, "file with a row a line")

    @field_validator("benchmarks")
    @classmethod
    def _known_place(cls, source: str) -> str:
        if source == "hub":
            return source
        return sources.must_be(
            sources.check(source, ("path:",), " or the word hub"), Path.is_dir, "folder of <task>.jsonl"
        )


class BlockRange(Section):
    """Blocks ``first`` to ``last``, both included; -1 is the last block of the model, -2 the one before it."""

    first: Count
    last: int = Field(ge=-_MOST_COUNT, le=_MOST_COUNT)


class Prune(Section):
    """Structured pruning (paper section 3.1)."""

    ratios: Annotated[tuple[Annotated[float, Field(ge=0, lt=MOST)], ...], _ALONE, AsTuple, EachOnce] = Field(
        min_length=1,
        description="Fractions of the model's parameters to remove, which the search chooses from; 0: not pruned.",
    )
    importance: Literal[
        "taylor1", "taylor2", "taylor_mix", "magnitude", "random", "activation", "fisher_mask", "surgeon"
    ] = Field(description="Score of a coupled structure; taylor1 is the paper's Element1, taylor2 its Element2.")
    level: Literal["parameter", "vector"] = Field(description="Take absolute values before or after summing a row.")
    aggregate: Literal["sum", "mean", "prod", "max", "last"] = Field(description="From a group's members to its score.")
    scope: Literal["local", "global"] = Field(description="The same share of each block, or one ranking of all groups.")
    shapes: Literal["free", "uniform"] = Field("free", description="A shape for each block, or one for all blocks.")
    structures: Annotated[tuple[Literal["attention", "mlp"], ...], AsTuple, EachOnce] = Field(
        min_length=1, description="Which structures may go."
    )
    multiple_of: Positive = Field(
        description="The MLP channels that a block keeps are a multiple of it: on a GPU int8 needs 4, 4 bits like 64."
    )
    attention_blocks: BlockRange
    mlp_blocks: BlockRange
    text: Literal["rows", "snippets", "packed", "responses"] = Field(
        description="Alpaca rows in their prompts; a piece of each text; texts end to end; the longest responses so."
    )
    samples: Count = Field(description="Calibration rows, or windows of max_length tokens of the texts.")
    noise: float = Field(
        ge=0, le=1, description="Share of their tokens replaced by random ones where activations are measured."
    )
    max_length: Length = Field(description="Tokens of a calibration row.")
    steps: Positive = Field(description="1: one shot; more: score again after each part of the removal.")
    compensate: bool = Field(description="Refit down_proj and o_proj to the dense outputs by least squares.")

    @field_validator("ratios")
    @classmethod
    def _ascending(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if list(ratios) != sorted(ratios):
            raise ValueError(f"must ascend; write {sorted(ratios)}")
        return ratios

    @property
    def ratio(self) -> float:
        """Return the only ratio, where one model is made (cells of the paper's tables)."""
        return self.ratios[0]


class Importance(Section):
    """Mutual information and sensitivity of each unit (paper section 3.2, eq. 7)."""

    samples: Positive = Field(description="Calibration rows.")
    max_length: Length = Field(description="Tokens of a row.")
    clusters: int = Field(
        ge=2, le=_MOST_COUNT, description="k-means codes of a block's output in the estimate of eq. 7."
    )
    outcomes: int = Field(
        ge=2, le=_MOST_COUNT, description="The most frequent predicted tokens told apart; the rest share one outcome."
    )


class Quantize(Section):
    """The layer bank: each linear at each bit-width, with its LoRA initialization (eq. 1-3, 10)."""

    method: Literal["nearest", "calibrated"] = Field(
        description="Rounding to 4 bits: to the nearest code, or with each error made up for by later weights."
    )
    samples: Count = Field(description="Windows of the longest responses that codes and adapters are calibrated on.")
    max_length: Length = Field(description="Tokens of a window.")
    noise: Fraction = Field(description="Share of their tokens replaced by random ones.")
    four_bit: Literal["nf4", "fp4"] = Field(description="The 4-bit type.")
    double_quant: bool = Field(description="Quantize the 4-bit scales too.")
    init: Literal["weighted", "loftq", "gaussian", "pissa"] = Field(description="LoRA initialization.")
    iterations: int = Field(ge=1, le=16, description="LoftQ's alternations between quantizing and low-rank fitting.")
    r: Positive = Field(description="LoRA rank.")
    lora_alpha: Positive = Field(description="LoRA alpha; the adapter is scaled by lora_alpha / r.")


class Recover(Section):
    """Recovery on Alpaca (paper section 3.3, appendix B)."""

    target: Literal["answers", "teacher"] = Field(
        description="answers: the rows' responses. teacher: what the dense model predicts at each of their tokens."
    )
    answers_weight: Fraction = Field(description="Share of the answers in the teacher's target.")
    positions: Literal["response", "all"] = Field(
        description="Which tokens are predicted in training: the response's, or the prompt's too."
    )
    train: Literal["lora", "full"] = Field(
        description="lora: the adapters. full: also all that is not quantized; at 16 bits full-parameter fine-tuning."
    )
    steps: Count = Field(description="Optimizer steps of a trial.")
    batch_size: Positive = Field(description="Rows of an optimizer step.")
    micro_batch_size: Positive = Field(description="Rows that are computed at once.")
    max_length: Length = Field(description="Tokens of a row.")
    learning_rate: float = Field(gt=0, le=1, description="The highest; it rises before and falls after.")
    warmup_steps: Count = Field(description="Optimizer steps over which the learning rate rises.")
    dropout: float = Field(ge=0, le=0.9, description="Of the adapters.")
    validate_every: Count = Field(description="Steps between two validation losses; 0: only after the last step.")
    patience: Count = Field(description="Validation losses in a row that are no lower before it stops; 0: never.")
    save_every: Count = Field(description="Steps after which the state is kept, to be taken up again; 0: never.")
    fast: bool = Field(
        description="On CUDA: packed rows, fused adapters and one vector for the optimizer. No GPU has run them yet."
    )


class Evaluate(Section):
    """The zero-shot benchmarks."""

    tasks: Annotated[tuple[Name, ...], AsTuple, EachOnce] = Field(
        min_length=1, description="lm-eval's tasks by name, averaged equally."
    )
    limit: Count = Field(description="Items of a task in a trial; 0: all.")
    final_limit: Count = Field(description="Items of a task for the built model, of those that no trial saw; 0: all.")
    batch_tokens: Positive = Field(description="Tokens of one forward pass.")
    further: Annotated[tuple[Name, ...], AsTuple, EachOnce] = Field(
        (),
        description="lm-eval's tasks, groups or tags for references, the built model and tables; no trial asks them.",
    )
    num_fewshot: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Examples that a further task shows before each question; null: as lm-eval defines it."
    )
    further_limit: Count = Field(0, description="Items of a further task; 0: all.")
    text: Text | None = Field(None, description="path:<file> of a text whose perplexity is measured, too; null: none.")

    @field_validator("text")
    @classmethod
    def _text_is_there(cls, source: str | None) -> str | None:
        if source is None:
            return None
        return sources.must_be(sources.check(source, ("path:",)), Path.is_file, "text file")


class Search(Section):
    """Bayesian optimization of the bit vector (algorithm 1)."""

    granularity: Granularity = Field(description="What one bit choice covers; block is the paper's.")
    objective: Objective = Field(
        description="What the search raises: the mean accuracy; the mean log-probability of the gold answer; that of a "
        "response token on held-out rows."
    )
    memory: Literal["training", "inference"] = Field(
        "training", description="The peak that the front and the budget are about."
    )
    context: Count = Field(0, description="Tokens whose keys and values the inference memory holds as well.")
    bits: Annotated[tuple[Literal[4, 8, 16], ...], AsTuple, EachOnce] = Field(
        (4, 8), min_length=2, description="What a unit may have, ascending; 16 is not quantized."
    )
    n_trials: Positive = Field(description="Finished trials that the study should hold.")
    n_random: Count = Field(description="Random feasible vectors before the sampler takes over.")
    max_8bit_fraction: Fraction = Field(description="Largest share of units above the lowest bits.")
    average_bits: float | None = Field(
        ge=4, le=16, description="Largest mean of the bits over the units' parameters (B_avg, section 3.2); null: any."
    )
    memory_budget_gib: float | None = Field(gt=0, le=1e6, description="Largest peak memory of a trial; null: none.")
    patience: Count = Field(
        description="Stop when this many sampler trials in a row did not enlarge the front's hypervolume; 0: never. "
        "A study that stopped stays so, whatever n_trials says, until patience is raised or 0.",
    )
    history: Text | None = Field(
        description="A history.json of an earlier search (reports/history.json is this one's); its results teach the "
        "sampler, but are no trials: they do not count and stand on no front. null: none."
    )
    seed_bits: Annotated[tuple[Text, ...], AsTuple, EachOnce] = Field(
        description="Vectors of your own to try first, such as '0.2:4484...', or '4484...' where there is one ratio."
    )
    references: Annotated[tuple[Literal["dense", "llm_pruner", "uniform8"], ...], AsTuple, EachOnce] = Field(
        description="Reference rows measured once, outside the front."
    )
    workers: int | Literal["auto"] = Field(
        1,
        description="Trials side by side: 1, in this process; a number; auto: one for each GPU, on CPUs one. More than "
        "one needs Ray (`make workers`).",
    )
    cluster: Text | None = Field(None, description="Address of a Ray that runs; null: one on this machine, for this.")
    retries: Count = Field(2, description="How many further workers get the trial of one that died.")

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_auto(cls, workers: object) -> object:
        if workers != "auto" and not (type(workers) is int and 1 <= workers <= _MOST_WORKERS):
            raise ValueError(f"must be a number from 1 to {_MOST_WORKERS}, or auto")
        return workers

    @field_validator("history")
    @classmethod
    def _readable_history(cls, history: str | None) -> str | None:
        if history is None:
            return None
        history = str(sources.expanded(history))
        if Path(history).resolve() == Path("reports/history.json").resolve():
            raise ValueError("is the search's own output, removed when it starts; copy it elsewhere and name the copy")
        try:
            read_history(history)
        except ParamsError as error:
            raise ValueError(str(error)) from None
        return history

    @field_validator("seed_bits")
    @classmethod
    def _bit_strings(cls, seeds: tuple[str, ...]) -> tuple[str, ...]:
        for seed in seeds:
            if bits.split(seed) is None:
                raise ValueError(
                    f"{shown(seed)} is no string of 4s, 8s and fs (16 bits), one for each unit, after a ratio and a "
                    "colon where there are several"
                )
        return seeds

    @field_validator("bits")
    @classmethod
    def _from_four_up(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if list(widths) != sorted(widths):
            raise ValueError(f"must ascend; write {sorted(widths)}")
        if widths[0] != 4:
            raise ValueError("must begin with 4: the sensitivities are measured from there; add 4")
        return widths


class Pareto(Section):
    """The front, queried from the MLflow runs."""

    objective: Name = Field(
        description="An objective as of section `search`, or one of evaluate.tasks: what the front and `best` go by."
    )


class Build(Section):
    """The model that is handed over."""

    choose: str = Field(
        pattern=r"^(best|[0-9a-f]{32}|(0(\.[0-9]+)?:)?[48f]+)$",
        max_length=_LONGEST_TEXT,
        description="`best` (highest expected score on the front), the id of a trial's run, or a vector such as "
        "0.2:4484 (4484 where there is one ratio).",
    )
    steps: Count = Field(description="Optimizer steps of the final recovery.")


class Export(Section):
    """The built model in the forms that other programs run."""

    formats: Annotated[tuple[Literal["gguf", "hf"], ...], AsTuple, EachOnce] = Field(
        description="gguf: a file for llama.cpp; hf: a folder for transformers, and a plain one where blocks are alike."
    )
    adapters: Literal["merged", "separate"] = Field(
        "merged", description="In GGUF: added to the weights before these are rounded, or in a file of their own."
    )
    tolerance: float = Field(
        gt=0, le=10, description="Nats that a response token's mean log-probability in llama.cpp may be off."
    )
    rounds: Count = Field(description="Rounds in which the built and the untouched model are timed; 0: they are not.")


class Register(Section):
    """The entry in the model registry."""

    name: Name = Field(pattern=r"^\w[\w.-]*$", description="Name of the model in the registry.")
    alias: Name = Field(pattern=r"^[a-z][\w-]*$", description="Alias of the version to serve.")
    promote: Literal["better", "always", "never"] = Field(
        "better", description="When the alias moves to a new version: if it is better on the same items, always, never."
    )

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if alias == "latest" or re.fullmatch(r"v\d+", alias):
            raise ValueError("is what MLflow's registry calls versions by itself; take another word, such as champion")
        return alias


class Table(Section):
    """The paper's tables 1 and 3: each method at each ratio."""

    ratios: Annotated[tuple[Annotated[float, Field(gt=0, lt=MOST)], ...], AsTuple, EachOnce] = Field(
        min_length=1, description="Fractions of the parameters to remove; each gives a block of rows."
    )
    steps: Count = Field(description="Optimizer steps of a cell's recovery.")
    limit: Count = Field(description="Items of a task that a cell is judged on, from evaluate.limit on; 0: all.")
    n_trials: Positive = Field(description="Trials of QPruner3's search at each ratio.")


class Ablation(Section):
    """The paper's table 2: one factor varied at a time; its steps and items are those of section ``table``."""

    ratio: float = Field(gt=0, lt=MOST, description="Fraction of the parameters to remove.")


class Params(Section):
    """The whole of ``params.yaml``."""

    seed: int = Field(ge=0, lt=2**32, description="All random draws follow from it.")
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto: a GPU if there is one.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="What models compute in; auto: bfloat16 where the device multiplies it in hardware."
    )
    model: Model
    data: Data
    prune: Prune
    importance: Importance
    quantize: Quantize
    recover: Recover
    evaluate: Evaluate
    search: Search
    pareto: Pareto
    build: Build
    export: Export
    register_: Register = Field(alias="register")
    table: Table
    ablation: Ablation


def read_history(path: str) -> list[dict[str, Any]]:
    """Return the results in a ``history.json``.

    Raises:
        ParamsError: There is no such file or it is no history.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        for result in results:
            if not bits.is_text(result["bits"]):
                raise ValueError(f"{shown(result['bits'])} is no string of 4s, 8s and fs")
            if not isinstance(result["ratio"], (int, float)) or not 0 <= result["ratio"] < 1:
                raise ValueError(f"ratio {shown(result['ratio'])} is no share")
            for name in (f"{objective}{ending}" for objective in get_args(Objective) for ending in ("", "_stderr")):
                if not isinstance(result[name], (int, float)) or not math.isfinite(result[name]):
                    raise ValueError(f"{name} {shown(result[name])} is no number")
    except OSError as error:
        raise ParamsError(f"{path} cannot be read ({error.strerror}); name a history.json, or null") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ParamsError(
            f"{path} is no history of a search ({type(error).__name__}: {error}); name the reports/history.json of one"
        ) from None
    return results


def flatten(section: BaseModel, prefix: str = "") -> dict[str, object]:
    """Return a section as dotted keys, for a tracker that knows no nesting."""
    flat: dict[str, object] = {}
    for name, value in section:
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def digest(*parts: object) -> str:
    """Return twelve hex digits that name ``parts`` (sections, strings, numbers, lists, mappings)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
