"""The sections that say which models are tried, and what becomes of the best one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from pipeline import bits, sources
from pipeline.errors import shown
from pipeline.params.fields import (
    LONGEST_TEXT,
    MOST,
    AsTuple,
    Count,
    EachOnce,
    Fraction,
    Granularity,
    Name,
    Objective,
    ParamsError,
    Positive,
    Section,
    Text,
)

_MOST_WORKERS = 1000


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
        max_length=LONGEST_TEXT,
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
