"""The types that fields of the params share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.errors import UserError

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
Granularity = Literal["block", "group", "linear"]
Objective = Literal["accuracy", "gold_logprob", "response_logprob"]
MOST = 0.9  # of the parameters may go
MOST_COUNT = 10**9
_LONGEST_NAME = 250  # characters
LONGEST_TEXT = 10_000


def _each_once(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each value may be named once; remove the repeated ones")
    return values


Count = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Positive = Annotated[int, Field(gt=0, le=MOST_COUNT)]
Length = Annotated[int, Field(ge=2, le=MOST_COUNT)]  # tokens: the first one predicts the second
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]
RowName = Literal["instruction", "input", "output", "messages", "role", "content", "system", "user", "assistant"]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML knows lists only
EachOnce = AfterValidator(_each_once)


class ParamsError(UserError):
    """The user's mistakes in ``params.yaml``, all of them in one message."""


class Section(BaseModel):
    """A frozen section of ``params.yaml`` that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
