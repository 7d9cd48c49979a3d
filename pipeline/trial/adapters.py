"""The adapters of a trial's model: their description, their dropout, and what full training reaches beside them."""

from __future__ import annotations

from collections.abc import Container

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from pipeline import architecture
from pipeline.architecture import Config
from pipeline.compress import quantize


def lora_config(config: Config, adapters: quantize.Settings, dropout: float) -> LoraConfig:
    """Return PEFT's description of the adapters: on all linears of every block, as in appendix B."""
    return LoraConfig(
        r=adapters.r,
        lora_alpha=adapters.lora_alpha,
        lora_dropout=dropout,
        target_modules=architecture.target_modules(config),
        task_type="CAUSAL_LM",
    )


class ByteDropout(nn.Module):
    """Dropout from random bytes: an eighth of the random numbers, which on a CPU are a fifth of a training step.

    The probability is rounded to 256ths (0.05 to 13/256).
    """

    def __init__(self, p: float):
        super().__init__()
        self.threshold = round(p * 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero each value with the probability, scale up the others."""
        if not self.training or self.threshold == 0:
            return x
        return x * (kept(x, self.threshold).to(x.dtype) * (256 / (256 - self.threshold)))


def kept(x: torch.Tensor, threshold: int) -> torch.Tensor:
    """Return which values dropout keeps, drawn from random bytes: those that are not below the threshold."""
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),), dtype=torch.int64, device=x.device)
    return words.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold


def use_byte_dropout(model: nn.Module, p: float) -> None:
    """Replace the adapters' dropout by ``ByteDropout``; changes the model."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = ByteDropout(p)


def train_in_full(model: PeftModel, quantized: Container[str]) -> None:
    """Let gradients reach all that is not quantized, not only the adapters; what they reach is the model's own copy.

    A quantized weight is a constant: bitsandbytes' codes or their values, which only its adapter changes. At 16 bits
    nothing is quantized, and this is full-parameter fine-tuning.

    Args:
        model: Wrapped by PEFT.
        quantized: Names of the linears that are quantized.
    """
    for name, weight in model.get_base_model().named_parameters():
        if weight.is_floating_point() and not (name.endswith(".weight") and linear_of(name) in quantized):
            weight.data = weight.detach().clone()  # the tensors that a model is built of are shared by all trials
            weight.requires_grad_(True)


def linear_of(name: str) -> str:
    """Return the module that a parameter belongs to, by the name it had before PEFT wrapped its linear."""
    return name.rpartition(".")[0].removesuffix(".base_layer")
