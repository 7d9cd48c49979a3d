"""The sections that say how a model is made and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from pipeline import sources
from pipeline.params.fields import (
    MOST,
    MOST_COUNT,
    AsTuple,
    Count,
    EachOnce,
    Fraction,
    Length,
    Name,
    Positive,
    RowName,
    Section,
    Text,
)

# A number stands for a list of it.
_ALONE = BeforeValidator(
    lambda value: (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value
)


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
    last: int = Field(ge=-MOST_COUNT, le=MOST_COUNT)


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
        """Return the first ratio: for what has one alone, as cells of the paper's tables do, not for a search."""
        return self.ratios[0]


class Importance(Section):
    """Mutual information and sensitivity of each unit (paper section 3.2, eq. 7)."""

    samples: Positive = Field(description="Calibration rows.")
    max_length: Length = Field(description="Tokens of a row.")
    clusters: int = Field(
        ge=2, le=MOST_COUNT, description="k-means codes of a block's output in the estimate of eq. 7."
    )
    outcomes: int = Field(
        ge=2, le=MOST_COUNT, description="The most frequent predicted tokens told apart; the rest share one outcome."
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
