"""What pruning is calibrated on: Alpaca's texts, and text that the model writes itself.

A model's own text is nearer to what it was trained on than any one data set: fitted to both, a pruned model keeps more
of what it can do on other text (docs/log.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline import alpaca, fits
from pipeline.alpaca import Batch, Example
from pipeline.console import progress
from pipeline.params import Prune

_AT_ONCE = 32  # windows written side by side: their key/value cache has to fit, too
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
    """Return windows of ``length`` tokens that a model writes from the start of a document, at temperature 1.

    Special tokens are left out, so that a text goes on for the whole window.
    """
    start = _start(tokenizer)
    found: list[Example] = []
    # A model's own generation settings sharpen its distribution; here it is wanted as it is.
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in progress(range(0, samples, _AT_ONCE), "the model's own text"):
            prompt = torch.full((min(_AT_ONCE, samples - first), 1), start, device=model.device)
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=length,
                suppress_tokens=_special(tokenizer),
                **plain,
            )
            found += [Example(tuple(row), 1) for row in tokens[:, 1:].tolist()]
    return found


def _start(tokenizer: Any) -> int:
    """Return the token that a document starts after."""
    known = tokenizer.get_vocab().get(_DOCUMENT, tokenizer.bos_token_id)
    return int(tokenizer.eos_token_id if known is None else known)


def _special(tokenizer: Any) -> list[int]:
    """Return the tokens that are no text."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return sorted(added | set(tokenizer.all_special_ids))
