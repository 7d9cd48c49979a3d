"""A built model as dense linears: what its codes and adapters stand for."""

import pytest
import torch
from torch import nn

from pipeline import architecture
from pipeline.compress import quantize
from pipeline.device import Compute
from pipeline.export import dense
from tests.fixtures.exports import save_built

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 5, 6]])


@pytest.fixture(params=["llama", "qwen2"])
def built(request, tmp_path, tokenizer):
    """The folder and the model of bitsandbytes' modules, with adapters that change its answers."""
    return tmp_path, save_built(tmp_path, tokenizer, request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linears_are_their_codes_plus_their_adapters(built, dtype):
    folder, model = built
    found, base = dense.read(folder).model(Compute(torch.device("cpu"), dtype)), model.get_base_model()
    for name in architecture.linears(base.config):
        layer, linear = base.get_submodule(name), found.get_submodule(name)
        stored = {key: value for key, value in layer.base_layer.state_dict().items() if key != "bias"}
        product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        expected = quantize.dequantize(stored, torch.float32) + 2 * product  # lora_alpha / r
        assert type(linear) is nn.Linear and torch.equal(linear.weight, expected.to(dtype))
        assert (linear.bias is None) == (layer.base_layer.bias is None)
        assert linear.bias is None or torch.equal(linear.bias, layer.base_layer.bias.to(dtype))
    assert not found.training and not any("lora" in name for name, _ in found.named_parameters())


@torch.no_grad()
def test_answers_are_those_of_bitsandbytes_modules_but_for_rounding(built):
    folder, model = built
    before = model(input_ids=TOKENS).logits
    with model.disable_adapter():
        without = model(input_ids=TOKENS).logits
    after = dense.read(folder).model(Compute(torch.device("cpu"), torch.float32))(input_ids=TOKENS).logits
    # int8 modules also round what they receive
    assert (after - before).norm() < 0.05 * before.norm() and (after - before).norm() < 0.2 * (without - before).norm()
