"""A built model as dense linears: what its codes and adapters stand for."""

import pytest
import torch
from banks import logits, make_bank, mixed_bits, pruned, real_model
from peft import get_peft_model
from torch import nn

from pipeline import checkpoint
from pipeline.compress import quantize
from pipeline.trial import adapters


@pytest.fixture(params=["llama", "qwen2"])
def built(request, tmp_path):
    """Config, tensors, bank and the model of bitsandbytes' modules with adapters that change its answers."""
    config, state = pruned(request.param)
    bank = make_bank(tmp_path, config, state)
    model = get_peft_model(
        real_model(config, state, bank, mixed_bits(config)), adapters.lora_config(config, bank.settings, 0.0)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return config, state, bank, model.eval()


def test_linears_are_their_codes_plus_their_adapters(built):
    config, state, bank, model = built
    scaling = bank.settings.lora_alpha / bank.settings.r
    expected = {}
    for name, bits in mixed_bits(config).items():
        layer = model.get_base_model().get_submodule(name)
        weight = state[f"{name}.weight"] if bits == 16 else quantize.dequantize(bank.codes(name, bits), torch.float32)
        product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        expected[name] = weight.float() + scaling * product
    biases = {name: tensor for name, tensor in state.items() if name.endswith("proj.bias")}
    found = checkpoint.dense(model)
    for name, weight in expected.items():
        linear = found.get_submodule(name)
        assert type(linear) is nn.Linear and linear.weight.dtype == torch.bfloat16
        torch.testing.assert_close(linear.weight.float(), weight, rtol=1e-2, atol=2e-3)
    assert all(torch.equal(found.get_parameter(name), bias) for name, bias in biases.items())
    assert not found.training and not any("lora" in name for name, _ in found.named_parameters())


def test_answers_are_those_of_bitsandbytes_modules_but_for_rounding(built):
    model = built[3]
    before = logits(model).float()
    with model.disable_adapter():
        without = logits(model).float()
    after = logits(checkpoint.dense(model)).float()
    # int8 modules also round what they receive
    assert (after - before).norm() < 0.05 * before.norm() < 0.5 * (without - before).norm()
