"""The kernels that hold memory of their own, taken apart for a trace, and the kinds of machine that run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import bitsandbytes
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp
from torch import nn
from torch.overrides import TorchFunctionMode

Operation = Callable[..., object]
Kernels = Mapping[object, Operation]  # a function or an operation of torch -> what stands for it
META = torch.device("meta")


class Fused(TorchFunctionMode):
    """Calls the kernels that CUDA chooses, which ``meta`` has but would not choose."""

    def __torch_function__(
        self, func: Operation, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        return _FUSED.get(func, func)(*args, **(kwargs or {}))


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Keep a mask of a byte an element; elsewhere it would be noise of the input's type."""
    return torch.ops.aten.native_dropout(x, p, True)[0] if training and p else x


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash attention; memory-efficient attention under a mask."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    keep = torch.is_grad_enabled() and query.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, mask, keep, dropout_p, is_causal, scale=scale)[0]


_FUSED: Kernels = {nn.functional.dropout: _dropout, nn.functional.scaled_dot_product_attention: _attention}


def _gemm_4bit(
    x: torch.Tensor,
    codes: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    *nested: torch.Tensor | None,
) -> torch.Tensor:
    """Dequantize the whole matrix, then multiply: what bitsandbytes does for more than a few rows."""
    return nn.functional.linear(x, torch.empty(shape, dtype=x.dtype, device=META), bias)


def _int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    on_cuda: bool,
) -> torch.Tensor:
    """Multiply into int32, scale, cast: into fp16 on CUDA; in fp32 on a CPU, which converts the product first."""
    product = torch.empty(*x.shape[:-1], codes.shape[0], dtype=torch.int32, device=META)
    if on_cuda:
        return torch.empty_like(product, dtype=torch.float16).to(dtype)
    return (product.float() * (rows[:, None] * columns) * 1.0).to(dtype)


def _int8_rows_cpu(x: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Scale in fp32, round, cast."""
    largest = x.abs().amax(1).float()
    return torch.round(x.float() * (127.0 / largest[:, None])).to(torch.int8), largest, None


class EightBitOnCPU(bitsandbytes.nn.Linear8bitLt):
    """Dequantizes the matrix and multiplies in training, as on a CPU, where CUDA quantizes the input.

    bitsandbytes chooses by the type of the input's device, and would take CUDA's way for ``meta``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product; in evaluation it is that of int8 on a CPU too."""
        if not self.training:
            return super().forward(x)
        if self.weight.CB is not None:
            self.init_8bit_state()
        return MatMul8bitFp.apply(x, self.weight, None, self.bias, self.state)


_COMMON: Kernels = {
    # The one value a step reads: whether positions run on without a jump. They do.
    torch.ops.aten._local_scalar_dense.default: lambda _: True,
    torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit,
}


@dataclass(frozen=True)
class Machine:
    """How a kind of device computes a step.

    Attributes:
        kernels: Operations that are taken apart.
        fused: Whether dropout and attention are CUDA's.
        fp32_adapters: Whether adapters are 32-bit; else only those of 8-bit linears are (PEFT gives adapters the type
            that a linear computes in, which an 8-bit one does not tell); others have 32-bit copies for the optimizer.
        byte_dropout: Whether dropout is ``recover.ByteDropout``.
        attention: Name of the attention in transformers; None: what it chooses on CUDA, fused where the family has it.
        paged: Whether large optimizer states lie outside PyTorch's allocator.
        eight_bit: Class of 8-bit linears.
        dtype: Of weights and activations.
    """

    kernels: Kernels
    fused: bool
    fp32_adapters: bool
    byte_dropout: bool
    attention: str | None
    paged: bool
    eight_bit: type[nn.Module] = bitsandbytes.nn.Linear8bitLt
    dtype: torch.dtype = torch.bfloat16

    def running(self) -> AbstractContextManager:
        """Return the context in which a step is traced."""
        return Fused() if self.fused else nullcontext()


CUDA = Machine(
    kernels={**_COMMON, torch.ops.bitsandbytes.int8_scaled_mm.default: partial(_int8, on_cuda=True)},
    fused=True, fp32_adapters=True, byte_dropout=False, attention=None, paged=True,
)  # fmt: skip
CPU = Machine(
    kernels={
        **_COMMON,
        torch.ops.bitsandbytes.int8_scaled_mm.default: partial(_int8, on_cuda=False),
        torch.ops.bitsandbytes.int8_vectorwise_quant.default: _int8_rows_cpu,
    },
    fused=False, fp32_adapters=False, byte_dropout=True, attention="eager", paged=False,
    eight_bit=EightBitOnCPU,
)  # fmt: skip
