import random

import pytest
import torch
from conftest import FAMILIES, batches, tiny_config, tiny_model
from transformers import LlamaConfig

from pipeline import architecture, checkpoint, memory, params
from pipeline.allocate import Space
from pipeline.architecture import BlockShape
from pipeline.memory import Setting
from pipeline.quantize import linear_bits, quantize, stored_bytes

LLAMA_7B_PARAMETERS = 6_738_415_616
GRANULARITIES = tuple(architecture.GRANULARITIES)


def llama_7b():
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        tie_word_embeddings=False,
    )  # fmt: skip


def setting(**changes):
    return Setting(**{"tokens": 1000, "r": 8, "double_quant": False, "inference_tokens": 500} | changes)


def uniform(config, bits):
    return dict.fromkeys(architecture.linears(config), bits)


def peak(config, bits, **changes):
    return memory.predict(config, uniform(config, bits), setting(**changes))


def quantization(**changes):
    values = {"four_bit": "nf4", "double_quant": False, "init": "loftq", "iterations": 1, "r": 4, "lora_alpha": 8}
    return params.Quantize(**values | changes)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tokens", [1000, 1024, 999])
@pytest.mark.parametrize("shapes", [None, [(4, 2, 96), (2, 1, 50), (4, 2, 33), (2, 1, 96)]], ids=["dense", "pruned"])
def test_prediction_is_exactly_linear_in_the_bits(granularity, tokens, shapes):
    config = tiny_config()
    if shapes:
        config = checkpoint.pruned_config(config, [BlockShape(*shape) for shape in shapes])
    units = architecture.units(config, granularity)

    def predict(bits):
        return memory.predict(config, linear_bits(units, bits), setting(tokens=tokens)).training

    space = Space.of(predict, len(units), 1.0, None)
    generator = random.Random(0)
    for _ in range(30):
        bits = tuple(generator.choice((4, 8)) for _ in units)
        assert space.memory(bits) == predict(bits)


@pytest.mark.parametrize(
    "outputs, inputs, bits, double_quant, expected",
    [
        (64, 96, 16, False, 2 * 64 * 96),
        (64, 96, 8, False, 64 * 96 + 64 * 4),
        (64, 96, 4, False, 64 * 96 // 2 + 96 * 4 + 64),
        (3, 5, 4, False, 8 + 4 + 64),  # 15 weights: 8 bytes, one scale
        (13, 5, 4, False, 33 + 2 * 4 + 64),  # 65 weights: two scales
        (64, 96, 4, True, 64 * 96 // 2 + 96 + 4 + 1024 + 64),
        (256, 128, 4, True, 256 * 128 // 2 + 512 + 2 * 4 + 1024 + 64),
    ],
)
def test_stored_bytes_by_hand(outputs, inputs, bits, double_quant, expected):
    assert stored_bytes(outputs, inputs, bits, double_quant) == expected


@pytest.mark.parametrize("bits, double_quant", [(4, False), (4, True), (8, False)])
def test_stored_bytes_are_those_of_the_tensors(bits, double_quant):
    outputs, inputs = 48, 128
    torch.manual_seed(0)
    stored = quantize(torch.randn(outputs, inputs), bits, quantization(double_quant=double_quant))
    packed = {name: value for name, value in stored.items() if "bitsandbytes__" not in name and name != "weight_format"}
    total = sum(value.numel() * value.element_size() for value in packed.values())
    assert stored_bytes(outputs, inputs, bits, double_quant) == total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family, changes", [*((family, {}) for family in FAMILIES),
                                             ("llama", {"attention_bias": True, "mlp_bias": True}),
                                             ("qwen3", {"attention_bias": True})])  # fmt: skip
def test_dense_bytes_are_those_of_what_is_not_quantized(family, changes, tied):
    model = tiny_model(family, torch.bfloat16, tie_word_embeddings=tied, **changes)
    weights = {f"{name}.weight" for name in architecture.linears(model.config)}
    rest = [value for name, value in model.named_parameters() if name not in weights]
    assert memory.dense_bytes(model.config) == sum(value.numel() * value.element_size() for value in rest)


def test_dense_bytes_of_a_pruned_model():
    config = tiny_config("qwen2")
    shapes = [BlockShape(2, 1, 50), BlockShape(4, 2, 96), BlockShape(2, 1, 96), BlockShape(4, 2, 10)]
    pruned = checkpoint.pruned_config(config, shapes)
    lost = 2 * (2 * 16 + 1 * 16 + 1 * 16)  # biases of q, k and v in the two blocks that lost half their heads
    assert memory.dense_bytes(pruned) == memory.dense_bytes(config) - 2 * lost


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_of_a_7b_model_are_exact(bits):
    config = llama_7b()
    quantized = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scales = {16: 0, 8: 4 * 32 * (5 * 4096 + 2 * 11008), 4: quantized // 64 * 4 + 7 * 32 * 64}[bits]
    expected = 2 * (LLAMA_7B_PARAMETERS - quantized) + quantized * bits // 8 + scales
    # without tokens and adapters nothing but weights is left
    empty = peak(config, bits, tokens=0, r=0, inference_tokens=0)
    assert (empty.training, empty.inference) == (expected, expected)


def test_dense_7b_model_takes_two_bytes_a_parameter():
    assert peak(llama_7b(), 16, tokens=0, r=0, inference_tokens=0).training == 2 * LLAMA_7B_PARAMETERS


@pytest.mark.parametrize("double_quant", [False, True])
def test_fewer_bits_take_less_memory(double_quant):
    four, eight, sixteen = (peak(llama_7b(), bits, tokens=1024, double_quant=double_quant) for bits in (4, 8, 16))
    assert four.training < eight.training < sixteen.training
    assert four.inference < eight.inference < sixteen.inference


def test_double_quantization_takes_less_memory():
    assert peak(llama_7b(), 4, double_quant=True).training < peak(llama_7b(), 4).training


def test_training_of_a_7b_model_is_in_a_sane_range():
    found = [peak(llama_7b(), bits, tokens=1024, inference_tokens=1024) for bits in (4, 8, 16)]
    for one, weights in zip(found, (3.5, 6.7, 13.4), strict=True):
        assert weights * 1e9 < one.inference < one.training < weights * 1e9 + 15e9
    assert {one.source for one in found} == {"predicted"}


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_adapters_cost_sixteen_bytes_a_parameter_and_28_a_token_and_rank(bits):
    config = tiny_config()
    parameters = sum(sum(architecture.linear_shape(config, shape, name))
                     for shape in architecture.shapes(config) for name in architecture.LINEARS)  # fmt: skip
    small, large = (peak(config, bits, r=r) for r in (3, 8))
    assert large.training - small.training == 5 * (16 * parameters + 28 * 1000 * 4)
    assert large.inference - small.inference == 5 * 4 * parameters


@pytest.mark.parametrize("bits, eight", [(4, 0), (8, 1), (16, 0)])
def test_each_token_costs_what_the_formula_says(bits, eight):
    config, r = tiny_config(), 8
    block = 33 * 64 + 9 * 64 + 4 * 32 + 11 * 96 + 28 * r + 4 * 4 + 8 + eight * (4 * 64 + 2 * 96)
    large, small = (peak(config, bits, tokens=tokens) for tokens in (5000, 2000))
    assert (large.training - small.training) / 3000 == pytest.approx(4 * block + 4 * 64, abs=1e-2)
    assert large.inference == small.inference


def test_loss_holds_at_most_a_chunk_of_logits():
    config = tiny_config()
    few, chunk, more = (peak(config, 4, tokens=tokens).training for tokens in (128, 256, 384))
    assert (chunk - few) - (more - chunk) == 128 * 12 * config.vocab_size


def test_pruning_lowers_the_prediction():
    config = tiny_config()
    pruned = checkpoint.pruned_config(config, [BlockShape(2, 1, 96)] + [BlockShape(4, 2, 80)] * 3)
    assert peak(pruned, 4).training < peak(config, 4).training


def test_nothing_is_measured_without_a_gpu():
    model, (part,) = tiny_model(), batches(1)
    result, found = memory.measured(lambda: model(part.tokens).logits.shape, torch.device("cpu"))
    assert (result, found) == ((2, 12, 512), None)
