from itertools import product

import bitsandbytes.functional as bnb
import pytest
import torch
from banks import settings
from conftest import FAMILIES, batches, tiny_model

from benchmarks import codes as benchmark
from pipeline import architecture
from pipeline.compress import codes, linear_grams, quantize
from pipeline.compress.codes import Fit, Grid, Problem
from pipeline.data.alpaca import IGNORED, Batch

THREE = Grid(torch.tensor([-1.0, 0.0, 1.0]), block=4)
SIGNED = Grid(torch.tensor([-8.0, -3.0, 1.0, 6.0]), block=16, ends=(-8.0, 6.0), scale_dtype=torch.float16)
# Blocks within rows, across two, across many. 48 and 80: bitsandbytes alone misreads their codes with AVX512.
SHAPES = [(24, 128), (10, 192), (16, 100), (16, 48), (7, 80), (7, 33), (5, 13), (3, 1)]
ODD_SCALES = (1.0, 0.93, 0.87, 0.8)
PLAIN = Fit(factors=(1.0,))


def problem(rows=24, columns=128, seed=0, tokens=None, dtype=torch.float32):
    """A weight and the Gram matrix of inputs that depend on each other, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.linspace(0.2, 3, columns)[torch.randperm(columns, generator=generator)]
    count = 4 * columns if tokens is None else tokens
    common = torch.randn(count, 1, generator=generator)
    inputs = (torch.randn(count, columns, generator=generator) @ mixing + common) * sizes
    return torch.randn(rows, columns, generator=generator).to(dtype), inputs.T @ inputs / max(count, 1)


def small(seed, rows=2):
    """Two rows of four weights, three levels, a scale for a row: few enough to try all codes."""
    weight, gram = problem(rows, 4, seed)
    return Problem(weight.T.contiguous(), codes.damped(gram, 0.01), THREE)


def restored(stored):
    """What stock bitsandbytes makes of stored tensors."""
    if "SCB" in stored:
        return bnb.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
    packed = {name.removeprefix("weight."): value for name, value in stored.items() if name != "weight"}
    return bnb.dequantize_4bit(stored["weight"], bnb.QuantState.from_dict(packed, device="cpu"))


def calibrated(weight, *arguments, **named):
    """The codes of one matrix."""
    return codes.calibrated([weight], *arguments, **named)[0]


def loss(weight, gram, rounded):
    left = weight.double() - rounded.double()
    return float(((left @ gram.double()) * left).sum())


def nearest_loss(weight, gram, bits, **changes):
    return loss(weight, gram, restored(quantize.quantize(weight, bits, settings(**changes))))


def rounded(given, index, scales):
    """Q, [out, in]."""
    return given.grid.values(index, scales[given.block_of(torch.arange(len(given.dense)))]).T


def loss_of(given, index, scales):
    return loss(given.dense.T, given.gram, rounded(given, index, scales))


def recursion(given, scales, order=None):
    """Error feedback as its paper's equations say: the inverse is updated column by column, in fp64."""
    rest, inverse = given.dense.double().T.clone(), torch.linalg.inv(given.gram)
    index = torch.empty(rest.shape, dtype=torch.uint8)
    blocks = given.block_of(torch.arange(rest.shape[1]))
    for j in range(rest.shape[1]) if order is None else order.tolist():
        levels = given.grid.levels.double() * scales[blocks[j]].double()[:, None] * given.grid.unit
        index[:, j] = (rest[:, j, None] - levels).abs().argmin(1)
        error = rest[:, j] - levels.gather(1, index[:, j, None].long())[:, 0]
        rest = rest - torch.outer(error, inverse[j]) / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return index.T


# --- error feedback


@pytest.mark.parametrize("seed", range(5))
def test_feedback_is_the_papers_recursion_on_three_levels(seed):
    given = small(seed)
    index, scales = codes.feed_back(given, (1.0, 0.7))
    assert torch.equal(index, recursion(given, scales))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8, "signed"])
@pytest.mark.parametrize("descending", [False, True])
def test_feedback_is_the_papers_recursion_across_tiles(shape, bits, descending):
    weight, gram = problem(*shape)
    grid = SIGNED if bits == "signed" else codes.grid_of(weight, bits, "nf4")[0]
    given = Problem(weight.T.contiguous(), codes.damped(gram, 0.01), grid)
    order = gram.diagonal().argsort(descending=True) if descending else None
    index, scales = codes.feed_back(given, ODD_SCALES, order)
    expected = recursion(given, scales, order)
    # A weight halfway between two levels may go either way, and moves those after it.
    assert (index != expected).float().mean() < (0.1 if bits == 8 else 0.02)
    assert loss_of(given, index, scales) == pytest.approx(loss_of(given, expected, scales), rel=0.01, abs=1e-9)


def test_all_codes_tried_on_a_tiny_layer_leave_little_to_gain():
    best = fed = nearest = 0.0
    for seed in range(40):
        given = small(seed)
        scales = given.dense.abs().amax(0)
        index, _ = codes.feed_back(given, (), scales=scales)
        plain = given.grid.nearest(given.dense, scales)
        every = torch.tensor(list(product(range(3), repeat=4)), dtype=torch.uint8)  # of one row
        for row in range(2):
            one = Problem(given.dense[:, [row]], given.gram, THREE)
            values = [loss_of(one, found[:, [row]], scales[[row]]) for found in (index, plain)]
            least = min(loss_of(one, chosen[:, None], scales[[row]]) for chosen in every)
            assert least <= values[0] * (1 + 1e-6)
            fed, nearest, best = fed + values[0], nearest + values[1], best + least
    assert best < fed < 0.8 * nearest
    assert fed < 1.35 * best


def test_inputs_that_tell_nothing_of_each_other_give_bitsandbytes_own_codes():
    weight, _ = problem()
    for bits, four_bit in ((4, "nf4"), (4, "fp4")):
        found = calibrated(weight, torch.eye(128), bits, four_bit, fit=PLAIN)
        expected = quantize.quantize(weight, bits, settings(four_bit=four_bit))
        assert set(found) == set(expected)
        torch.testing.assert_close(found["weight.absmax"], expected["weight.absmax"])
        assert all(found[name].dtype == value.dtype for name, value in expected.items())
        assert all(found[name].shape == value.shape for name, value in expected.items())
        # a weight halfway between two levels, and the two zeros of FP4, may go either way
        torch.testing.assert_close(restored(found), restored(expected), rtol=0, atol=1e-6)
    half = weight.half().float()
    found, expected = calibrated(half, torch.eye(128), 8, fit=PLAIN), quantize.quantize(half, 8, settings())
    assert set(found) == set(expected)
    assert torch.equal(found["SCB"], expected["SCB"])
    assert (found["weight"] != expected["weight"]).float().mean() < 0.002


@pytest.mark.parametrize("columns", [1, 5, 70])
def test_inverse_factor_is_upper_triangular_and_gives_the_inverse(columns):
    gram = codes.damped(problem(2, columns)[1], 0.01)
    factor = codes.inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(gram))


# --- scales


@pytest.mark.parametrize("seed", range(5))
def test_scale_of_a_block_is_the_best_of_those_tried(seed):
    generator = torch.Generator().manual_seed(seed)
    weights, importance = torch.randn(3, 64, generator=generator), torch.rand(3, 64, generator=generator)
    grid, factors = codes.grid_of(weights, 4, "nf4")[0], (1.0, 0.9, 0.8)
    found = codes.best_scales(weights, importance, grid, factors)
    for block in range(3):
        costs = {}
        for factor in factors:
            scale = factor * weights[block].abs().max()
            distances = (weights[block][:, None] - scale * grid.levels).abs().min(1)[0]
            costs[float(scale)] = float((importance[block] * distances.square()).sum())
        assert float(found[block]) == pytest.approx(min(costs, key=costs.get), rel=1e-6)


def test_important_outlier_keeps_the_scale_and_an_unimportant_one_does_not():
    weights = torch.full((2, 64), 0.8)
    weights[:, 0] = 1.0
    importance = torch.ones(2, 64)
    importance[0, 0], importance[1, 0] = 1e4, 1e-4
    found = codes.best_scales(weights, importance, codes.grid_of(weights, 4, "nf4")[0], (1.0, 0.8))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.8]))


def test_chosen_scales_are_stored_as_they_are():
    weight, gram = problem()
    largest = calibrated(weight, torch.eye(128), 4, fit=PLAIN)["weight.absmax"]
    found = calibrated(weight, torch.eye(128), 4, fit=Fit(factors=(0.85,)))["weight.absmax"]
    torch.testing.assert_close(found, 0.85 * largest)
    wide, searched = (calibrated(weight, gram, 4, fit=Fit(factors=f)) for f in ((1.0,), ODD_SCALES))
    assert loss(weight, gram, restored(searched)) < loss(weight, gram, restored(wide))


def test_block_across_two_rows_has_the_scale_of_both_parts():
    weight = torch.full((2, 96), 0.1)
    weight[0, 90], weight[1, 40] = 2.0, 7.0  # the second block is 64 to 95 of row 0 and 0 to 31 of row 1
    found = calibrated(weight, torch.eye(96), 4, fit=PLAIN)["weight.absmax"]
    torch.testing.assert_close(found, torch.tensor([0.1, 2.0, 7.0]))


# --- storage


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "four_bit", "double_quant"), [(4, "nf4", False), (4, "nf4", True), (4, "fp4", True), (8, "nf4", False)]
)
def test_stock_bitsandbytes_restores_what_the_codes_were_fitted_to(
    monkeypatch, shape, dtype, bits, four_bit, double_quant
):
    weight, gram = problem(*shape, dtype=dtype)
    assumed, feed_back = [], codes.feed_back

    def watched(given, *rest):
        index, scales = feed_back(given, *rest)
        back = scales
        if double_quant:
            packed, state = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
            back = bnb.dequantize_blockwise(packed, state) + scales.mean()
        assumed.append(rounded(given, index, back))
        return index, scales

    monkeypatch.setattr(codes, "feed_back", watched)
    stored = calibrated(weight, gram, bits, four_bit, double_quant)
    assert restored(stored).dtype == (torch.float32 if bits == 8 else dtype)
    assert torch.equal(restored(stored).float(), assumed[-1])
    assert torch.equal(quantize.dequantize(stored, torch.float32), assumed[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "double_quant"), [(4, False), (4, True), (8, False)])
def test_stored_tensors_are_named_and_shaped_as_those_of_nearest_codes(shape, bits, double_quant):
    weight, gram = problem(*shape, dtype=torch.bfloat16)
    found = calibrated(weight, gram, bits, "nf4", double_quant)
    expected = quantize.quantize(weight, bits, settings(double_quant=double_quant))
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        if "quant_state" not in name:
            assert found[name].shape == value.shape
            assert found[name].is_contiguous()


# --- the whole


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("bits", "four_bit", "double_quant"), [(4, "nf4", False), (4, "nf4", True), (4, "fp4", False), (8, "nf4", False)]
)
def test_calibrated_codes_lose_less_than_the_nearest(shape, seed, bits, four_bit, double_quant):
    weight, gram = problem(*shape, seed=seed)
    found = loss(weight, gram, restored(calibrated(weight, gram, bits, four_bit, double_quant)))
    assert found < 0.75 * nearest_loss(weight, gram, bits, four_bit=four_bit, double_quant=double_quant)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shapes", [((24, 128), (10, 128)), ((3, 96), (5, 96)), ((3, 33), (5, 33))])
def test_linears_with_the_same_inputs_are_rounded_as_each_alone(bits, shapes):
    gram = problem(*shapes[0])[1]
    weights = [problem(*shape, seed=seed)[0] for seed, shape in enumerate(shapes)]
    for weight, together in zip(weights, codes.calibrated(weights, gram, bits), strict=True):
        alone = calibrated(weight, gram, bits)
        assert set(together) == set(alone)
        moved = (restored(together) != restored(alone)).float().mean()  # products of other shapes round otherwise
        assert moved < 0.02
        assert loss(weight, gram, restored(together)) == pytest.approx(loss(weight, gram, restored(alone)), rel=0.02)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_rank_deficient_gram_matrix_is_no_hindrance(bits, tokens):
    weight, gram = problem(tokens=tokens)
    found = restored(calibrated(weight, gram, bits))
    assert torch.isfinite(found).all()
    assert loss(weight, gram, found) <= nearest_loss(weight, gram, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_input_that_never_comes_leaves_its_weights_near(bits):
    weight, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    found = restored(calibrated(weight, gram, bits, fit=Fit()))
    largest = weight.abs().max() * 1.5
    assert (weight[:, 5] - found[:, 5]).abs().max() <= largest * (0.16 if bits == 4 else 0.006)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_of_zeros_stay_zero(bits, double_quant):
    weight, gram = problem()
    weight[3:5] = 0
    found = restored(calibrated(weight, gram, bits, "nf4", double_quant))
    assert torch.isfinite(found).all()
    assert float(found[3:5].abs().max()) < (1e-3 if double_quant else 1e-9)


def test_codes_do_not_depend_on_the_scale_of_the_gram_matrix():
    weight, gram = problem()
    found = [calibrated(weight, factor * gram, 4) for factor in (1.0, 1024.0)]
    assert torch.equal(found[0]["weight"], found[1]["weight"])


def test_one_massive_activation_does_not_damp_the_rest():
    _, gram = problem()
    usual = gram.diagonal().median()
    gram[7, 7] = 1e6
    added = codes.damped(gram, 0.01).diagonal() - gram.diagonal().double()
    torch.testing.assert_close(added, torch.full_like(added, 0.01 * float(usual)), rtol=0.1, atol=1e-9)


# --- Gram matrices


def brute_grams(model, parts):
    """X^T X / tokens of every linear, from a pass of the whole model."""
    total, tokens = {}, 0
    for part in parts:
        real = part.labels != IGNORED
        real[:, 0] = True
        tokens += int(real.sum())
        handles = []
        for name in architecture.linears(model.config):

            def hook(_, inputs, name=name, real=real):
                rows = inputs[0][real].double()
                total[name] = total.get(name, 0) + rows.T @ rows

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        with torch.no_grad():
            model(input_ids=part.tokens, use_cache=False)
        for handle in handles:
            handle.remove()
    return {name: value / tokens for name, value in total.items()}


def padded_batches():
    parts = batches(2, rows=3, length=12)
    labels = parts[0].labels.clone()
    labels[1, 7:] = IGNORED
    return [Batch(parts[0].tokens, labels), *parts[1:], *batches(1, rows=2, length=20, seed=1)]


# Those of experts, which receive some of the tokens: test_experts.py.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_gram_matrices_are_those_of_what_each_linear_receives(family):
    model, parts = tiny_model(family), padded_batches()
    found = {}
    for block in linear_grams.collect(model, parts):
        found |= block
    expected = brute_grams(model, parts)
    assert list(found) == list(architecture.linears(model.config))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)


def test_linears_with_the_same_inputs_share_their_gram_matrix():
    block = next(linear_grams.collect(tiny_model(), batches(1)))
    q, k, v, o, gate, up, down = block.values()
    assert q is k is v
    assert gate is up
    assert len({id(value) for value in (q, o, gate, down)}) == 4


@pytest.mark.parametrize("sequential", [False, True])
def test_sequential_matrices_see_the_blocks_that_were_changed_before(sequential):
    model, parts = tiny_model(), padded_batches()
    before, found = brute_grams(model, parts), {}
    for number, block in enumerate(linear_grams.collect(model, parts, sequential)):
        found |= block
        with torch.no_grad():
            architecture.blocks(model)[number].mlp.down_proj.weight.mul_(0.5)
    expected = brute_grams(model, parts) if sequential else before
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)


def test_collecting_leaves_the_model_as_it_was():
    model, part = tiny_model(), batches(1)[0]
    with torch.no_grad():
        before = model(input_ids=part.tokens).logits
        list(linear_grams.collect(model, [part]))
        assert torch.equal(model(input_ids=part.tokens).logits, before)
    assert not any("forward" in vars(block) for block in architecture.blocks(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tokens_are_counted_without_padding():
    assert linear_grams.count_tokens(padded_batches()) == 3 * 12 - 5 + 3 * 12 + 2 * 20


@pytest.mark.parametrize(("inputs", "tokens", "enough"), [(1536, 3071, False), (1536, 3072, True), (1, 2, True)])
def test_enough_tokens_are_twice_the_inputs(inputs, tokens, enough):
    assert linear_grams.enough_tokens(inputs, tokens) is enough
    assert linear_grams.tokens_needed(1536) == 3072


# --- the benchmark


def test_benchmark_reads_names_of_codes():
    assert benchmark.parse("16") == benchmark.Codes("16", "16", None)
    assert benchmark.parse("int8:nearest").fit is None
    assert benchmark.parse("fp4").fit == Fit()
    found = benchmark.parse("nf4:damping=0.1,factors=[1.0,0.9],sequential=true")
    assert (found.kind, found.sequential, found.double_quant) == ("nf4", True, False)
    assert found.fit == Fit(damping=0.1, factors=(1.0, 0.9))


@pytest.mark.parametrize("name", ["nf5", "nf4:dumping=1"])
def test_benchmark_refuses_unknown_codes(name):
    with pytest.raises(SystemExit, match=name):
        benchmark.parse(name)


def test_benchmark_puts_calibrated_codes_into_a_model_and_they_lose_less():
    lost = {}
    for name in ("nf4:nearest", "nf4", "nf4:sequential=true", "int8"):
        model, chosen = tiny_model(), benchmark.parse(name)
        lost[name] = benchmark.put(model, linear_grams.collect(model, batches(4, rows=8), chosen.sequential), chosen)
    assert lost["int8"] < 0.1 * lost["nf4"]
    assert lost["nf4"] < 0.8 * lost["nf4:nearest"]
    assert lost["nf4:sequential=true"] < 0.8 * lost["nf4:nearest"]


# --- scales of both signs


def test_scales_put_the_largest_weight_at_either_end():
    blocks = torch.tensor([[0.5, -4.0, 1.0, 2.0], [3.0, 0.0, -1.0, 2.0]])
    found = SIGNED.scales(blocks, (1.0, 0.5))
    expected = torch.tensor([[0.5, -0.375], [0.25, -0.1875], [-4 / 6, 0.5], [-2 / 6, 0.25]])
    assert torch.equal(found, expected.half().float())


def test_best_scale_of_either_sign_is_the_best_of_all_that_are_tried():
    blocks = torch.randn(30, 16, generator=torch.Generator().manual_seed(5))
    weighs = torch.rand(30, 16, generator=torch.Generator().manual_seed(6))
    found = codes.best_scales(blocks, weighs, SIGNED, ODD_SCALES)

    def cost(scales):
        values = SIGNED.levels * scales[:, None, None]
        return ((blocks[:, :, None] - values).square().amin(2) * weighs).sum(1)

    tried = torch.stack([cost(scales) for scales in SIGNED.scales(blocks, ODD_SCALES)])
    torch.testing.assert_close(cost(found), tried.amin(0), rtol=0.01, atol=0)
    assert (found > 0).any() and (found < 0).any() and torch.equal(found, found.half().float())


def test_blocks_of_zeros_have_scales_that_can_be_divided_by():
    assert torch.equal(SIGNED.scales(torch.zeros(1, 16), (1.0,)), torch.full((2, 1), 2.0**-24))
