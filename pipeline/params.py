"""The one reader of ``params.yaml``: frozen, typed sections, every fault reported at once.

Each section is named after the stage (module, DVC stage, MLproject entry point) that reads it.
Sections that several stages share (``model``, ``data``, ``recover``, ``tasks``) are named after the module.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from pipeline import combinations, fits
from pipeline.architecture import FAMILIES
from pipeline.data import definitions
from pipeline.errors import UserError

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
Granularity = Literal["block", "group", "linear"]
Objective = Literal["accuracy", "gold_logprob", "response_logprob"]
SOURCES = {
    "hub:": (re.compile(r"^hub:[\w.-]+/[\w.-]+@[\w./-]+$"), "hub:<org>/<name>@<revision>"),
    "package:": (re.compile(r"^package:[\w.-]+==[\w.]+$"), "package:<name>==<version>"),
    "path:": (re.compile(r"^path:.+$"), "path:<file or folder>"),
}
SOURCE_FORMS = ", ".join(form for _, form in SOURCES.values())
BITS = re.compile(r"^[48]+$")

MOST = 0.9  # of the parameters may go
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML knows lists only


def _task(name: str) -> str:
    definitions.check(name)
    return name


Task = Annotated[str, AfterValidator(_task)]


class ParamsError(UserError):
    """The user's mistakes in ``params.yaml``, all of them in one message."""


class Section(BaseModel):
    """A frozen section of ``params.yaml`` that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    """The model to compress."""

    source: str = Field(description=f"Where the model comes from: {SOURCE_FORMS}.")
    sha256: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="Checksum of a package's wheel; empty: not checked."
    )

    @field_validator("source")
    @classmethod
    def _known_form(cls, source: str) -> str:
        return _source(source)


class Data(Section):
    """The rows for calibration and recovery, and the benchmark items."""

    alpaca: str = Field(description="Alpaca-format JSONL file: path:<file> or hub:<org>/<name>@<revision>.")
    benchmarks: str = Field(description="Benchmark items: path:<folder of <task>.jsonl> or the word `hub`.")
    validation_rows: Positive = Field(description="Rows held out of calibration and recovery for the validation loss.")
    max_skipped: Fraction = Field(0.01, description="Share of a file's rows or items that may be left out as faulty.")

    @field_validator("alpaca")
    @classmethod
    def _known_form(cls, source: str) -> str:
        return _must_be(_source(source, ("hub:", "path:")), Path.is_file, "file with a row a line")

    @field_validator("benchmarks")
    @classmethod
    def _known_place(cls, source: str) -> str:
        if source == "hub":
            return source
        return _must_be(_source(source, ("path:",), " or the word hub"), Path.is_dir, "folder of <task>.jsonl")


class BlockRange(Section):
    """Blocks ``first`` to ``last``, both included; -1 is the last block of the model, -2 the one before it."""

    first: int = Field(ge=0)
    last: int


class Prune(Section):
    """Structured pruning (paper section 3.1)."""

    ratio: float = Field(ge=0, lt=MOST, description="Fraction of the whole model's parameters to remove.")
    importance: Literal[
        "taylor1", "taylor2", "taylor_mix", "magnitude", "random", "activation", "fisher_mask", "surgeon"
    ] = Field(
        description="Score of a coupled structure; taylor1 is the paper's Element1, taylor2 its Element2.",
    )
    level: Literal["parameter", "vector"] = Field(description="Take absolute values before or after summing a row.")
    aggregate: Literal["sum", "mean", "prod", "max", "last"] = Field(description="From a group's members to its score.")
    scope: Literal["local", "global"] = Field(description="The same share of each block, or one ranking of all groups.")
    structures: Annotated[tuple[Literal["attention", "mlp"], ...], AsTuple] = Field(
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
    samples: int = Field(ge=0, description="Calibration rows, or windows of max_length tokens of the texts.")
    noise: float = Field(
        ge=0, le=1, description="Share of their tokens replaced by random ones where activations are measured."
    )
    max_length: Positive = Field(description="Tokens of a calibration row.")
    steps: Positive = Field(description="1: one shot; more: score again after each part of the removal.")
    compensate: bool = Field(description="Refit down_proj and o_proj to the dense outputs by least squares.")


class Importance(Section):
    """Mutual information and sensitivity of each unit (paper section 3.2, eq. 7)."""

    samples: Positive = Field(description="Calibration rows.")
    max_length: Positive = Field(description="Tokens of a row.")
    clusters: int = Field(ge=2, description="k-means codes of a block's output in the estimate of eq. 7.")
    outcomes: int = Field(
        ge=2, description="The most frequent predicted tokens told apart; the rest share one outcome."
    )


class Quantize(Section):
    """The layer bank: each linear at each bit-width, with its LoRA initialization (eq. 1-3, 10)."""

    four_bit: Literal["nf4", "fp4"] = Field(description="The 4-bit type.")
    double_quant: bool = Field(description="Quantize the 4-bit scales too.")
    init: Literal["loftq", "gaussian", "pissa"] = Field(description="LoRA initialization.")
    iterations: int = Field(ge=1, le=16, description="LoftQ's alternations between quantizing and low-rank fitting.")
    r: Positive = Field(description="LoRA rank.")
    lora_alpha: Positive = Field(description="LoRA alpha; the adapter is scaled by lora_alpha / r.")


class Recover(Section):
    """Recovery on Alpaca (paper section 3.3, appendix B)."""

    train: Literal["lora", "full"] = Field(
        description="lora: the adapters. full: also all that is not quantized; at 16 bits full-parameter fine-tuning."
    )

    steps: int = Field(ge=0, description="Optimizer steps of a trial.")
    batch_size: Positive
    micro_batch_size: Positive
    max_length: Positive
    learning_rate: float = Field(gt=0, le=1)
    warmup_steps: int = Field(ge=0)
    dropout: float = Field(ge=0, le=0.9)
    validate_every: int = Field(ge=0, description="Steps between two validation losses; 0: only after the last step.")
    patience: int = Field(ge=0, description="Validation losses in a row that are no lower before it stops; 0: never.")
    save_every: int = Field(ge=0, description="Steps after which the state is kept, to be taken up again; 0: never.")


class Evaluate(Section):
    """The zero-shot benchmarks."""

    tasks: Annotated[tuple[Task, ...], AsTuple] = Field(
        min_length=1, description="lm-eval's tasks by name, averaged equally."
    )
    limit: int = Field(ge=0, description="Items of a task in a trial; 0: all.")
    final_limit: int = Field(
        ge=0, description="Items of a task for the built model, of those that no trial saw; 0: all."
    )
    batch_tokens: Positive = Field(description="Tokens of one forward pass.")

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("each task may be named once; remove the repeated ones")
        return tasks


class Search(Section):
    """Bayesian optimization of the bit vector (algorithm 1)."""

    granularity: Granularity = Field(description="What one bit choice covers; block is the paper's.")
    objective: Objective = Field(
        description="What the search raises: the mean accuracy; the mean log-probability of the gold answer; that of a "
        "response token on held-out rows."
    )
    n_trials: Positive = Field(description="Finished trials that the study should hold.")
    n_random: int = Field(ge=0, description="Random feasible vectors before the sampler takes over.")
    max_8bit_fraction: Fraction = Field(description="Largest share of units at 8 bits.")
    average_bits: float | None = Field(
        ge=4, le=8, description="Largest mean of the bits over the units' parameters (B_avg, section 3.2); null: any."
    )
    memory_budget_gib: float | None = Field(gt=0, description="Largest peak memory of a trial; null: none.")
    patience: int = Field(
        ge=0,
        description="Stop when this many sampler trials in a row did not enlarge the front's hypervolume; 0: never. "
        "A study that stopped stays so, whatever n_trials says, until patience is raised or 0.",
    )
    history: str | None = Field(
        description="A history.json of an earlier search (reports/history.json is this one's); its results teach the "
        "sampler, but are no trials: they do not count and stand on no front. null: none."
    )
    seed_bits: Annotated[tuple[str, ...], AsTuple] = Field(
        description="Vectors of your own to try first, such as '4484...'."
    )
    references: Annotated[tuple[Literal["dense", "llm_pruner", "uniform8"], ...], AsTuple] = Field(
        description="Reference rows measured once, outside the front."
    )

    @field_validator("history")
    @classmethod
    def _readable_history(cls, history: str | None) -> str | None:
        if history is not None and Path(history).resolve() == Path("reports/history.json").resolve():
            raise ValueError("is the search's own output, removed when it starts; copy it elsewhere and name the copy")
        if history is not None:
            read_history(history)
        return history

    @field_validator("seed_bits")
    @classmethod
    def _bit_strings(cls, seeds: tuple[str, ...]) -> tuple[str, ...]:
        for bits in seeds:
            if not BITS.match(bits):
                raise ValueError(f"{bits!r} is no string of 4s and 8s, one for each unit")
        return seeds


class Pareto(Section):
    """The front, queried from the MLflow runs."""

    objective: str = Field(
        description="An objective as of section `search`, or one of evaluate.tasks: what the front and `best` go by."
    )


class Build(Section):
    """The model that is handed over."""

    choose: str = Field(
        pattern=r"^(best|[0-9a-f]{32}|[48]+)$",
        description="`best` (highest expected score on the front), the id of a trial's run, or a bit string.",
    )
    steps: int = Field(ge=0, description="Optimizer steps of the final recovery.")


class Register(Section):
    """The entry in the model registry."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    alias: str = Field(pattern=r"^[a-z][\w-]*$")
    promote: Literal["better", "always", "never"]

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if alias == "latest" or re.fullmatch(r"v\d+", alias):
            raise ValueError("is what MLflow's registry calls versions by itself; take another word, such as champion")
        return alias


class Table(Section):
    """The paper's tables 1 and 3: each method at each ratio."""

    ratios: Annotated[tuple[Annotated[float, Field(gt=0, lt=MOST)], ...], AsTuple] = Field(
        min_length=1, description="Fractions of the parameters to remove; each gives a block of rows."
    )
    steps: int = Field(ge=0, description="Optimizer steps of a cell's recovery.")
    limit: int = Field(ge=0, description="Items of a task that a cell is judged on, from evaluate.limit on; 0: all.")
    n_trials: Positive = Field(description="Trials of QPruner3's search at each ratio.")

    @field_validator("ratios")
    @classmethod
    def _each_once(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ratios)) < len(ratios):
            raise ValueError("each ratio may be named once; remove the repeated ones")
        return ratios


class Ablation(Section):
    """The paper's table 2: one factor varied at a time; its steps and items are those of section ``table``."""

    ratio: float = Field(gt=0, lt=MOST, description="Fraction of the parameters to remove.")


class Params(Section):
    """The whole of ``params.yaml``."""

    seed: int = Field(ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"]
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
    register_: Register = Field(alias="register")
    table: Table
    ablation: Ablation


def _source(source: str, kinds: tuple[str, ...] = tuple(SOURCES), more: str = "") -> str:
    """Check the form of a source and, for a path, that it exists."""
    if not any(source.startswith(kind) and SOURCES[kind][0].match(source) for kind in kinds):
        raise ValueError(f"must be of the form {', '.join(SOURCES[kind][1] for kind in kinds)}{more}")
    if source.startswith("path:"):
        path = Path(source.removeprefix("path:"))
        try:
            there = path.exists()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); name a file or folder that can") from None
        if not there:
            raise ValueError(f"{path} does not exist; name a file or folder that does")
    return source


def _must_be(source: str, kind: Callable[[Path], bool], what: str) -> str:
    if source.startswith("path:") and not kind(Path(source.removeprefix("path:"))):
        raise ValueError(f"{source.removeprefix('path:')} is no {what}; name one")
    return source


def read_history(path: str) -> list[dict[str, Any]]:
    """Return the results in a ``history.json``.

    Raises:
        ValueError: There is no such file or it is no history.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        for one in results:
            if not BITS.match(one["bits"]):
                raise ValueError(f"{one['bits']!r} is no string of 4s and 8s")
            for name in (f"{objective}{ending}" for objective in get_args(Objective) for ending in ("", "_stderr")):
                if not isinstance(one[name], (int, float)) or not math.isfinite(one[name]):
                    raise ValueError(f"{name} {one[name]!r} is no number")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a history.json, or null") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no history of a search ({type(error).__name__}: {error}); name the reports/history.json of one"
        ) from None
    return results


def _objective_is_measured(raw: Any) -> str | None:
    objective, tasks = raw["pareto"]["objective"], raw["evaluate"]["tasks"]
    if isinstance(objective, str) and objective not in (*get_args(Objective), *tasks):
        return (
            f"pareto.objective: {objective!r} is not among evaluate.tasks, so nothing measures it; "
            f"use one of {', '.join((*get_args(Objective), *tasks))}"
        )
    return None


def _ratios(raw: Any) -> Iterator[tuple[str, float]]:
    """Yield every pruning ratio that the document asks for, with its key; what is itself at fault is left out."""
    for key, name in (("prune", "ratio"), ("table", "ratios"), ("ablation", "ratio")):
        section = raw.get(key)
        value = section.get(name) if isinstance(section, dict) else None
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, (int, float)) and 0 <= one < MOST:
                yield f"{key}.{name}", one


def _sound(section: type[Any], raw: Any) -> Any:
    """Return a section without the fields that are at fault: what reads one of them stumbles, the rest is judged."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        wrong = {fault["loc"][0] for fault in error.errors() if fault["loc"]}
    if not isinstance(raw, dict):
        raise TypeError("no section")
    sound = [name for name in section.model_fields if name in raw and name not in wrong]
    kinds = {name: TypeAdapter(section.model_fields[name].annotation) for name in sound}
    return section.model_construct(**{name: kind.validate_python(raw[name]) for name, kind in kinds.items()})


def _of_the_model(raw: Any) -> tuple[Callable[[Any], str | None], ...]:
    """Return the checks against the model's config; none if that is not at hand or of no known family."""
    try:
        config = fits.at_hand(raw["model"]["source"])
    except (KeyError, TypeError, AttributeError, ValueError, OSError):
        return ()  # at fault itself, and listed as such
    if config is None or getattr(config, "model_type", None) not in FAMILIES:
        return ()
    return (
        lambda raw: fits.dense(config),
        lambda raw: fits.block_range(config, "attention_blocks", _sound(Prune, raw["prune"]).attention_blocks),
        lambda raw: fits.block_range(config, "mlp_blocks", _sound(Prune, raw["prune"]).mlp_blocks),
        *(
            lambda raw, key=key, ratio=ratio: fits.ratio(config, _sound(Prune, raw["prune"]), key, ratio)
            for key, ratio in _ratios(raw)
        ),
        lambda raw: fits.rank(config, _sound(Quantize, raw["quantize"])),
        *(
            lambda raw, name=name: fits.length(config, name, raw[name]["max_length"])
            for name in ("prune", "importance", "recover")
        ),
        lambda raw: fits.budget(
            config,
            raw["search"]["memory_budget_gib"],
            *(_sound(kind, raw[kind.__name__.lower()]) for kind in (Prune, Quantize, Recover, Evaluate)),
        ),
        lambda raw: fits.seed_bits(config, _sound(Search, raw["search"])),
        lambda raw: fits.choice(config, _sound(Build, raw["build"]), raw["search"]["granularity"]),
    )


_STUMBLES = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError, RuntimeError)


def _combination_faults(raw: Any) -> list[str]:
    found = []
    for check in (*combinations.CHECKS, _objective_is_measured, *_of_the_model(raw)):
        try:
            fault = check(raw)
        except _STUMBLES:
            continue  # what it reads is itself at fault, and listed as such
        if fault:
            found.append(f"  {fault}")
    return found


def parse(raw: Any, origin: str = "params.yaml") -> Params:
    """Turn a parsed YAML document into params.

    Args:
        raw: The document.
        origin: What to call it in messages.

    Raises:
        ParamsError: With one line for each fault: the key, the value received, what is allowed.
    """
    if not isinstance(raw, dict):
        raise ParamsError(f"{origin} must be a mapping of sections; copy one of presets/ over it")
    faults = _combination_faults(raw)
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        faults = [_line(fault) for fault in error.errors()] + faults
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ParamsError("\n".join([f"{origin} has {count}:", *faults]))
    return params


def _line(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
    message = fault["msg"].removeprefix("Value error, ")
    received = fault["input"]
    if fault["type"] == "missing":
        return f"  {key}: missing; add it (see presets/default.yaml)"
    if fault["type"] == "extra_forbidden":
        return f"  {key}: unknown key (value {received!r}); remove it or correct its spelling"
    shown = "" if isinstance(received, (dict, BaseModel)) else f" (value {received!r})"
    return f"  {key}: {message}{shown}"


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check ``params.yaml``, with the overrides that an entry point was given.

    ``QPRUNER_OVERRIDES`` holds a JSON object of dotted keys, such as ``{"search.n_trials": 20}``.

    Raises:
        ParamsError: The file is missing, is no YAML, or has faults.
    """
    path = Path(path)
    if not path.exists():
        raise ParamsError(
            f"{path} does not exist here ({Path.cwd()}); run from the project's root or copy presets/default.yaml"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is no valid YAML: {error}") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from None
    for key, value in json.loads(os.environ.get("QPRUNER_OVERRIDES", "{}")).items():
        *sections, name = key.split(".")
        target = raw
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):  # else the section is at fault, and parse says so
            target[name] = value
    return parse(raw, str(path))


def flatten(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return a section as dotted keys, for a tracker that knows no nesting."""
    flat: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def digest(*parts: Any) -> str:
    """Return twelve hex digits that name ``parts`` (sections, strings, numbers, lists, mappings)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def uses_hub(path: str | Path = "params.yaml") -> bool:
    """Return whether any source is on a hub, without judging the rest of the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(re.search(r"\b(source|alpaca|benchmarks)['\"]?:\s*['\"]?hub", text))
