"""What the registered model is asked: inputs of three forms as Alpaca prompts, and params within their limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.prompts import prompt
from pipeline.errors import UserError

_FORMS = (
    "give a list of instructions, a DataFrame with a column `instruction` (and, if you like, `input`), or "
    '{"messages": [{"role": "user", "content": "..."}]}'
)


class RequestError(UserError):
    """An input or a param that the model cannot answer; what to give instead."""


@dataclass(frozen=True)
class Settings:
    """Params of a prediction, with their defaults.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: Share of probability that tokens are drawn from, likeliest first.
        seed: Of the draws.
        stop: Texts that end an answer; they are cut off.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)


def settings(params: Mapping[str, Any] | None, context: int) -> Settings:
    """Return the checked params of a prediction.

    Args:
        params: What was given, or None.
        context: Tokens that the model can hold.

    Raises:
        RequestError: One is unknown or outside its limits.
    """
    given = dict(params or {})
    known = [field.name for field in fields(Settings)]
    if unknown := sorted(set(given) - set(known)):
        raise RequestError(f"unknown params {', '.join(unknown)}; known are {', '.join(known)}")
    checked = Settings(**given | {"stop": list(given.get("stop") or [])})
    _whole("max_new_tokens", checked.max_new_tokens, 1, context - 1)
    _whole("seed", checked.seed, 0, 2**63 - 1)
    if not 0 <= checked.temperature <= 100:
        raise RequestError(f"temperature is {checked.temperature}; it must be from 0 to 100")
    if not 0 < checked.top_p <= 1:
        raise RequestError(f"top_p is {checked.top_p}; it must be above 0 and at most 1")
    if not all(isinstance(text, str) and text for text in checked.stop):
        raise RequestError(f"stop is {checked.stop}; it must be a list of texts that are not empty")
    return checked


def _whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise RequestError(f"{name} is {value}; it must be a whole number from {least} to {most}")


def prompts(asked: object) -> list[str]:
    """Return the prompt of each answer that is wanted.

    Args:
        asked: A list of instructions; a DataFrame with a column ``instruction`` and perhaps ``input``, or with a column
            ``messages``; one conversation as ``{"messages": [...]}`` or as the list itself.

    Raises:
        RequestError: It is none of these, or a text is missing or empty.
    """
    if isinstance(asked, pd.DataFrame):
        return _of_frame(asked)
    if isinstance(asked, Mapping):
        if set(asked) != {"messages"}:
            raise RequestError(f"the input has the keys {', '.join(map(str, asked)) or 'none'}; {_FORMS}")
        return [_conversation(asked["messages"], "messages")]
    if isinstance(asked, np.ndarray | pd.Series):
        asked = asked.tolist()
    if not isinstance(asked, Sequence) or isinstance(asked, str | bytes) or not asked:
        raise RequestError(f"the input is {_short(asked)}; {_FORMS}")
    if isinstance(asked[0], Mapping):
        return [_conversation(asked, "messages")]
    return [prompt(_text(text, f"instruction {number}")) for number, text in enumerate(asked)]


def _of_frame(frame: pd.DataFrame) -> list[str]:
    columns = set(map(str, frame.columns))
    if columns == {"messages"}:
        return [_conversation(row, f"row {number}") for number, row in enumerate(frame["messages"])]
    if not {"instruction"} <= columns <= {"instruction", "input"} or frame.empty:
        named = ", ".join(map(str, frame.columns)) or "none"
        raise RequestError(f"the input has {len(frame)} rows and the columns {named}; {_FORMS}")
    texts = [_text(text, f"instruction {number}") for number, text in enumerate(frame["instruction"])]
    inputs: Iterable[object] = frame["input"] if "input" in columns else [""] * len(texts)
    return [
        prompt(text, "" if _absent(context) else _string(context, f"input {number}"))
        for number, (text, context) in enumerate(zip(texts, inputs, strict=True))
    ]


def _conversation(messages: object, where: str) -> str:
    """Return a conversation as one prompt: earlier turns with their answers, the last one open.

    A system message stands before the first instruction.
    """
    if isinstance(messages, np.ndarray):
        messages = messages.tolist()
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"{where}: is {_short(messages)}; {_FORMS}")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError(f"{where}: {_short(message)} is no message with `role` and `content`; {_FORMS}")
    roles = [message["role"] for message in messages]
    texts = [_text(message["content"], f"{where}, content of message {n}") for n, message in enumerate(messages)]
    system = [texts.pop(0)] if roles[0] == "system" else []
    turns = roles[len(system) :]
    if turns != [("user", "assistant")[n % 2] for n in range(len(turns))] or len(turns) % 2 == 0:
        raise RequestError(
            f"{where}: the roles are {', '.join(map(str, roles))}; they must be user and assistant in turn, the last "
            "one user; one system message may come first"
        )
    texts[0] = "\n".join([*system, texts[0]])
    return "".join(prompt(text) if role == "user" else f"{text}\n\n" for role, text in zip(turns, texts, strict=True))


def _text(value: object, where: str) -> str:
    text = "" if _absent(value) else _string(value, where)
    if not text.strip():
        raise RequestError(f"{where} is empty; give a text")
    return text


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} is {_short(value)}; it must be a text")
    return value


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
