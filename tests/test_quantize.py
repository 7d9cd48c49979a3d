from itertools import pairwise
from itertools import product as product_of

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from banks import logits, make_bank, mixed_bits, pruned, real_model, settings
from conftest import FAMILIES, tiny_config

from pipeline import architecture, checkpoint
from pipeline.compress import bank_writer, layer_bank, quantize

# Appendix E of QLoRA; bitsandbytes' 4-bit float has three exponent bits, no fraction of its own and a subnormal.
NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip
FP4 = [sign * value / 12 for value in (0, 0.0625, 2, 3, 4, 6, 8, 12) for sign in (1, -1)]
SHAPES = [(96, 64), (40, 128), (7, 64), (64, 33), (5, 13)]


def matrix(rows=128, columns=96, seed=0, dtype=torch.float32, decay=0.0):
    """Random; with ``decay``, its singular values fall by that power of their rank."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    if decay:
        u, s, vh = torch.linalg.svd(values, full_matrices=False)
        values = u * (s[0] * torch.arange(1, len(s) + 1) ** -decay) @ vh
    return values.to(dtype)


def product(adapter, chosen):
    return chosen.lora_alpha / chosen.r * adapter.b @ adapter.a


def residual(weight, stored, adapter, chosen):
    return float((weight.float() - quantize.dequantize(stored, torch.float32) - product(adapter, chosen)).norm())


def initialized(weight, bits, chosen):
    """Codes and adapter of one matrix."""
    return bank_writer.initialize([weight], bits, chosen)[0]


def plain_error(weight, chosen, bits=4):
    return float((weight - quantize.dequantize(quantize.quantize(weight, bits, chosen), torch.float32)).norm())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- codes


@pytest.mark.parametrize(("four_bit", "table"), [("nf4", NF4), ("fp4", FP4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bit_weights_become_the_nearest_of_sixteen_levels(four_bit, table, shape):
    weight = matrix(*shape)
    found = quantize.dequantize(quantize.quantize(weight, 4, settings(four_bit=four_bit)), torch.float32)
    assert found.shape == weight.shape
    for values, restored in zip(weight.flatten().split(64), found.flatten().split(64), strict=True):
        largest = values.abs().max()
        distances = (values[:, None] / largest - torch.tensor(table)).abs()
        assert torch.all((values - restored).abs() <= largest * (distances.min(1)[0] + 1e-4))


@pytest.mark.parametrize("four_bit", ["nf4", "fp4"])
def test_double_quantization_adds_little_error(four_bit):
    weight = matrix()
    once, twice = (plain_error(weight, settings(four_bit=four_bit, double_quant=double)) for double in (False, True))
    assert once != twice
    assert twice == pytest.approx(once, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bit_error_is_at_most_half_a_step(shape):
    weight = matrix(*shape)
    stored = quantize.quantize(weight, 8, settings())
    rounding = 2**-11  # of fp16, which bitsandbytes quantizes from
    largest = weight.abs().amax(1, keepdim=True)
    assert stored["weight"].dtype == torch.int8
    torch.testing.assert_close(stored["SCB"], largest.half().float().flatten())
    error = (weight - quantize.dequantize(stored, torch.float32)).abs()
    assert torch.all(error <= largest / 127 / 2 + 2 * rounding * largest)
    assert error.max() > largest.min() / 127 / 4


@pytest.mark.parametrize("four_bit", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_four_bit_round_trip_is_that_of_bitsandbytes_own_module(four_bit, double_quant, dtype):
    weight = matrix(dtype=dtype)
    module = bnb.nn.Linear4bit(96, 128, bias=False, quant_type=four_bit, compress_statistics=double_quant)
    module.load_state_dict({"weight": weight})
    module.weight.data = weight
    module.to("cpu")
    expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    stored = quantize.quantize(weight, 4, settings(four_bit=four_bit, double_quant=double_quant))
    assert torch.equal(stored["weight"], module.weight.data)
    assert expected.dtype == dtype
    assert torch.equal(quantize.dequantize(stored, dtype), expected)


def test_eight_bit_round_trip_is_that_of_bitsandbytes_own_module():
    weight = matrix(dtype=torch.bfloat16)
    module = bnb.nn.Linear8bitLt(96, 128, bias=False, has_fp16_weights=False, threshold=0.0)
    stored = quantize.quantize(weight, 8, settings())
    module.weight = bnb.nn.Int8Params(stored["weight"], requires_grad=False, CB=stored["weight"], SCB=stored["SCB"])
    # rows of the unit matrix are exact in int8, so that the output is the dequantized weight
    with torch.no_grad():
        expected = module(torch.eye(96, dtype=torch.float16)).T
    torch.testing.assert_close(quantize.dequantize(stored, torch.float16), expected, rtol=2e-3, atol=1e-4)


def tensor_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("shape", [*SHAPES, (256, 129)])
@pytest.mark.parametrize(("bits", "double_quant"), [(4, False), (4, True), (8, False)])
def test_stored_bytes_are_those_of_codes_scales_and_tables(shape, bits, double_quant):
    stored = quantize.quantize(matrix(*shape), bits, settings(double_quant=double_quant))
    # left out: bitsandbytes' JSON on shape and type (about 100 bytes, on disk only) and its one-byte format mark
    counted = [value for name, value in stored.items() if "quant_state." not in name and name != "weight_format"]
    assert quantize.stored_bytes(*shape, bits, double_quant) == tensor_bytes(counted)


@pytest.mark.parametrize("double_quant", [False, True])
def test_stored_bytes_are_what_a_loaded_module_holds(double_quant):
    stored = quantize.quantize(matrix(), 4, settings(double_quant=double_quant))
    weight = bnb.nn.Params4bit.from_prequantized(
        stored["weight"], {name: value for name, value in stored.items() if name != "weight"}, device="cpu"
    )
    state = weight.quant_state
    held = [weight.data, state.absmax, state.code]
    if double_quant:
        held += [state.state2.absmax, state.state2.code]
    assert quantize.stored_bytes(128, 96, 4, double_quant) == tensor_bytes(held)


def test_stored_bytes_of_sixteen_bits_are_two_a_weight():
    assert quantize.stored_bytes(128, 96, 16) == tensor_bytes([matrix(dtype=torch.bfloat16)])


# --- adapters


@pytest.mark.parametrize("decay", [0.3, 0.7, 1.5])
@pytest.mark.parametrize(("r", "scale"), [(4, 2.0), (8, 0.5)])
def test_low_rank_reaches_the_optimum_of_a_full_svd(decay, r, scale):
    weight = matrix(160, 120, decay=decay)
    adapter = quantize.low_rank(weight, r, scale)
    assert (adapter.a.shape, adapter.b.shape) == ((r, 120), (160, r))
    best = float(torch.linalg.svdvals(weight.double())[r:].norm())
    found = float((weight.double() - scale * adapter.b.double() @ adapter.a.double()).norm())
    assert best * (1 - 1e-5) <= found <= best * 1.001


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (6, 40)])
def test_low_rank_of_a_small_matrix_is_exact(shape):
    weight = matrix(*shape)
    best = float(torch.linalg.svdvals(weight)[5:].norm())
    adapter = quantize.low_rank(weight, 5, 3.0)
    assert float((weight - 3.0 * adapter.b @ adapter.a).norm()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 20), (20, 2), (1, 1)])
def test_low_rank_of_fewer_directions_than_r_is_filled_with_zeros(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = quantize.low_rank(matrix, 6, 2.0)
    assert (found.a.shape, found.b.shape) == ((6, shape[1]), (shape[0], 6))
    torch.testing.assert_close(2.0 * found.b @ found.a, matrix, atol=1e-5, rtol=0)


def test_low_rank_shares_the_singular_values_between_both_matrices():
    adapter = quantize.low_rank(matrix(decay=0.7), 4, 2.0)
    torch.testing.assert_close(adapter.a.norm(dim=1), adapter.b.norm(dim=0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_loftq_residual_falls_with_iterations_below_plain_quantization(bits, decay):
    weight = matrix(decay=decay)
    errors = []
    for iterations in (1, 2, 4):
        chosen = settings(iterations=iterations, r=8)
        errors.append(residual(weight, *initialized(weight, bits, chosen), chosen))
    assert errors[0] < 0.99 * plain_error(weight, settings(), bits)
    assert errors[1] <= (1 + 1e-6) * errors[0]
    assert errors[2] <= (1 + 1e-6) * errors[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_loftq_residual_never_grows_with_iterations(bits, seed):
    # few directions beside the rank: here the last iteration is often not the best
    weight, errors = matrix(40, 24, decay=0.7, seed=seed), []
    for iterations in range(1, 7):
        chosen = settings(iterations=iterations, r=8 if bits == 8 else 16, lora_alpha=16)
        torch.manual_seed(0)
        errors.append(residual(weight, *initialized(weight, bits, chosen), chosen))
    assert all(later <= (1 + 1e-6) * earlier for earlier, later in pairwise(errors))


def test_loftq_gains_by_a_second_iteration_at_four_bits():
    weight, errors = matrix(decay=0.7), []
    for iterations in (1, 4):
        chosen = settings(iterations=iterations, r=16, lora_alpha=16)
        errors.append(residual(weight, *initialized(weight, 4, chosen), chosen))
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("iterations", [2, 4])
def test_loftq_at_eight_bits_alternates_as_its_equation_says(iterations):
    weight, chosen = matrix(40, 24), settings(iterations=iterations, r=4)
    stored, adapter = initialized(weight, 8, chosen)
    whole = weight.double().numpy()
    low = np.zeros_like(whole)
    for _ in range(iterations):
        half = (whole - low).astype(np.float16).astype(np.float64)  # bitsandbytes quantizes from fp16
        largest = np.abs(half).max(1, keepdims=True)
        codes = np.rint(127 * half / largest)
        u, s, vh = np.linalg.svd(whole - codes * largest / 127, full_matrices=False)
        low = u[:, :4] * s[:4] @ vh[:4]
    # a weight halfway between two codes may go either way
    assert (stored["weight"].numpy() != codes).mean() < 0.005
    np.testing.assert_allclose(stored["SCB"].numpy(), largest[:, 0], rtol=1e-3)
    np.testing.assert_allclose(product(adapter, chosen).numpy(), low, atol=0.02 * np.abs(low).max())


def test_one_loftq_iteration_is_the_best_adapter_of_the_plain_quantization_error():
    weight, chosen = matrix(dtype=torch.bfloat16), settings(r=8)
    stored, adapter = initialized(weight, 4, chosen)
    plain = quantize.quantize(weight, 4, chosen)
    assert all(torch.equal(stored[name], plain[name]) for name in plain)
    error = weight.double() - quantize.dequantize(plain, torch.float64)
    best = float(torch.linalg.svdvals(error)[8:].norm())
    assert best * (1 - 1e-5) <= residual(weight, stored, adapter, chosen) <= best * 1.001


@pytest.mark.parametrize("bits", [4, 8])
def test_pissa_adapter_holds_the_principal_directions(bits):
    weight, chosen = matrix(decay=0.7), settings(init="pissa", r=6)
    stored, adapter = initialized(weight, bits, chosen)
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(product(adapter, chosen), u[:, :6] * s[:6] @ vh[:6], rtol=1e-2, atol=1e-3)
    assert residual(weight, stored, adapter, chosen) < 0.9 * plain_error(weight, chosen, bits)
    rest = quantize.quantize(weight - product(adapter, chosen), bits, chosen)
    assert torch.equal(stored["weight"], rest["weight"])


@pytest.mark.parametrize("bits", [4, 8])
def test_gaussian_adapter_adds_nothing_at_first(bits):
    weight, chosen = matrix(64, 2000), settings(init="gaussian", r=8)
    stored, adapter = initialized(weight, bits, chosen)
    assert (adapter.a.shape, adapter.b.shape) == ((8, 2000), (64, 8))
    assert not adapter.b.any()
    assert float(adapter.a.std()) == pytest.approx(1 / 8, rel=0.05)
    plain = quantize.quantize(weight, bits, chosen)
    assert all(torch.equal(stored[name], plain[name]) for name in plain)


# --- the bank


@pytest.fixture(scope="module")
def model_and_bank(tmp_path_factory):
    config, state = pruned()
    return config, state, make_bank(tmp_path_factory.mktemp("bank"), config, state, iterations=2)


@pytest.mark.parametrize("bits", [4, 8])
def test_bank_gives_back_codes_and_adapters(model_and_bank, bits):
    config, state, bank = model_and_bank
    assert (bank.settings, bank.scale) == (settings(iterations=2), 2.0)
    for name in layer_bank.names_of(config):
        weight, codes, adapter = state[f"{name}.weight"], bank.codes(name, bits), bank.adapter(name, bits)
        assert (adapter.a.shape, adapter.b.shape) == ((4, weight.shape[1]), (weight.shape[0], 4))
        fresh = quantize.quantize((weight.float() - product(adapter, bank.settings)).bfloat16(), bits, bank.settings)
        assert set(codes) == set(fresh)
        assert residual(weight, codes, adapter, bank.settings) < plain_error(weight, bank.settings, bits)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_bank_holds_what_initialize_returns_under_its_seed(tmp_path, init):
    config, state = pruned()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    bank = make_bank(tmp_path, config, state, seed=5, init=init)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    for group, bits in product_of(layer_bank.groups_of(config), layer_bank.BITS):
        made = bank_writer.initialize([state[f"{name}.weight"] for name in group], bits, bank.settings)
        for name, (stored, adapter) in zip(group, made, strict=True):
            found = bank.codes(name, bits)
            assert set(found) == set(stored)
            assert all(torch.equal(found[key], stored[key]) for key in stored)
            assert torch.equal(bank.adapter(name, bits).a, adapter.a)
            assert torch.equal(bank.adapter(name, bits).b, adapter.b)


# --- bits


@pytest.mark.parametrize(("granularity", "a_block"), [("block", 1), ("group", 4), ("linear", 7)])
def test_linear_bits_gives_each_linear_the_bits_of_its_unit(granularity, a_block):
    config = tiny_config()
    units = architecture.units(config, granularity)
    bits = [8 if i % 3 == 0 else 4 for i in range(4 * a_block)]
    found = layer_bank.linear_bits(units, bits)
    assert set(found) == set(architecture.linears(config))
    assert sum(width == 8 for width in found.values()) == sum(
        len(unit.linears) for i, unit in enumerate(units) if i % 3 == 0
    )
    assert found["model.layers.0.self_attn.q_proj"] == 8
    assert found["model.layers.1.mlp.down_proj"] == bits[2 * a_block - 1]


def test_linear_bits_refuses_a_vector_of_another_length():
    with pytest.raises(ValueError):
        layer_bank.linear_bits(architecture.units(tiny_config(), "block"), [4, 4, 8])


# --- models


@pytest.mark.parametrize(
    ("family", "four_bit", "double_quant"), [*((family, "nf4", False) for family in FAMILIES), ("llama", "fp4", True)]
)
def test_simulated_four_bits_are_bitsandbytes_modules_exactly(tmp_path, family, four_bit, double_quant):
    config, state = pruned(family)
    bank = make_bank(tmp_path, config, state, four_bit=four_bit, double_quant=double_quant, init="gaussian")
    bits_of = dict.fromkeys(layer_bank.names_of(config), 4)
    real = real_model(config, state, bank, bits_of)
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in real.modules()) == len(bits_of)
    simulated = logits(checkpoint.from_state(config, layer_bank.simulated(state, bank, bits_of)))
    assert torch.equal(simulated, logits(real))
    assert not torch.equal(simulated, logits(checkpoint.from_state(config, state)))


def test_simulated_eight_bits_are_near_bitsandbytes_modules(model_and_bank):
    config, state, bank = model_and_bank
    found = {
        bits: logits(checkpoint.from_state(config, layer_bank.simulated(state, bank, every)))
        for bits in (4, 8, 16)
        for every in [dict.fromkeys(layer_bank.names_of(config), bits)]
    }
    real = logits(real_model(config, state, bank, dict.fromkeys(layer_bank.names_of(config), 8)))
    assert (found[8] - real).norm() < 0.05 * real.norm()
    assert (found[8] - real).norm() < (found[4] - real).norm() / 2


def test_simulation_changes_only_the_linears_below_sixteen_bits(model_and_bank):
    config, state, bank = model_and_bank
    bits_of = mixed_bits(config)
    found = layer_bank.simulated(state, bank, bits_of)
    assert set(found) == set(state)
    changed = {name for name in state if not torch.equal(found[name], state[name])}
    assert changed == {f"{name}.weight" for name, bits in bits_of.items() if bits != 16}
    for name, bits in bits_of.items():
        assert found[f"{name}.weight"].dtype == torch.bfloat16
        if bits != 16:
            step = {4: 0.16, 8: 0.006}[bits] * state[f"{name}.weight"].abs().max()
            difference = state[f"{name}.weight"].float() - found[f"{name}.weight"].float()
            adapter = product(bank.adapter(name, bits), bank.settings)
            assert (difference - adapter).abs().max() <= 1.5 * step


def test_quantized_state_holds_the_banks_codes_and_nothing_of_the_replaced_weights(model_and_bank):
    config, state, bank = model_and_bank
    bits_of = mixed_bits(config)
    found = layer_bank.quantized(state, bank, bits_of)
    expected = dict(state)
    for name, bits in bits_of.items():
        if bits != 16:
            del expected[f"{name}.weight"]
            expected |= {f"{name}.{key}": value for key, value in bank.codes(name, bits).items()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bank_takes_the_bytes_that_memory_is_predicted_from(model_and_bank):
    config, state, bank = model_and_bank
    name = layer_bank.names_of(config)[-1]
    for bits in layer_bank.BITS:
        codes = bank.codes(name, bits)
        held = tensor_bytes(value for key, value in codes.items() if key in ("weight", "weight.absmax", "SCB"))
        tables = 64 if bits == 4 else 0
        assert quantize.stored_bytes(*state[f"{name}.weight"].shape, bits) == held + tables
