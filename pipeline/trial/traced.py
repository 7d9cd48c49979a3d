"""Peak memory of one step by tracing: the real modules run on ``meta`` tensors, which have shapes and no data.

The traced step is ``recover``'s and the traced forward pass is ``evaluate``'s; every storage that PyTorch's allocator
would hold is counted from its birth to its end. Two things make it a prediction for CUDA where no GPU is: the fused
kernels that ``meta`` would replace (dropout, attention) are called by name, and bitsandbytes' kernels that hold memory
of their own are taken apart. The trace for a CPU is checked against real steps (``python -m benchmarks.memory``).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline import architecture, checkpoint
from pipeline.trial import adapters, fast, loss
from pipeline.trial.fast import Ways
from pipeline.trial.kernels import CUDA, META, Kernels, Machine, Operation
from pipeline.trial.scoring import Chunk, choose
from pipeline.trial.setting import LOSS_CHUNK, Setting

Loss = Callable[[PeftModel, torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor], torch.Tensor]
_PAGED = 100_000  # elements from which on bitsandbytes pages an optimizer state: not in PyTorch's allocator then


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

    def hold(self, tensors: Iterable[object]) -> None:
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

    def __torch_dispatch__(
        self, func: Operation, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        kernel = self._kernels.get(func)
        if kernel is not None:
            with self:  # what it is made of counts
                return kernel(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.hold(tree_leaves(result))
        return result


# --- the model ---------------------------------------------------------------------------------------------------


def model_of(
    config: PretrainedConfig, widths: Mapping[str, int], setting: Setting, machine: Machine = CUDA
) -> PeftModel:
    """Build the model that ``assemble`` builds, wrapped by PEFT, without data.

    Args:
        config: The model's config, pruned or not.
        widths: Bits of each linear: 4, 8 or 16.
        setting: Adapter sizes.
        machine: Where it will run.
    """
    config = copy.deepcopy(config)  # `from_config` writes the type into it, and a trial builds its model from it
    config = checkpoint.buildable(config)
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype, attn_implementation=machine.attention)
        for name, bits in widths.items():
            if bits != 16:
                model.set_submodule(name, _quantized(model.get_submodule(name), bits, setting, machine))
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # as `checkpoint` sets them, for PEFT
        description = LoraConfig(
            r=setting.r,
            lora_dropout=setting.dropout,
            target_modules=architecture.target_modules(config),
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, description)
    if setting.full:
        adapters.train_in_full(adapted, {name for name, bits in widths.items() if bits != 16})
    if not machine.fp32_adapters:
        for module in adapted.modules():
            if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), bitsandbytes.nn.Linear8bitLt):
                module.lora_A.to(machine.dtype), module.lora_B.to(machine.dtype)  # PEFT does not, on `meta`
    if machine.byte_dropout:
        adapters.use_byte_dropout(adapted, setting.dropout)
    if setting.gradient_checkpointing:
        # `backward` suspends `Fused`, so that what it computes again needs one of its own.
        contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), machine.running())}
        model.gradient_checkpointing_enable(contexts)
    return adapted


def _quantized(linear: nn.Linear, bits: int, setting: Setting, machine: Machine) -> nn.Module:
    """Return bitsandbytes' module in place of a linear."""
    outputs, inputs = linear.weight.shape
    if bits == 8:
        module = machine.eight_bit(inputs, outputs, has_fp16_weights=False, threshold=0.0)
        codes = torch.empty(outputs, inputs, dtype=torch.int8)
        scales = torch.empty(outputs, dtype=torch.float32)
        module.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    else:
        module = bitsandbytes.nn.Linear4bit(inputs, outputs, compute_dtype=linear.weight.dtype)
        codes, state = (
            torch.empty(-(-outputs * inputs // 2), 1, dtype=torch.uint8),
            _scales(linear, setting.double_quant),
        )
        module.weight = bitsandbytes.nn.Params4bit(codes, quant_state=state, bnb_quantized=True, module=module)
    module.bias = linear.bias
    return module.requires_grad_(False)


def _scales(linear: nn.Linear, double_quant: bool) -> QuantState:
    """Return the quantization state of an NF4 matrix, as bitsandbytes makes it out of real weights."""
    blocks = -(-linear.weight.numel() // 64)
    half = {"code": torch.empty(16), "blocksize": 64, "quant_type": "nf4", "dtype": linear.weight.dtype}
    if not double_quant:
        return QuantState(absmax=torch.empty(blocks), shape=linear.weight.shape, **half)
    outer = QuantState(absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return QuantState(absmax=absmax, shape=linear.weight.shape, offset=torch.empty(()), state2=outer, **half)


def tensors(model: nn.Module) -> Iterator[object]:
    """Yield all that a model holds: parameters, buffers, quantization states."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        yield from (getattr(parameter, name, None) for name in ("CB", "SCB"))
        state = getattr(parameter, "quant_state", None)
        for level in (state, getattr(state, "state2", None)):
            if level is not None:
                yield from (level.absmax, level.code, level.offset)


# --- the steps ---------------------------------------------------------------------------------------------------


def training(model: PeftModel, setting: Setting, machine: Machine = CUDA, step: Loss | None = None) -> tuple[int, int]:
    """Trace a training step after the first one, when optimizer states exist.

    Every position has a label: rows with unlabelled prompts take at most 4 H bytes less a position.

    Args:
        model: As ``model_of`` builds it; its gradients are left behind.
        setting: Batch sizes.
        machine: Where it runs.
        step: (model, tokens, where, wanted) -> loss; None: ``recover``'s.

    Returns:
        Bytes of the model alone, and the peak.
    """
    model.train()
    ledger = _holding(model, machine)
    weights = ledger.live
    held = _beside(model, setting, machine)  # until the end of the step
    ledger.hold(held)
    rows, length = setting.rows, setting.tokens // setting.rows
    positions = rows * (length - 1)
    with fast.taken(model, Ways(fused=setting.fast)), machine.running(), ledger:
        batch = _ids(rows, length), _ids(rows, length)  # tokens and labels
        where = _ids(positions), _ids(positions)
        wanted = _ids(positions)
        if setting.teacher:
            wanted = torch.empty(positions, loss.head_width(model), dtype=machine.dtype, device=META)
        (step or loss.loss_at)(model, batch[0], where, wanted).backward()
    return weights, ledger.peak


def _beside(model: PeftModel, setting: Setting, machine: Machine) -> list[torch.Tensor]:
    """Give parameters the gradients that live through a forward pass; return these, 32-bit copies and states."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    whole = sum(weight.numel() for weight in trained)
    held = []
    for weight in trained:
        low = weight.dtype != torch.float32
        paged = machine.paged and (whole if setting.fast else weight.numel()) >= _PAGED
        copies = low + setting.keeps_best + (0 if paged else 2)
        if setting.accumulate or setting.fast:
            weight.grad = torch.empty_like(weight)
            held.append(weight.grad)
            copies += low and setting.fast  # one vector holds gradients in 32 bits too
        held += [torch.empty_like(weight, dtype=torch.float32) for _ in range(copies)]
    return held


def inference(model: PeftModel, setting: Setting, machine: Machine = CUDA) -> tuple[int, int]:
    """Trace a forward pass of evaluation: rows of equal length, a tree mask, every position scored.

    Returns:
        Bytes of the model alone, and the peak.
    """
    model.eval()
    ledger = _holding(model, machine)
    weights = ledger.live
    rows, length = setting.inference_rows, setting.inference_tokens // setting.inference_rows
    positions = rows * (length - 1)
    with machine.running(), ledger, torch.no_grad():  # inference mode would hide what functions are made of
        mask = torch.empty(rows, 1, length, length, dtype=machine.dtype, device=META)
        parts = [
            Chunk(*(_ids(min(LOSS_CHUNK, positions - start)) for _ in range(4)))
            for start in range(0, positions, LOSS_CHUNK)
        ]
        choose(model, _ids(rows, length), _ids(rows, length), mask, parts)
    return weights, ledger.peak


def _holding(model: nn.Module, machine: Machine) -> Ledger:
    """Return a ledger that counts what a model holds."""
    ledger = Ledger(machine.kernels)
    ledger.hold(tensors(model))
    return ledger


def _ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device=META)
