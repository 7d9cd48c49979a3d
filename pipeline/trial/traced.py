"""Peak memory of one step by tracing: the real modules run on ``meta`` tensors, which have shapes and no data.

The traced step is ``recover``'s and the traced forward pass is ``evaluate``'s; every storage that PyTorch's allocator
would hold is counted from its birth to its end. Two things make it a prediction for CUDA where no GPU is: the fused
kernels that ``meta`` would replace (dropout, attention) are called by name, and bitsandbytes' kernels that hold memory
of their own are taken apart. The trace for a CPU is checked against real steps (``python -m benchmarks.memory``).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from pipeline import architecture
from pipeline.trial import evaluate, recover
from pipeline.trial.memory import LOSS_CHUNK, Setting

Kernels = Mapping[Any, Callable[..., Any]]
_PAGED = 100_000  # elements from which on bitsandbytes pages an optimizer state: not in PyTorch's allocator then
META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that live while it is active, and their peak.

    Attributes:
        live: Bytes now.
        peak: Largest ``live`` so far.
    """

    def __init__(self, kernels: Kernels):
        """Start empty; operations in ``kernels`` run as the functions given there."""
        super().__init__()
        self.live = self.peak = 0
        self._kernels = kernels
        self._known: set[int] = set()

    def hold(self, tensors: Iterable[Any]) -> None:
        """Count the storages of tensors, each until it ends."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = self._kernels.get(func)
        if own is not None:
            with self:  # what it is made of counts
                return own(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.hold(tree_leaves(result))
        return result


# --- kernels -----------------------------------------------------------------------------------------------------


class Fused(TorchFunctionMode):
    """Calls the kernels that CUDA chooses, which ``meta`` has but would not choose."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def _gemm_4bit(x: torch.Tensor, codes: torch.Tensor, shape: Any, *rest: Any) -> torch.Tensor:
    """Dequantize the whole matrix, then multiply: what bitsandbytes does for more than a few rows."""
    bias = rest[3] if len(rest) > 3 else None
    return nn.functional.linear(x, torch.empty(shape, dtype=x.dtype, device=META), bias)


def _int8_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """Multiply into int32, scale into fp16, cast."""
    product = torch.empty(*x.shape[:-1], codes.shape[0], dtype=torch.int32, device=META)
    return torch.empty_like(product, dtype=torch.float16).to(dtype)


def _int8_cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """Multiply into int32, scale in fp32, cast; a CPU converts an operand of another type first."""
    product = torch.empty(*x.shape[:-1], codes.shape[0], dtype=torch.int32, device=META)
    return (product.float() * (rows[:, None] * columns) * 1.0).to(dtype)


def _int8_rows_cpu(x: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Scale in fp32, round, cast."""
    largest = x.abs().amax(1).float()
    return torch.round(x.float() * (127.0 / largest[:, None])).to(torch.int8), largest, None


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
        attention: Name of the attention in transformers.
        paged: Whether large optimizer states lie outside PyTorch's allocator.
        dtype: Of weights and activations.
    """

    kernels: Kernels
    fused: bool
    fp32_adapters: bool
    byte_dropout: bool
    attention: str
    paged: bool
    dtype: torch.dtype = torch.bfloat16

    def running(self) -> AbstractContextManager:
        """Return the context in which a step is traced."""
        return Fused() if self.fused else nullcontext()


CUDA = Machine(
    kernels={**_COMMON, torch.ops.bitsandbytes.int8_scaled_mm.default: _int8_cuda},
    fused=True, fp32_adapters=True, byte_dropout=False, attention="sdpa", paged=True,
)  # fmt: skip
CPU = Machine(
    kernels={
        **_COMMON,
        torch.ops.bitsandbytes.int8_scaled_mm.default: _int8_cpu,
        torch.ops.bitsandbytes.int8_vectorwise_quant.default: _int8_rows_cpu,
    },
    fused=False, fp32_adapters=False, byte_dropout=True, attention="eager", paged=False,
)  # fmt: skip


# --- the model ---------------------------------------------------------------------------------------------------


def model_of(config: Any, bits_of: Mapping[str, int], setting: Setting, machine: Machine = CUDA) -> Any:
    """Build the model that ``trial.assemble`` builds, wrapped by PEFT, without data.

    Args:
        config: The model's config, pruned or not.
        bits_of: Bits of each linear: 4, 8 or 16.
        setting: Adapter sizes.
        machine: Where it will run.
    """
    config = copy.deepcopy(config)  # `from_config` writes the type into it, and a trial builds its model from it
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype, attn_implementation=machine.attention)
        for name, bits in bits_of.items():
            if bits != 16:
                model.set_submodule(name, _quantized(model.get_submodule(name), bits, setting.double_quant))
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # as `checkpoint` sets them, for PEFT
        adapters = LoraConfig(
            r=setting.r,
            lora_dropout=setting.dropout,
            target_modules=architecture.TARGET_MODULES,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, adapters)
    if setting.full:
        recover.train_in_full(adapted, {name for name, bits in bits_of.items() if bits != 16})
    if not machine.fp32_adapters:
        for module in adapted.modules():
            if hasattr(module, "lora_A") and not isinstance(module.get_base_layer(), bitsandbytes.nn.Linear8bitLt):
                module.lora_A.to(machine.dtype), module.lora_B.to(machine.dtype)  # PEFT does not, on `meta`
    if machine.byte_dropout:
        recover.use_byte_dropout(adapted, setting.dropout)
    if setting.gradient_checkpointing:
        # `backward` suspends `Fused`, so that what it computes again needs one of its own.
        contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), machine.running())}
        model.gradient_checkpointing_enable(contexts)
    return adapted


def _quantized(linear: nn.Linear, bits: int, double_quant: bool) -> nn.Module:
    """Return bitsandbytes' module in place of a linear."""
    outputs, inputs = linear.weight.shape
    module: Any
    if bits == 8:
        module = bitsandbytes.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=0.0)
        codes = torch.empty(outputs, inputs, dtype=torch.int8)
        scales = torch.empty(outputs, dtype=torch.float32)
        module.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    else:
        module = bitsandbytes.nn.Linear4bit(inputs, outputs, compute_dtype=linear.weight.dtype)
        codes, state = torch.empty(-(-outputs * inputs // 2), 1, dtype=torch.uint8), _scales(linear, double_quant)
        module.weight = bitsandbytes.nn.Params4bit(codes, quant_state=state, bnb_quantized=True, module=module)
    module.bias = linear.bias
    return module.requires_grad_(False)


def _scales(linear: nn.Linear, double_quant: bool) -> Any:
    """Return the quantization state of an NF4 matrix, as bitsandbytes makes it out of real weights."""
    new = bitsandbytes.functional.QuantState
    blocks = -(-linear.weight.numel() // 64)
    half = {"code": torch.empty(16), "blocksize": 64, "quant_type": "nf4", "dtype": linear.weight.dtype}
    if not double_quant:
        return new(absmax=torch.empty(blocks), shape=linear.weight.shape, **half)
    outer = new(absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return new(absmax=absmax, shape=linear.weight.shape, offset=torch.empty(()), state2=outer, **half)


def tensors(model: nn.Module) -> Iterator[Any]:
    """Yield all that a model holds: parameters, buffers, quantization states."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        yield from (getattr(parameter, name, None) for name in ("CB", "SCB"))
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            if one is not None:
                yield from (one.absmax, one.code, one.offset)


# --- the steps ---------------------------------------------------------------------------------------------------


def training(model: Any, setting: Setting, machine: Machine = CUDA, loss: Any = None) -> tuple[int, int]:
    """Trace a training step after the first one, when optimizer states exist.

    Every position has a label: rows with unlabelled prompts take at most 4 H bytes less a position.

    Args:
        model: As ``model_of`` builds it; its gradients are left behind.
        setting: Batch sizes.
        machine: Where it runs.
        loss: (model, tokens, where, wanted) -> loss; None: ``recover``'s.

    Returns:
        Bytes of the model alone, and the peak.
    """
    model.train()
    ledger = Ledger(machine.kernels)
    ledger.hold(tensors(model))
    weights = ledger.live
    held = []
    for parameter in [one for one in model.parameters() if one.requires_grad]:
        copies = (parameter.dtype != torch.float32) + setting.keeps_best
        states = 0 if machine.paged and parameter.numel() >= _PAGED else 2
        held += [torch.empty_like(parameter, dtype=torch.float32) for _ in range(copies + states)]
        if setting.accumulate:
            parameter.grad = torch.empty_like(parameter)
            held.append(parameter.grad)
    ledger.hold(held)
    rows, length = setting.rows, setting.tokens // setting.rows
    positions = rows * (length - 1)
    with machine.running(), ledger:
        batch = _ids(rows, length), _ids(rows, length)  # tokens and labels
        where = _ids(positions), _ids(positions)
        (loss or recover.loss_at)(model, batch[0], where, _ids(positions)).backward()
    return weights, ledger.peak


def inference(model: Any, setting: Setting, machine: Machine = CUDA) -> tuple[int, int]:
    """Trace a forward pass of evaluation: rows of equal length, a tree mask, every position scored.

    Returns:
        Bytes of the model alone, and the peak.
    """
    model.eval()
    ledger = Ledger(machine.kernels)
    ledger.hold(tensors(model))
    weights = ledger.live
    rows, length = setting.inference_rows, setting.inference_tokens // setting.inference_rows
    positions = rows * (length - 1)
    with machine.running(), ledger, torch.no_grad():  # inference mode would hide what functions are made of
        mask = torch.empty(rows, 1, length, length, dtype=machine.dtype, device=META)
        parts = [
            evaluate.Chunk(*(_ids(min(LOSS_CHUNK, positions - start)) for _ in range(4)))
            for start in range(0, positions, LOSS_CHUNK)
        ]
        evaluate.choose(model, _ids(rows, length), _ids(rows, length), mask, parts)
    return weights, ledger.peak


def _ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device=META)
