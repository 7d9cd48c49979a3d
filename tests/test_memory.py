import copy
import random
from dataclasses import replace

import banks
import pytest
import torch
from conftest import FAMILIES, batches, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import LlamaConfig

from benchmarks import memory as benchmark
from pipeline import architecture, checkpoint
from pipeline.architecture import BlockShape
from pipeline.compress.layer_bank import linear_bits
from pipeline.compress.quantize import quantize, stored_bytes
from pipeline.search.allocate import Space
from pipeline.trial import kernels, memory, traced
from pipeline.trial.setting import Setting

SHAPES = [BlockShape(4, 2, 96), BlockShape(2, 1, 50), BlockShape(4, 2, 96)]


def pruned(family="llama"):
    return checkpoint.pruned_config(tiny_config(family, num_hidden_layers=3), SHAPES)


def setting(**changes):
    sizes = {"tokens": 192, "rows": 3, "r": 4, "double_quant": False, "inference_tokens": 96, "inference_rows": 2}
    return Setting(**sizes | changes)


def uniform(config, bits):
    return dict.fromkeys(architecture.linears(config), bits)


def peak(config, bits, **changes):
    return memory.predict(config, uniform(config, bits), setting(**changes))


def whole(config, widths, one):
    """Trace training and inference of all blocks at their own bits."""
    return tuple(step(traced.model_of(config, widths, one), one)[1] for step in (traced.training, traced.inference))


# --- the prediction against a trace of the whole model -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_of_mixed_linears_equals_a_trace_of_the_whole_to_the_byte(family):
    config, generator = pruned(family), random.Random(0)
    for widths in ((4, 8), (4, 8, 16)) if family == "llama" else ((4, 8, 16),):
        widths = {name: generator.choice(widths) for name in architecture.linears(config)}
        found = memory.predict(config, widths, setting())
        assert (found.training, found.inference) == whole(config, widths, setting())


def test_prediction_of_many_equal_blocks_equals_a_trace_of_the_whole():
    config, generator = tiny_config("qwen3", num_hidden_layers=7), random.Random(2)
    widths = {name: generator.choice((4, 8, 16)) for name in architecture.linears(config)}
    found = memory.predict(config, widths, setting())
    assert (found.training, found.inference) == whole(config, widths, setting())


@pytest.mark.parametrize("changes", [{"double_quant": True}, {"gradient_checkpointing": True},
                                     {"teacher": True}, {"dropout": 0.0, "accumulate": False}, {"fast": True},
                                     {"tokens": 2048, "inference_tokens": 2048}])  # fmt: skip
def test_prediction_equals_a_trace_of_the_whole_under_any_setting(changes):
    config, generator, one = pruned(), random.Random(1), setting(**changes)
    widths = {name: generator.choice((4, 8)) for name in architecture.linears(config)}
    found = memory.predict(config, widths, one)
    assert (found.training, found.inference) == whole(config, widths, one)


def test_tracing_leaves_the_config_as_it_was():
    config = pruned()
    before = copy.deepcopy(config.to_dict())
    peak(config, 4)
    assert config.to_dict() == before and config._attn_implementation == pruned()._attn_implementation


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prediction_is_exactly_linear_in_the_bits_of_blocks(family):
    config, generator = pruned(family), random.Random(0)
    units = architecture.units(config, "block")

    def predict(bits):
        return memory.predict(config, linear_bits(units, bits), setting()).training

    space = Space.of(predict, len(units), 1.0, None)
    for _ in range(20):
        bits = tuple(generator.choice((4, 8)) for _ in units)
        assert space.memory(bits) == predict(bits)


def test_linear_model_is_a_bound_where_single_linears_share_an_input():
    config = checkpoint.pruned_config(tiny_config(num_hidden_layers=2), SHAPES[:2])
    units, generator = architecture.units(config, "linear"), random.Random(0)

    def predict(bits):
        return memory.predict(config, linear_bits(units, bits), setting()).training

    space = Space.of(predict, len(units), 1.0, None)
    shared = 2 * 192 * 64  # the 16-bit input of q, k and v; block 0's needs no gradient and is not kept
    q_and_k = tuple(8 if unit.name in ("1.q_proj", "1.k_proj") else 4 for unit in units)
    assert space.memory(q_and_k) - predict(q_and_k) == shared
    for _ in range(5):
        bits = tuple(generator.choice((4, 8)) for _ in units)
        assert space.memory(bits) >= predict(bits)


# --- the trace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "qwen2, pruned",
        "a teacher's targets",
        "fused adapters, all 4, pruned",
        "fused adapters, all 8",
        "fused adapters, 16-bit",
        "fused adapters, mixed, pruned",
        "gemma2, pruned",
        "qwen3_moe, pruned",
    ],
)
def test_trace_for_a_cpu_agrees_with_the_allocations_of_real_steps(name, monkeypatch):
    monkeypatch.setattr(benchmark, "SMALL", benchmark.SMALL | {"vocab_size": 1024, "num_hidden_layers": 2})
    case = next(one for one in benchmark.CASES if one.name == name)
    found, expected = benchmark.compare(replace(case, shapes=case.shapes[:2]))
    assert expected[0] == pytest.approx(found[0], rel=0.001)
    assert expected[1] == pytest.approx(found[1], rel=0.01)


def test_a_record_of_memory_leaves_out_what_was_there_before():
    before = [torch.empty(100, 1000) for _ in range(3)]

    def work():
        kept = torch.empty(50, 1000)
        before.clear()
        torch.empty(60, 1000)
        return kept

    assert benchmark.peak_of(work) == 4 * 110_000
    before += [torch.empty(100, 1000) for _ in range(3)]  # perhaps at addresses that the first record knows
    assert benchmark.peak_of(work) == 4 * 110_000


def test_ledger_counts_storages_from_birth_to_end():
    ledger = traced.Ledger({})
    with ledger:
        first = torch.empty(100, device="meta")
        second = first + 1
        view = second[:50]
        assert (ledger.live, ledger.peak) == (800, 800)
        del first, second
        assert ledger.live == 400  # the view holds all of it
        del view
    assert (ledger.live, ledger.peak) == (0, 800)


def test_dropout_on_cuda_keeps_a_byte_an_element():
    ledger = traced.Ledger({})
    x = torch.empty(10, 30, device="meta", requires_grad=True)
    with kernels.Fused(), ledger:
        kept = F.dropout(x, 0.1)
        assert ledger.live == 300 * 4 + 300
    assert kept.shape == (10, 30)


def test_attention_on_cuda_keeps_no_scores():
    def spent(length):
        q, k = (torch.empty(1, heads, length, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
                for heads in (4, 2))  # fmt: skip
        ledger = traced.Ledger({})
        with kernels.Fused(), ledger:
            out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
            assert out.shape == (1, 4, length, 16)
            return ledger.live

    assert spent(512) - spent(256) == 256 * 4 * (16 * 2 + 4)  # outputs and a log-sum a head, nothing quadratic


def test_four_bit_product_dequantizes_the_whole_matrix():
    config = tiny_config(num_hidden_layers=1)
    model = traced.model_of(config, uniform(config, 4), setting())
    layer = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    ledger = traced.Ledger(kernels.CUDA.kernels)
    x = torch.empty(2, 96, dtype=torch.bfloat16, device="meta")
    with ledger:
        layer(x)
    assert ledger.peak >= 2 * 64 * 96 + 2 * 2 * 64


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_traced_model_holds_what_its_tensors_take(bits):
    config = tiny_config("qwen2")
    held, _ = traced.inference(traced.model_of(config, uniform(config, bits), setting()), setting())
    real = tiny_model("qwen2", torch.bfloat16)
    names = {f"{name}.weight" for name in architecture.linears(config)}
    rest = sum(2 * value.numel() for name, value in real.named_parameters() if name not in names)
    buffers = sum(4 * value.numel() for value in real.buffers())  # rotary frequencies stay in 32 bits
    matrices = adapters = 0
    for shape in architecture.shapes(config):
        for name in architecture.linear_names(config):
            size = architecture.linear_shape(config, shape, name)
            matrices += stored_bytes(*size, bits)
            adapters += 4 * 4 * sum(size)
    assert held == rest + buffers + matrices + adapters


def test_paged_optimizer_states_are_not_pytorchs():
    config = LlamaConfig(hidden_size=512, intermediate_size=600, num_hidden_layers=1, num_attention_heads=8)
    one = setting(r=200)  # 200 x 512 elements: paged
    model = traced.model_of(config, uniform(config, 4), one)
    _, paged = traced.training(model, one)
    _, held = traced.training(model, one, replace(kernels.CUDA, paged=False))
    every = sum(size for size in (one.numel() for one in model.parameters() if one.requires_grad) if size >= 100_000)
    assert held - paged == 8 * every > 0


def test_fused_adapters_keep_less_and_take_up_no_more_for_eight_bits():
    config = tiny_config()
    plain, fused = ([peak(config, bits, tokens=2048, fast=fast).training for bits in (4, 8)] for fast in (False, True))
    assert fused[0] < 0.8 * plain[0] and fused[1] < 0.8 * plain[1]
    weights = sum(stored_bytes(*architecture.linear_shape(config, shape, name), 8)
                  - stored_bytes(*architecture.linear_shape(config, shape, name), 4)
                  for shape in architecture.shapes(config) for name in architecture.linear_names(config))  # fmt: skip
    assert fused[1] - fused[0] == pytest.approx(weights, rel=0.05)


def test_gradient_checkpointing_lowers_training_alone():
    config = tiny_config()
    plain, again = (peak(config, 4, tokens=2048, gradient_checkpointing=on) for on in (False, True))
    assert again.training < 0.7 * plain.training
    assert again.inference == plain.inference


def test_fewer_bits_and_smaller_blocks_take_less_memory():
    config = tiny_config(num_hidden_layers=3)
    four, eight, sixteen = (peak(config, bits) for bits in (4, 8, 16))
    assert four.inference < eight.inference < sixteen.inference
    assert four.training < sixteen.training
    assert peak(pruned(), 4).training < four.training
    assert {one.source for one in (four, eight, sixteen)} == {"predicted"}


def test_adapters_cost_sixteen_bytes_a_parameter_and_28_a_token_and_rank():
    config = tiny_config()
    weights = sum(sum(architecture.linear_shape(config, shape, name))
                  for shape in architecture.shapes(config) for name in architecture.linear_names(config))  # fmt: skip
    small, large = (peak(config, 4, r=r) for r in (3, 8))
    assert large.training - small.training == pytest.approx(5 * (16 * weights + 28 * 192 * 4), rel=0.01)
    assert large.inference - small.inference == 5 * 4 * weights


# --- stored bytes ------------------------------------------------------------------------------------------------


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
    stored = quantize(torch.randn(outputs, inputs), bits, banks.settings(double_quant=double_quant))
    packed = {name: value for name, value in stored.items() if "bitsandbytes__" not in name and name != "weight_format"}
    total = sum(value.numel() * value.element_size() for value in packed.values())
    assert stored_bytes(outputs, inputs, bits, double_quant) == total


def test_nothing_is_measured_without_a_gpu():
    model, (part,) = tiny_model(), batches(1)
    result, found = memory.measured(lambda: model(part.tokens).logits.shape, torch.device("cpu"))
    assert (result, found) == ((2, 12, 512), None)


def test_keeping_the_best_weights_adds_a_copy_of_what_is_trained():
    config = tiny_config()
    widths = dict.fromkeys(architecture.linears(config), 4)
    plain, keeping = (memory.predict(config, widths, setting(keeps_best=best)) for best in (False, True))
    adapters = sum(
        setting().r * sum(architecture.linear_shape(config, shape, name))
        for shape in architecture.shapes(config)
        for name in architecture.linear_names(config)
    )
    assert keeping.training - plain.training == 4 * adapters
    assert keeping.inference == plain.inference


def test_full_training_adds_gradients_copies_and_states_of_all_that_is_not_quantized():
    config = pruned()
    widths = {name: 8 if "down_proj" in name else 4 for name in architecture.linears(config)}
    adapters, everything = (memory.predict(config, widths, setting(full=full)) for full in (False, True))
    assert everything.inference == adapters.inference
    dense = architecture.dense_parameters(config)
    # bf16 gradients; fp32 copies and two states, of which the paged ones lie elsewhere
    least = dense * (2 + 4)
    assert least <= everything.training - adapters.training <= dense * (2 + 4 + 8) + 2**20
