"""Checkpoints and tokenizers from their folders, without remote code and without a hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.checkpoint.pruned import STORED, buildable, compute_in

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "adapter"


def load_config(folder: str | Path) -> PretrainedConfig:
    """Load a checkpoint's config alone."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load any checkpoint of the pipeline for evaluation, without remote code.

    Args:
        folder: The checkpoint.
        device: Where its tensors go.
        dtype: What it computes in; None: what it was saved in.
    """
    return _loaded(folder, device, dtype)


def load_base(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a model to compress, rounded to ``STORED`` whatever it was saved in: that is what later stages keep."""
    return _loaded(folder, device, dtype, as_type=STORED)


def _loaded(
    folder: str | Path, device: str | torch.device, dtype: torch.dtype | None, as_type: torch.dtype | str = "auto"
) -> PreTrainedModel:
    quiet()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=buildable(load_config(folder)),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        device_map=device,
        **({} if as_type == "auto" else {"dtype": as_type}),  # a mixed-bit checkpoint decides its own types
    )
    if dtype is not None:
        compute_in(model, dtype)
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer: it pads on the right, and ends no text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    _leave_ends_open(tokenizer)
    return tokenizer


def _leave_ends_open(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer add nothing after a text, what it adds before it stays; changes the tokenizer.

    Some end each text with a special token. A prompt would then end before its continuation begins, and every choice
    of a benchmark would be scored as that token. Where a text ends, the pipeline puts the token itself.
    """
    text = "Water boils."
    plain, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    before = next((n for n in range(len(whole)) if plain and whole[n : n + len(plain)] == plain), None)
    if before is None or before + len(plain) == len(whole) or not tokenizer.is_fast:
        return  # nothing is added after it, or nothing that can be told apart from the text
    ids = whole[:before]
    names = tokenizer.convert_ids_to_tokens(ids)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, ids, strict=True))
    )


def quiet() -> None:
    """Loading takes a second here; its progress bars would hide the stage's own. Int8 tells each time that it casts."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_final(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> PeftModel:
    """Load a built model: bitsandbytes' modules of its bit-widths, with its adapter, in evaluation mode."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(folder, device, dtype), Path(folder) / ADAPTER)
    return model.eval()


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint's safetensors files."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state
