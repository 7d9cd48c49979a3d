"""What pruning is calibrated on: Alpaca's texts, and text that the model writes itself.

A model's own text is nearer to what it was trained on than any one data set: fitted to both, a pruned model keeps more
of what it can do on other text (docs/log.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from pipeline import alpaca, fits
from pipeline.alpaca import Batch, Example
from pipeline.console import progress
from pipeline.params import Prune

_TEXT = 128  # tokens of a text that the model writes
_AT_ONCE = 64  # texts written side by side: their key/value cache has to fit, too
_DOCUMENT = "<|endoftext|>"  # stands between two documents in the training of many models


def batches(
    model: Any, tokenizer: Any, rows: str | Path, settings: Prune, held_out: int, seed: int, size: int = 8
) -> list[Batch]:
    """Return the calibration batches that section ``prune`` asks for, every position labelled; none if it reads none.

    They are on the model's device.

    Args:
        model: The model to prune, which writes the ``own_samples``.
        tokenizer: Its tokenizer.
        rows: File of Alpaca rows.
        settings: What it is for, ``text``, ``samples``, ``own_samples`` and ``max_length`` are read.
        held_out: Rows that calibration may not see.
        seed: For the draw of the rows and for sampling.
        size: Rows of a batch.
    """
    if not fits.calibrated(settings.importance, settings.compensate):
        return []
    found = alpaca.SOURCES[settings.text](rows, tokenizer, held_out, settings.samples, settings.max_length, seed)
    if settings.own_samples:
        found += written(model, tokenizer, settings.own_samples, settings.max_length, seed)
    return [part.to(model.device) for part in alpaca.batches(found, size, tokenizer.pad_token_id, whole=True)]


@torch.inference_mode()
def written(model: Any, tokenizer: Any, samples: int, length: int, seed: int) -> list[Example]:
    """Return windows of ``length`` tokens of what a model writes, at temperature 1, each text from its very start.

    Texts of ``_TEXT`` tokens stand end to end in the windows: many short ones are written faster than few long ones.
    Special tokens are left out, so that a text goes on to its last token.
    """
    size = min(length, _TEXT)
    texts = -(-samples * length // size)
    tokens: list[int] = []
    generator = torch.Generator(model.device).manual_seed(seed)
    for first in progress(range(0, texts, _AT_ONCE), "the model's own text"):
        tokens += _texts(model, tokenizer, min(_AT_ONCE, texts - first), size, generator).flatten().tolist()
    return [Example(tuple(tokens[start : start + length]), 1) for start in range(0, samples * length, length)]


def _texts(model: Any, tokenizer: Any, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return the first tokens of texts that a model writes side by side, [count, size].

    Not ``generate``: it draws a random number for every word of the vocabulary, a quarter of the whole time on a CPU.
    """
    latest = torch.full((count, 1), _start(tokenizer), device=model.device)
    special, cache, found = _special(tokenizer), DynamicCache(config=model.config), []
    for _ in range(size):
        logits = model(input_ids=latest, past_key_values=cache, use_cache=True).logits[:, -1].float()
        logits[:, special] = -torch.inf
        up_to = logits.softmax(-1).cumsum(-1)
        drawn = (1 - torch.rand(count, 1, generator=generator, device=model.device)) * up_to[:, -1:]
        latest = torch.searchsorted(up_to, drawn)  # the first whose sum reaches it, so never one of no probability
        found.append(latest)
    return torch.cat(found, 1)


def _start(tokenizer: Any) -> int:
    """Return the token that a document starts after."""
    known = tokenizer.get_vocab().get(_DOCUMENT, tokenizer.bos_token_id)
    return int(tokenizer.eos_token_id if known is None else known)


def _special(tokenizer: Any) -> list[int]:
    """Return the tokens that are no text."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return sorted(added | set(tokenizer.all_special_ids))
