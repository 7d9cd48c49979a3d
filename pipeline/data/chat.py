"""Conversations: rows of messages as users have them, and as text by a model's own chat template.

A template writes what the model is asked (messages, then the words that open an answer) and what it is to say (the same
with the answer). What the second adds to the first is the assistant's, whatever the template looks like.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from pipeline.data.items import has_surrogate, short
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
FIELDS = ("messages", "role", "content")
Messages = Sequence[Mapping[str, str]]  # with role and content
Piece = tuple[str, bool]  # a stretch of text, and whether the assistant says it
# Some templates write the day into their system message: a row must be the same tokens tomorrow. What follows the macro
# keeps a line break at the template's beginning.
_ONE_DAY = "{% macro strftime_now(format) %}01 January 2026{% endmacro %}{{ '' }}"


class ChatError(UserError):
    """A conversation that a model's chat template cannot write; says why."""


def of_columns(row: object, names: Mapping[str, str | None]) -> object:
    """Return a row with our names for its fields and roles, further ones left out; what is no conversation as it is.

    Args:
        row: The row.
        names: Our name of a field or a role -> the row's, where it differs.
    """
    if not isinstance(row, dict):
        return row
    theirs = {field: names.get(field) or field for field in FIELDS}
    roles = {names.get(role) or role: role for role in ROLES}
    messages = row.get(theirs["messages"])
    if not isinstance(messages, list):
        return {"messages": messages}

    def named(message: object) -> object:
        if not isinstance(message, dict) or not {theirs["role"], theirs["content"]} <= message.keys():
            return message
        role = message[theirs["role"]]
        known = roles.get(role, role) if isinstance(role, str) else role
        return {"role": known, "content": message[theirs["content"]]}

    return {"messages": [named(message) for message in messages]}


def fault(row: object) -> str:
    """Return why a row of messages teaches nothing; an empty text if it does."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return f"needs a list of messages; {'it is' if messages is None else 'that is'} {short(messages or row)}"
    for number, message in enumerate(messages, 1):
        if wrong := _message_fault(message, first=number == 1):
            return f"message {number} {wrong}"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return "it has no message of the assistant, so nothing in it is learned"
    if "user" not in roles[: roles.index("assistant")]:
        return "the assistant speaks before the user has asked anything"
    return ""


def _message_fault(message: object, first: bool) -> str:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return f"is {short(message)}, and needs role and content"
    role, content = message["role"], message["content"]
    if role not in ROLES:
        return f"has the role {short(role)}; known are {', '.join(ROLES)} (data.names says what rows call them)"
    if role == "system" and not first:
        return "is the system's, which may only come first"
    if not isinstance(content, str):
        return f"has the content {short(content)}, not a text"
    if has_surrogate(content):
        return "holds half of a surrogate pair, which is no text"
    if role != "system" and not content.strip():
        return "is empty"
    return ""


def written(messages: Messages, tokenizer: PreTrainedTokenizerBase, answered: bool) -> str:
    """Return a conversation as text by a tokenizer's chat template.

    Models that think aloud are told not to: rows hold answers.

    Args:
        messages: The conversation.
        tokenizer: Has a chat template.
        answered: The last message is the assistant's; else the text ends where an answer begins.

    Raises:
        ChatError: The template refuses the conversation.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _ONE_DAY + template
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                add_generation_prompt=not answered,
                tokenize=False,
                enable_thinking=False,
            )
        )
    except TemplateError as error:
        raise ChatError(f"the model's chat template refuses it: {error}") from None


def passages(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[list[Piece]]:
    """Return a conversation as texts to train on, in pieces, so that every answer follows what the model is asked then.

    One text, with all the answers in it, where the template writes a longer conversation as a continuation of the
    shorter. Some change earlier turns (they take thoughts out, say): from there on it is a text of its own.

    Raises:
        ChatError: The template refuses the conversation or changes an answer.
    """
    found: list[list[Piece]] = []
    text = ""  # of the last passage
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        whole = written(messages[: place + 1], tokenizer, answered=True)
        start = len(os.path.commonprefix([written(messages[:place], tokenizer, answered=False), whole]))
        said = whole[start:].rstrip()  # templates end a turn with a line break that no model writes
        if message["content"].strip() not in said:
            raise ChatError(f"the model's chat template does not hold the answer of message {place + 1} as it is")
        if not found or not whole[:start].startswith(text):
            found.append([])
            text = ""
        found[-1] += [(whole[len(text) : start], False), (said, True)]
        text = whole[:start] + said
    return found


def template_fault(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return why a tokenizer's chat template cannot write a conversation; an empty text if it can."""
    try:
        passages(messages, tokenizer)
    except ChatError as error:
        return str(error)
    return ""
