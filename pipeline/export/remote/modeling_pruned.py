"""Models whose blocks have a shape each and whose linears have 4, 8 or 16 bits each.

This file travels with the model: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. It needs
transformers, bitsandbytes and peft.

* ``block_shapes`` of ``config.json``: [heads, key/value heads, MLP channels] of each block; of experts those of each.
* ``quantization_config``: ``linear_bits`` (name of a linear -> 4 or 8), ``four_bit`` (nf4 or fp4), ``double_quant``.
* ``adapter/``: LoRA adapters, which are added on loading.
"""

import math
import re
import warnings

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations import bitsandbytes as bnb_loading
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

FAMILIES = (  # as this file was made for: name, classes of config and model in transformers
    ("llama", "LlamaConfig", "LlamaForCausalLM"),
    ("mistral", "MistralConfig", "MistralForCausalLM"),
    ("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    ("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM"),
    ("olmo2", "Olmo2Config", "Olmo2ForCausalLM"),
    ("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM"),
    ("gemma2", "Gemma2Config", "Gemma2ForCausalLM"),
    ("phi3", "Phi3Config", "Phi3ForCausalLM"),
)


class _OfBlock:
    """What a block is built from and reads later: the whole model's config, but for the block's own sizes."""

    def __init__(self, whole, shape):
        self._whole = whole
        self.num_attention_heads, self.num_key_value_heads, self.intermediate_size = shape
        self.moe_intermediate_size = self.intermediate_size  # blocks with experts have no other MLP

    def __getattr__(self, name):
        if name.startswith("__") or name == "_whole":  # a copy asks before it has any attribute
            raise AttributeError(name)
        return getattr(self._whole, name)


class _PrunedConfig:
    block_shapes: list | None = None

    def validate_architecture(self):
        """Accept head counts that do not divide the hidden size: pruning takes whole heads."""


class _Expert(nn.Module):
    def __init__(self, hidden, channels, act_fn):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, channels, bias=False)
        self.up_proj = nn.Linear(hidden, channels, bias=False)
        self.down_proj = nn.Linear(channels, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Experts(nn.ModuleList):
    """Experts as linears of their own, where transformers has single tensors of all of them."""

    def __init__(self, fused):
        each = fused.hidden_dim, fused.intermediate_dim, fused.act_fn
        super().__init__(_Expert(*each) for _ in range(fused.num_experts))

    def forward(self, hidden, chosen, weights):
        total, flat = torch.zeros_like(hidden), chosen.flatten()
        sizes = torch.bincount(flat, minlength=len(self)).tolist()
        for expert, part in zip(self, flat.argsort(stable=True).split(sizes), strict=True):
            if len(part):
                tokens, places = part // chosen.shape[1], part % chosen.shape[1]
                output = expert(hidden[tokens]) * weights[tokens, places, None]
                total.index_add_(0, tokens, output.to(total.dtype))
        return total


class _PrunedModel:
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for index, block in enumerate(self.model.layers):
            block = type(block)(_OfBlock(config, config.block_shapes[index]), index)
            if hasattr(block.mlp, "experts"):
                block.mlp.experts = _Experts(block.mlp.experts)
            self.model.layers[index] = block
        self.post_init()

    @classmethod
    def from_pretrained(cls, source, *args, adapters=True, **kwargs):
        """Load the model with its adapters; without them with ``adapters=False``."""
        model = super().from_pretrained(source, *args, **kwargs)
        if not adapters:
            return model
        from peft import PeftModel

        where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        return PeftModel.from_pretrained(model, source, subfolder="adapter", **where).eval()


def _derived(name, base, mixin, **fields):
    return type(name, (mixin, getattr(transformers, base)), {"__module__": __name__, **fields})


for _family, _config, _model in FAMILIES:
    if hasattr(transformers, _model):  # an older transformers may not have the others
        _name = f"Pruned{_model.removesuffix('ForCausalLM')}Config"
        _fields = {"model_type": f"pruned_{_family}", "__annotations__": {"block_shapes": list | None}}
        globals()[_name] = _derived(_name, _config, _PrunedConfig, block_shapes=None, **_fields)
        globals()[f"Pruned{_model}"] = _derived(f"Pruned{_model}", _model, _PrunedModel, config_class=globals()[_name])


class MixedBitsConfig(QuantizationConfigMixin):
    """Bits of every quantized linear."""

    def __init__(self, linear_bits, four_bit="nf4", double_quant=False, **_):
        self.quant_method = "mixed_bits"
        self.linear_bits, self.four_bit, self.double_quant = dict(linear_bits), four_bit, double_quant

    def for_bits(self, bits):
        """Return the settings under which transformers builds bitsandbytes' modules of one width."""
        if bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.four_bit,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )


class _Dispatch(ConversionOps):
    """Hands a linear's tensors to the converter of its bit-width."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer
        self.four = bnb_loading.Bnb4bitDeserialize(hf_quantizer)
        self.eight = bnb_loading.Bnb8bitDeserialize(hf_quantizer)

    def convert(self, input_dict, model=None, full_layer_name=None, **kwargs):
        module, _ = get_module_from_name(model, full_layer_name or next(iter(input_dict)))
        converter = self.eight if isinstance(module, bnb.nn.Linear8bitLt) else self.four
        return converter.convert(input_dict, model=model, full_layer_name=full_layer_name, **kwargs)


class MixedBitsQuantizer(Bnb4BitHfQuantizer):
    """Loads models whose linears are 4-bit, 8-bit or dense."""

    serialized_names = {
        "weight": [*Bnb4BitHfQuantizer.serialized_names["weight"], *Bnb8BitHfQuantizer.serialized_names["weight"][1:]]
    }

    def validate_environment(self, *args, **kwargs):
        """Accept any device."""

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and name != "bias"

    def _process_model_before_weight_loading(self, model, *args, **kwargs):
        config = self.quantization_config
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        for bits in (4, 8):
            of_this_width = {name for name, width in config.linear_bits.items() if width == bits}
            if of_this_width:
                others = "|".join(re.escape(name) for name in linears if name not in of_this_width)
                bnb_loading.replace_with_bnb_linear(
                    model,
                    modules_to_not_convert=[f"^(?:{others})$"],
                    quantization_config=config.for_bits(bits),
                    pre_quantized=True,
                )

    def _process_model_after_weight_loading(self, model, **kwargs):
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # peft wraps each linear by its own type
        model._weight_conversions = None
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False  # its layout there fails on pruned shapes
        return model

    def get_load_operations(self):
        return {"deserialize": _Dispatch}


def _decode_by_blocks():
    """Let bitsandbytes decode 4 bits in rows of whole blocks: with AVX512 its kernel for CPUs is wrong on others."""
    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

    def decoded(keys, codes, scales, block, kind, shape, dtype):
        count = math.prod(shape)
        rows = [count // block, block] if count % block == 0 else [1, count]
        rows = list(shape) if shape[-1] % block == 0 else rows
        return kernel.call_boxed(keys, codes, scales, block, kind, rows, dtype).reshape(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        library.impl("dequantize_4bit", decoded, "CPU", with_keyset=True, allow_override=True)
    return library


_DECODER = _decode_by_blocks()
AUTO_QUANTIZER_MAPPING["mixed_bits"] = MixedBitsQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["mixed_bits"] = MixedBitsConfig
