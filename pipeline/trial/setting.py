"""The sizes that peak memory depends on: of batches, rows and chunks. It imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

LOSS_CHUNK = 256  # positions whose logits exist at once, in recovery and in evaluation
ROW = 128  # tokens of a row of evaluation


@dataclass(frozen=True)
class Setting:
    """What memory depends on besides the model and its bits.

    Attributes:
        tokens: Tokens of a training micro-batch, padding included.
        r: LoRA rank.
        double_quant: Whether 4-bit scales are quantized.
        inference_tokens: Tokens of an inference batch.
        rows: Rows of a training micro-batch.
        inference_rows: Rows of an inference batch.
        dropout: Of the adapters; with 0 no masks are kept.
        accumulate: Whether a batch has several micro-batches, so that gradients live through the forward pass.
        gradient_checkpointing: Whether a block's activations are computed again in the backward pass.
        full: Whether all that is not quantized is trained, not only the adapters.
        keeps_best: Whether the weights of the lowest validation loss are kept in 32 bits.
        teacher: Whether the target of a position is a vector of the hidden size, not a token.
        cached_tokens: Tokens whose keys and values inference holds as well.
        fast: Whether adapters are fused and the optimizer steps on one vector (``fast.Ways``).
    """

    tokens: int
    r: int
    double_quant: bool
    inference_tokens: int
    rows: int = 1
    inference_rows: int = 1
    dropout: float = 0.05
    accumulate: bool = True
    gradient_checkpointing: bool = False
    full: bool = False
    keeps_best: bool = False
    teacher: bool = False
    cached_tokens: int = 0
    fast: bool = False
