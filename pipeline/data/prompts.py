"""Alpaca's prompt, and a row of Alpaca as a conversation.

Imports nothing heavy: whoever serves a model checks requests before torch is needed.
"""

from __future__ import annotations


def prompt(instruction: str, context: str = "") -> str:
    """Return Alpaca's prompt for an instruction, with or without an input."""
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def conversation(instruction: str, context: str = "", output: str | None = None) -> list[dict[str, str]]:
    """Return an instruction, with or without an input and an answer, as the messages of a chat."""
    asked = f"{instruction}\n\n{context}" if context else instruction
    answer = [] if output is None else [{"role": "assistant", "content": output}]
    return [{"role": "user", "content": asked}, *answer]
