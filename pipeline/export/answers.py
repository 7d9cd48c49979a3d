"""Whether an exported file answers like the built model: log-probabilities of held-out responses, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.data.alpaca import Example
from pipeline.export.limits import ExportError
from pipeline.export.llama import Llama, Row


@dataclass(frozen=True)
class Agreement:
    """How an exported model's log-probabilities of response tokens compare with the built model's, in nats.

    Attributes:
        difference: Mean of (exported - built) over the tokens; below zero where the exported one is worse.
        stderr: Its standard error, rows taken as independent.
        apart: Mean absolute difference of a token.
        tokens: How many were compared.
    """

    difference: float
    stderr: float
    apart: float
    tokens: int


def rows_of(examples: Sequence[Example]) -> list[Row]:
    """Return what stands before each response, and the response, as tokens."""
    return [
        (example.tokens[:start], example.tokens[start:end]) for example in examples for start, end in example.responses
    ]


@torch.inference_mode()
def log_probabilities(model: nn.Module, rows: Sequence[Row]) -> list[list[float]]:
    """Return a model's log-probability of each token of each row's response, in nats."""
    device = next(model.parameters()).device
    found = []
    for prompt, response in rows:
        tokens = torch.tensor([[*prompt, *response]], device=device)
        logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logits.gather(1, tokens[0, len(prompt) :, None])[:, 0].tolist())
    return found


def compare(exported: Sequence[Sequence[float | None]], built: Sequence[Sequence[float]]) -> Agreement:
    """Compare two models' log-probabilities of the same tokens; those that one does not tell are left out."""
    pairs = [
        [other - own for other, own in zip(theirs, ours, strict=True) if other is not None]
        for theirs, ours in zip(exported, built, strict=True)
    ]
    tokens = sum(map(len, pairs))
    mean = sum(map(sum, pairs)) / tokens
    squares = sum((sum(row) - mean * len(row)) ** 2 for row in pairs)
    error = math.sqrt(squares * len(pairs) / max(len(pairs) - 1, 1)) / tokens
    return Agreement(mean, error, sum(abs(value) for row in pairs for value in row) / tokens, tokens)


def check_tokens(llama: Llama, texts: Sequence[str], tokens: Sequence[Sequence[int]], special: bool = True) -> None:
    """Check that llama.cpp splits texts into the same tokens.

    Args:
        llama: At work.
        texts: The texts.
        tokens: Their tokens by the model's own tokenizer.
        special: Whether a tokenizer puts its own token before a text; a chat template writes it itself.

    Raises:
        ExportError: It does not.
    """
    wrong = [text for text, own in zip(texts, tokens, strict=True) if llama.tokenize(text, special) != list(own)]
    if wrong:
        raise ExportError(
            f"llama.cpp splits {len(wrong)} of {len(texts)} held-out prompts into other tokens than the model's "
            f"tokenizer, such as {wrong[0][:80]!r}; nothing was written. Take export.formats: [hf]"
        )


def judge(agreement: Agreement, tolerance: float) -> None:
    """Check that a file answers like the built model.

    Raises:
        ExportError: Its mean log-probability is further away than the tolerance.
    """
    if not abs(agreement.difference) <= tolerance:
        raise ExportError(
            f"the GGUF file's mean log-probability of a held-out response token is {agreement.difference:+.4f} ± "
            f"{agreement.stderr:.4f} nats from the built model's; export.tolerance allows {tolerance}. Nothing was "
            "written. Raise export.tolerance, set export.adapters to separate, or take export.formats: [hf]"
        )
