"""The quantization method ``mixed_bits``: each linear has its own bit-width out of 4, 8 and 16."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._C import DispatchKeySet
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import (
    Bnb4bitDeserialize,
    Bnb4bitQuantize,
    Bnb8bitDeserialize,
    Bnb8bitQuantize,
    replace_with_bnb_linear,
)
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from pipeline.checkpoint.pruned import STORED


class MixedBitsConfig(QuantizationConfigMixin):
    """Bits of every linear, stored in a checkpoint's ``config.json``.

    Not a ``BitsAndBytesConfig``: transformers would then choose its own single-width quantizer.

    Args:
        linear_bits: Full module name -> 4 or 8; linears that are not named stay dense.
        four_bit: ``nf4`` or ``fp4``.
        double_quant: Whether the 4-bit scales are quantized too.
    """

    def __init__(
        self, linear_bits: Mapping[str, int], four_bit: str = "nf4", double_quant: bool = False, **_: object
    ) -> None:
        self.quant_method = "mixed_bits"  # type: ignore[assignment]  # transformers lists its own methods only
        self.linear_bits = dict(linear_bits)
        self.four_bit = four_bit
        self.double_quant = double_quant

    def for_bits(self, bits: int) -> BitsAndBytesConfig:
        """Return the settings under which transformers builds bitsandbytes' modules of one width."""
        if bits == 8:
            # Threshold 0: no column is kept in 16 bits, so that memory follows from shapes alone.
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.four_bit,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=STORED,
        )


class _Dispatch(ConversionOps):
    """Hands a linear's tensors to the converter of its bit-width."""

    def __init__(self, hf_quantizer: HfQuantizer, four: type, eight: type):
        self.hf_quantizer = hf_quantizer
        self._four, self._eight = four(hf_quantizer), eight(hf_quantizer)

    def convert(  # type: ignore[override]  # as the converters that it hands over to
        self, input_dict: dict, model: nn.Module | None = None, full_layer_name: str | None = None, **kwargs: object
    ) -> dict:
        name = full_layer_name if full_layer_name is not None else next(iter(input_dict))
        module, _ = get_module_from_name(model, name)
        converter = self._eight if isinstance(module, bnb.nn.Linear8bitLt) else self._four
        return converter.convert(input_dict, model=model, full_layer_name=full_layer_name, **kwargs)


class MixedBitsQuantizer(Bnb4BitHfQuantizer):
    """Loads and saves models whose linears are 4-bit, 8-bit or dense, each as ``MixedBitsConfig`` says."""

    quantization_config: MixedBitsConfig  # type: ignore[assignment]  # not bitsandbytes' single width
    serialized_names = {  # each key may match one converter only, hence one list for both widths
        "weight": [*Bnb4BitHfQuantizer.serialized_names["weight"], *Bnb8BitHfQuantizer.serialized_names["weight"][1:]]
    }

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        """Bitsandbytes and accelerate are pinned requirements."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: object) -> bool:
        """Return whether a parameter is the weight of a bitsandbytes linear."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and name != "bias"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: object, **kwargs: object) -> None:
        config = self.quantization_config
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        for bits in (4, 8):
            of_this_width = {name for name, width in config.linear_bits.items() if width == bits}
            if of_this_width:
                others = "|".join(re.escape(name) for name in linears if name not in of_this_width)
                replace_with_bnb_linear(
                    model,
                    # One expression: each module is compared with each, and experts are thousands of linears.
                    modules_to_not_convert=[f"^(?:{others})$"],
                    quantization_config=config.for_bits(bits),
                    pre_quantized=self.pre_quantized,
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        # PEFT reads both flags to wrap each linear by its own type; save_pretrained refuses kept conversions.
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            setattr(model, flag, True)
        setattr(model, "_weight_conversions", None)  # noqa: B010  (a name that the class does not declare)
        use_plain_cpu_layout(model)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """Return the converter from dense weights."""
        return _Dispatch(self, Bnb4bitQuantize, Bnb8bitQuantize)

    def get_load_operations(self) -> dict:
        """Return the converter from stored codes."""
        return {"deserialize": lambda quantizer: _Dispatch(quantizer, Bnb4bitDeserialize, Bnb8bitDeserialize)}


def use_plain_cpu_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on AVX512-BF16 processors; changes the model.

    The repacked layout fails on pruned shapes, cannot be saved, and gives wrong LoRA gradients.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def whole_blocks(shape: Sequence[int], block: int) -> list[int]:
    """Return a shape of as many elements whose rows are whole blocks, or one row if blocks do not divide them."""
    count = math.prod(shape)
    if shape[-1] % block == 0:
        return list(shape)
    return [count // block, block] if count % block == 0 else [1, count]


def decode_by_blocks() -> torch.library.Library:
    """Make bitsandbytes' decoder of 4 bits right for every shape on CPUs with AVX512; return what keeps it so.

    Its kernel (0.50.2) takes each row to begin a block of scales, which is false where a row's length is no multiple
    of a block's. Codes and scales lie end to end, so they may be read in rows that are.
    """
    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def decoded(
        keys: DispatchKeySet,
        codes: Tensor,
        scales: Tensor,
        block: int,
        kind: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        rows = whole_blocks(shape, block)
        return kernel.call_boxed(keys, codes, scales, block, kind, rows, dtype).reshape(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
        library.impl("dequantize_4bit", decoded, "CPU", with_keyset=True, allow_override=True)
    return library


_DECODER = decode_by_blocks()  # it would be taken back with the library


def register() -> None:
    """Make the method known to transformers; safe to call again."""
    AUTO_QUANTIZER_MAPPING["mixed_bits"] = MixedBitsQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["mixed_bits"] = MixedBitsConfig
