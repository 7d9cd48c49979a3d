"""Pruned and mixed-bit models that save and load through ``from_pretrained``.

Two things that transformers does not have are added and registered when this module is imported:

* ``pruned_llama`` and its siblings, whose blocks have a shape each (config field ``block_shapes``);
* the quantization method ``mixed_bits``, which gives each linear its own bit-width out of 4, 8 and 16.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import (
    Bnb4bitDeserialize,
    Bnb4bitQuantize,
    Bnb8bitDeserialize,
    Bnb8bitQuantize,
    replace_with_bnb_linear,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from pipeline.architecture import BlockShape, head_dim, shapes

ADAPTER = "adapter"
STORED = torch.bfloat16  # what every checkpoint holds, whatever a machine computes in


# --- pruned models -----------------------------------------------------------------------------------------------


class _PrunedConfig:
    """Adds ``block_shapes``: [heads, kv_heads, channels] of each block."""

    def validate_architecture(self) -> None:
        """Accept head counts that do not divide the hidden size: pruning takes whole heads."""

    def block(self, index: int) -> Any:
        """Return the config that one block is built from."""
        shape = shapes(self)[index]
        own: Any = copy.copy(self)
        own.num_attention_heads, own.num_key_value_heads = shape.heads, shape.kv_heads
        own.intermediate_size = shape.channels
        return own


class _PrunedModel:
    """Builds each block at its own shape."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(config, "block_shapes", None):
            for index, block in enumerate(self.model.layers):  # type: ignore[attr-defined]
                smaller = type(block)(config.block(index), index)
                # The attention reads settings that apply to the whole model, such as the implementation, from here.
                smaller.self_attn.config = config
                self.model.layers[index] = smaller  # type: ignore[attr-defined]
            self.post_init()  # type: ignore[attr-defined]


class PrunedLlamaConfig(_PrunedConfig, LlamaConfig):  # noqa: D101
    model_type = "pruned_llama"
    block_shapes: list | None = None


class PrunedMistralConfig(_PrunedConfig, MistralConfig):  # noqa: D101
    model_type = "pruned_mistral"
    block_shapes: list | None = None


class PrunedQwen2Config(_PrunedConfig, Qwen2Config):  # noqa: D101
    model_type = "pruned_qwen2"
    block_shapes: list | None = None


class PrunedQwen3Config(_PrunedConfig, Qwen3Config):  # noqa: D101
    model_type = "pruned_qwen3"
    block_shapes: list | None = None


class PrunedLlamaForCausalLM(_PrunedModel, LlamaForCausalLM):  # noqa: D101
    config_class = PrunedLlamaConfig


class PrunedMistralForCausalLM(_PrunedModel, MistralForCausalLM):  # noqa: D101
    config_class = PrunedMistralConfig


class PrunedQwen2ForCausalLM(_PrunedModel, Qwen2ForCausalLM):  # noqa: D101
    config_class = PrunedQwen2Config


class PrunedQwen3ForCausalLM(_PrunedModel, Qwen3ForCausalLM):  # noqa: D101
    config_class = PrunedQwen3Config


_PRUNED: dict[str, type[PreTrainedModel]] = {
    "llama": PrunedLlamaForCausalLM,
    "mistral": PrunedMistralForCausalLM,
    "qwen2": PrunedQwen2ForCausalLM,
    "qwen3": PrunedQwen3ForCausalLM,
}


def pruned_config(config: PretrainedConfig, block_shapes: list[BlockShape]) -> PretrainedConfig:
    """Return the ``pruned_*`` config of a model whose blocks have these shapes."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    # Qwen2 has no such field and takes hidden size / heads, which is wrong for a block that has lost heads.
    fields["head_dim"] = head_dim(config)
    fields["block_shapes"] = [[shape.heads, shape.kv_heads, shape.channels] for shape in block_shapes]
    return _PRUNED[config.model_type.removeprefix("pruned_")].config_class(**fields)


def from_state(
    config: PretrainedConfig, state: dict[str, torch.Tensor], device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Build a model from tensors in memory, without touching the disk; it computes in the type of its embeddings."""
    name = config.model_type.removeprefix("pruned_")
    config = copy.deepcopy(config)
    config.dtype = state["model.embed_tokens.weight"].dtype
    # Without a device of its own, transformers puts a quantized model on a GPU and any other on the CPU.
    model = _PRUNED[name].from_pretrained(None, config=config, state_dict=state, device_map=device)
    compute_in(model, config.dtype)
    return model


def stored(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a dense model's tensors in the type that checkpoints hold."""
    return {name: tensor.to(STORED) for name, tensor in state.items()}


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a model compute in a type: dense weights and biases are cast, codes stay; changes the model."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for parameter in model.parameters():  # buffers keep theirs: rotary frequencies need 32 bits
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


# --- mixed bit-widths --------------------------------------------------------------------------------------------


class MixedBitsConfig(QuantizationConfigMixin):
    """Bits of every linear, stored in a checkpoint's ``config.json``.

    Not a ``BitsAndBytesConfig``: transformers would then choose its own single-width quantizer.

    Args:
        linear_bits: Full module name -> 4 or 8; linears that are not named stay dense.
        four_bit: ``nf4`` or ``fp4``.
        double_quant: Whether the 4-bit scales are quantized too.
    """

    def __init__(
        self, linear_bits: Mapping[str, int], four_bit: str = "nf4", double_quant: bool = False, **_: Any
    ) -> None:
        self.quant_method = "mixed_bits"
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

    def __init__(self, hf_quantizer: Any, four: type, eight: type):
        self.hf_quantizer = hf_quantizer
        self._four, self._eight = four(hf_quantizer), eight(hf_quantizer)

    def convert(self, input_dict: dict, model: Any = None, full_layer_name: Any = None, **kwargs: Any) -> dict:
        name = full_layer_name if full_layer_name is not None else next(iter(input_dict))
        module, _ = get_module_from_name(model, name)
        own = self._eight if isinstance(module, bnb.nn.Linear8bitLt) else self._four
        return own.convert(input_dict, model=model, full_layer_name=full_layer_name, **kwargs)


class MixedBitsQuantizer(Bnb4BitHfQuantizer):
    """Loads and saves models whose linears are 4-bit, 8-bit or dense, each as ``MixedBitsConfig`` says."""

    quantization_config: MixedBitsConfig
    serialized_names = {  # each key may match one converter only, hence one list for both widths
        "weight": [*Bnb4BitHfQuantizer.serialized_names["weight"], *Bnb8BitHfQuantizer.serialized_names["weight"][1:]]
    }

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Bitsandbytes and accelerate are pinned requirements."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is the weight of a bitsandbytes linear."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and name != "bias"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        every = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        for bits in (4, 8):
            own = {name for name, width in config.linear_bits.items() if width == bits}
            if own:
                replace_with_bnb_linear(
                    model,
                    modules_to_not_convert=[f"^{name}$" for name in every if name not in own],
                    quantization_config=config.for_bits(bits),
                    pre_quantized=self.pre_quantized,
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # PEFT reads both flags to wrap each linear by its own type; save_pretrained refuses kept conversions.
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
        model._weight_conversions = None
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


def register_types() -> None:
    """Make the pruned model types and the mixed-bit method known to transformers; safe to call again."""
    for model_class in _PRUNED.values():
        AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
    AUTO_QUANTIZER_MAPPING["mixed_bits"] = MixedBitsQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["mixed_bits"] = MixedBitsConfig


register_types()


# --- loading -----------------------------------------------------------------------------------------------------


def load_config(folder: str | Path) -> Any:
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
    _quiet()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        device_map=device,
        **({} if as_type == "auto" else {"dtype": as_type}),  # a mixed-bit checkpoint decides its own types
    )
    if dtype is not None:
        compute_in(model, dtype)
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """Load a checkpoint's tokenizer, padded on the right."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _quiet() -> None:
    """Loading takes a second here; its progress bars would hide the stage's own. Int8 tells each time that it casts."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_final(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Any:
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
