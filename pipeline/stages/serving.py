"""What the registered model is asked: instructions in its prompt, chats as messages, params within their limits.

Inputs come as Python users give them, and as MLflow's server makes them of ``instances``, ``inputs``,
``dataframe_split``, ``dataframe_records`` and ``messages``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.prompts import prompt
from pipeline.errors import UserError

Conversation = list[dict[str, str]]  # messages with role and content, the last one the user's
Asking = Callable[[str, str], "str | Conversation"]  # makes what is asked of an instruction and its input

_FORMS = (
    "give a list of instructions, a DataFrame with a column `instruction` (and, if you like, `input`), or "
    '{"messages": [{"role": "user", "content": "..."}]}'
)
_OPENAI = {"max_tokens": "max_new_tokens"}  # a chat may say it as OpenAI does


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
    stop = given.get("stop")
    if not isinstance(stop, list | tuple | np.ndarray | None):
        raise RequestError(f"stop is {_short(stop)}; it must be a list of texts")
    checked = Settings(**given | {"stop": [] if stop is None else list(stop)})
    _whole("max_new_tokens", checked.max_new_tokens, 1, context - 1)
    _whole("seed", checked.seed, 0, 2**63 - 1)
    if not _number(checked.temperature) or not 0 <= checked.temperature <= 100:
        raise RequestError(f"temperature is {_short(checked.temperature)}; it must be a number from 0 to 100")
    if not _number(checked.top_p) or not 0 < checked.top_p <= 1:
        raise RequestError(f"top_p is {_short(checked.top_p)}; it must be a number above 0 and at most 1")
    if not all(isinstance(text, str) and text for text in checked.stop):
        raise RequestError(f"stop is {checked.stop}; it must be a list of texts that are not empty")
    return checked


def _whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise RequestError(f"{name} is {_short(value)}; it must be a whole number from {least} to {most}")


def _number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_chat(asked: object) -> bool:
    """Return whether an input is one chat in OpenAI's form, which is answered in that form."""
    if not isinstance(asked, Mapping) or "messages" not in asked:
        return False
    messages = _plain(asked["messages"])
    return not (isinstance(messages, list) and messages and isinstance(messages[0], list))


def questions(asked: object, asking: Asking = prompt) -> tuple[list[str | Conversation], dict[str, Any]]:
    """Return (what each wanted answer is to, params that stand in the input itself): prompts or conversations.

    Args:
        asked: A list of instructions; columns ``instruction`` and perhaps ``input``, or ``messages``, as a DataFrame or
            a mapping; one conversation as the list itself or as ``{"messages": [...]}``, params beside it.
        asking: How the model is asked an instruction: in Alpaca's prompt, or as a conversation.

    Raises:
        RequestError: It is none of these, or a text is missing or empty.
    """
    if isinstance(asked, Mapping) and is_chat(asked):
        given = {_OPENAI.get(str(key), str(key)): value for key, value in asked.items() if key != "messages"}
        return [_conversation(asked["messages"], "messages")], given
    if isinstance(asked, pd.DataFrame | Mapping):
        return _of_frame(_frame(asked), asking), {}
    asked = _plain(asked)
    if not isinstance(asked, Sequence) or isinstance(asked, str | bytes) or not asked:
        raise RequestError(f"the input is {_short(asked)}; {_FORMS}")
    if isinstance(asked[0], Mapping):
        return [_conversation(asked, "messages")], {}
    return [asking(_text(text, f"instruction {number}"), "") for number, text in enumerate(asked)], {}


def _frame(asked: pd.DataFrame | Mapping[Any, Any]) -> pd.DataFrame:
    """Return columns as a DataFrame; MLflow's server makes a mapping of arrays out of ``instances`` with names."""
    if isinstance(asked, pd.DataFrame):
        return asked
    columns = {name: _plain(column) for name, column in asked.items()}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        raise RequestError(f"the input has the keys {', '.join(map(str, columns)) or 'none'}; {_FORMS}")
    if len({len(column) for column in columns.values()}) > 1:
        sizes = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise RequestError(f"the columns differ in length ({sizes}); give each row all of them")
    return pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in columns.items()})


def _of_frame(frame: pd.DataFrame, asking: Asking) -> list[str | Conversation]:
    columns = set(map(str, frame.columns))
    if columns == {"messages"} and not frame.empty:
        return [_conversation(row, f"row {number}") for number, row in enumerate(frame["messages"])]
    if not {"instruction"} <= columns <= {"instruction", "input"} or frame.empty:
        named = ", ".join(map(str, frame.columns)) or "none"
        raise RequestError(f"the input has {len(frame)} rows and the columns {named}; {_FORMS}")
    texts = [_text(text, f"instruction {number}") for number, text in enumerate(frame["instruction"])]
    inputs: Iterable[object] = frame["input"] if "input" in columns else [""] * len(texts)
    return [
        asking(text, "" if _absent(context) else _string(context, f"input {number}"))
        for number, (text, context) in enumerate(zip(texts, inputs, strict=True))
    ]


def _conversation(messages: object, where: str) -> Conversation:
    """Return the messages of a conversation that can be answered: turns of user and assistant, the last one open."""
    messages = _plain(messages)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"{where}: is {_short(messages)}; {_FORMS}")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError(f"{where}: {_short(message)} is no message with `role` and `content`; {_FORMS}")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[n % 2] for n in range(len(turns))] or len(turns) % 2 == 0:
        raise RequestError(
            f"{where}: the roles are {', '.join(map(str, roles))}; they must be user and assistant in turn, the last "
            "one user; one system message may come first"
        )
    texts = [_text(message["content"], f"{where}, content of message {n}") for n, message in enumerate(messages)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def flat(conversation: Conversation) -> str:
    """Return a conversation as one Alpaca prompt: earlier turns with their answers, the last one open.

    For models without a chat template. A system message stands before the first instruction.
    """
    system = [message["content"] for message in conversation if message["role"] == "system"]
    turns = [message for message in conversation if message["role"] != "system"]
    first = "\n".join([*system, turns[0]["content"]])
    rest = (prompt(turn["content"]) if turn["role"] == "user" else f"{turn['content']}\n\n" for turn in turns[1:])
    return "".join([prompt(first), *rest])


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


def _plain(value: Any) -> Any:
    """Return an array's or a column's values as a list, and anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | pd.Series) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
