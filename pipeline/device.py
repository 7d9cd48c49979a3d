"""Where models run and in which floating-point type they compute. No other module decides either.

Checkpoints always hold 16 bits a weight (``checkpoint.STORED``), so an artifact does not depend on the machine that
made it. The compute type may differ from that: a processor without bf16 instructions emulates them at a hundredth of
its fp32 speed.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from pipeline.errors import UserError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Instruction sets of oneDNN that multiply bf16. ONEDNN_MAX_CPU_ISA may forbid them on a processor that has them.
_ONEDNN_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


@dataclass(frozen=True)
class Compute:
    """The device that holds a model and the type of its weights and activations while it computes."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}"


def choose(device: str, dtype: str) -> Compute:
    """Return where and how to compute.

    Args:
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        dtype: ``auto`` (bf16 where the device multiplies it in hardware, else fp32), ``bfloat16`` or ``float32``.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, but PyTorch sees no GPU; set device to auto or cpu")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if dtype != "auto":
        return Compute(where, _DTYPES[dtype])
    if where.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu_multiplies_bf16()
    return Compute(where, torch.bfloat16 if fast else torch.float32)


def cpu_multiplies_bf16() -> bool:
    """Return whether this processor multiplies bf16 matrices in hardware: AVX512-BF16 or AMX.

    The variables that make a newer processor behave like an older one count: ``ATEN_CPU_CAPABILITY`` and
    ``ONEDNN_MAX_CPU_ISA``. Processors other than x86-64 were not measured and count as without.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ONEDNN_WITHOUT_BF16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
