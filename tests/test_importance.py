import math
from statistics import fmean

import banks
import numpy as np
import pytest
import torch
from conftest import batches, tiny_model
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import mutual_info_score
from torch.nn import functional as F

from pipeline import architecture
from pipeline.compress import importance
from pipeline.compress.quantize import dequantize, quantize
from pipeline.data.alpaca import IGNORED


def settings(**changes):
    return importance.Settings(**{"clusters": 8, "outcomes": 8} | changes)


def pairs(table):
    """The samples that a table of counts stands for."""
    found = [(x, y) for x, row in enumerate(table) for y, count in enumerate(row) for _ in range(count)]
    return np.array(found).T


def entropy(counts):
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


@pytest.mark.parametrize(
    "table, expected",
    [
        # sum of p log(p / (p_x p_y)), less (cells - rows - columns + 1) / 2N
        (
            [[30, 10], [10, 50]],
            0.3 * math.log(0.3 / 0.16) + 0.2 * math.log(0.1 / 0.24) + 0.5 * math.log(0.5 / 0.36) - 1 / 200,
        ),
        ([[50, 0], [0, 50]], math.log(2) + 1 / 200),
        ([[40, 0], [10, 50]], 0.4 * math.log(2) + 0.1 * math.log(1 / 3) + 0.5 * math.log(5 / 3)),
        ([[25, 25], [25, 25]], 0),
        ([[10, 20], [20, 40]], 0),
        ([[7, 3]], 0),
        ([[7]], 0),
    ],
)
def test_mutual_information_by_hand(table, expected):
    assert importance.discrete_mutual_information(*pairs(table)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("counts", [(5, 5), (10, 20, 30, 40), (1, 1, 98)])
def test_information_about_itself_is_the_corrected_entropy(counts):
    x = np.repeat(np.arange(len(counts)), counts)
    expected = entropy(counts) + (len(counts) - 1) / (2 * sum(counts))
    assert importance.discrete_mutual_information(x, x) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_mutual_information_is_sklearns_less_the_correction(seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 6, 500)
    y = (x + generator.integers(0, 3, 500)) % 5
    cells, rows, columns = (len({*found}) for found in (zip(x, y, strict=True), x, y))
    expected = mutual_info_score(x, y) - (cells - rows - columns + 1) / 1000
    assert importance.discrete_mutual_information(x, y) == pytest.approx(expected)
    assert importance.discrete_mutual_information(y, x) == pytest.approx(expected)


def test_names_of_codes_do_not_matter():
    x, y = pairs([[30, 10], [10, 50]])
    found = importance.discrete_mutual_information(np.array([900, -5])[x], np.array([7, 3])[y])
    assert found == pytest.approx(importance.discrete_mutual_information(x, y))


def test_correction_reduces_the_bias_on_independent_samples():
    corrected, plug_in = [], []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        x, y = generator.integers(0, 10, 600), generator.integers(0, 10, 600)
        corrected.append(importance.discrete_mutual_information(x, y))
        plug_in.append(mutual_info_score(x, y))
    assert fmean(plug_in) > 0.05
    assert 0 <= fmean(corrected) < 0.2 * fmean(plug_in)


def test_estimate_finds_the_truth_of_a_known_distribution():
    joint = np.array([[0.3, 0.05, 0.05], [0.1, 0.2, 0.1], [0.05, 0.05, 0.1]])
    truth = float((joint * np.log(joint / np.outer(joint.sum(1), joint.sum(0)))).sum())
    estimates = []
    for seed in range(20):
        cells = np.random.default_rng(seed).choice(9, 2000, p=joint.ravel())
        estimates.append(importance.discrete_mutual_information(cells // 3, cells % 3))
    assert fmean(estimates) == pytest.approx(truth, abs=0.005)


@pytest.mark.parametrize(
    "values, count, expected",
    [
        ([5, 5, 5, 9, 9, 7], 3, [1, 1, 1, 2, 2, 0]),
        ([5, 5, 5, 9, 9, 7], 2, [1, 1, 1, 0, 0, 0]),
        ([5, 5, 5, 9, 9, 7], 10, [1, 1, 1, 2, 2, 3]),
        ([9, 5, 9, 5], 2, [0, 1, 0, 1]),  # of equally frequent values the smaller one
        ([3], 2, [1]),
    ],
)
def test_common_outcomes_by_hand(values, count, expected):
    assert importance.common_outcomes(np.array(values), count).tolist() == expected


def simulate(model, names, bits, chosen):
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.copy_(dequantize(quantize(weight, bits, chosen), weight.dtype))


def sensitivity(model, calibration, units, chosen, dense=None):
    """What the stage measures; ``dense``: the model before pruning."""
    bank, pruned = banks.codes_of(model, chosen), importance.predictions(model, calibration)
    before = pruned if dense is None else importance.predictions(dense, calibration)
    return importance.sensitivity(model, calibration, units, bank, pruned, before)


def divergence(model, other, calibration):
    """Mean over labelled tokens of KL(other || model), over all logits."""
    total = count = 0
    with torch.no_grad():
        for part in calibration:
            log_p, log_q = (
                one(input_ids=part.tokens).logits[:, :-1].double().log_softmax(-1) for one in (other, model)
            )
            chosen = part.labels[:, 1:] != IGNORED
            total += (log_p.exp() * (log_p - log_q)).sum(-1)[chosen].sum().item()
            count += int(chosen.sum())
    return total / count


@pytest.mark.parametrize(
    "granularity, family, four_bit",
    [
        ("block", "llama", "nf4"),
        ("group", "llama", "fp4"),
        ("linear", "llama", "nf4"),
        ("block", "qwen2", "fp4"),
        ("group", "qwen3", "nf4"),
    ],
)
def test_sensitivity_is_the_slope_of_the_divergence_from_4_towards_8_bits(granularity, family, four_bit):
    chosen, calibration = banks.settings(four_bit=four_bit), batches(2)
    model = tiny_model(family)
    units = architecture.units(model.config, granularity)
    by_width, (base, _) = sensitivity(model, calibration, units, chosen)

    every = list(architecture.linears(model.config))
    dense, four, eight = (tiny_model(family) for _ in range(3))
    simulate(four, every, 4, chosen)
    simulate(eight, every, 8, chosen)
    assert base == pytest.approx(divergence(four, dense, calibration), rel=1e-3, abs=1e-6)
    for width, other in ((8, eight), (16, dense)):
        gains = by_width[width]
        assert len(gains) == len(units) and max(gains) > 1e-4
        for unit, gain in zip(units, gains, strict=True):
            assert gain == pytest.approx(slope(family, four, other, dense, unit, calibration), rel=1e-2, abs=1e-6)


def slope(family, four, other, dense, unit, calibration):
    """How the divergence falls where a unit's weights go from those at 4 bits towards others."""
    at = []
    for step in (-0.02, 0.02):
        between = tiny_model(family).double()
        between.load_state_dict(four.state_dict())
        with torch.no_grad():
            for name in unit.linears:
                weight = between.get_submodule(name).weight
                weight += step * (other.get_submodule(name).weight - weight)
        at.append(divergence(between, dense.double(), calibration))
    return (at[0] - at[1]) / 0.04


def test_distance_is_the_divergence_from_the_model_before_pruning():
    calibration, model = batches(2), tiny_model()
    before = tiny_model(seed=4)
    before.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight)  # pruning leaves the head, too
    units = architecture.units(model.config, "block")
    _, (divergence_, distance) = sensitivity(model, calibration, units, banks.settings(), before)
    assert divergence_ == pytest.approx(divergence(model, tiny_model(), calibration), rel=1e-3)
    assert distance == pytest.approx(divergence(model, before, calibration), rel=1e-3)


def test_sensitivity_of_units_adds_up_to_the_same_for_any_granularity():
    found = [
        sensitivity(tiny_model(), batches(2), architecture.units(tiny_model().config, each), banks.settings())
        for each in architecture.GRANULARITIES
    ]
    totals = [sum(gains[8]) for gains, _ in found]
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-3)


def test_sensitivity_leaves_every_linear_at_4_bits():
    model, chosen = tiny_model(), banks.settings()
    sensitivity(model, batches(1), architecture.units(model.config, "group"), chosen)
    four = tiny_model()
    simulate(four, architecture.linears(four.config), 4, chosen)
    expected = four.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


def test_sensitivity_counts_labelled_tokens_only():
    (part,) = batches(1, rows=3)
    part.labels[0, :7] = IGNORED
    model, chosen = tiny_model(), banks.settings()
    _, (base, _) = sensitivity(model, [part], architecture.units(model.config, "block"), chosen)
    assert base == pytest.approx(divergence(model, tiny_model(), [part]), rel=1e-3)  # the model is left at 4 bits


def test_mutual_information_is_that_of_each_blocks_output():
    model, calibration, chosen = tiny_model(), batches(6, rows=4, length=16), settings()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.1, 3)  # trained models' are far from one
    found = importance.mutual_information(model, calibration, chosen, seed=3)

    outputs = [[] for _ in architecture.blocks(model)]
    for block, layer in enumerate(architecture.blocks(model)):
        layer.register_forward_hook(lambda module, inputs, output, block=block: outputs[block].append(output))
    predictions = []
    for part in calibration:
        with torch.no_grad():
            predictions.append(model(part.tokens).logits[part.labels != IGNORED].argmax(-1))
    outcome = importance.common_outcomes(torch.cat(predictions).numpy(), 8)
    for block, value in enumerate(found):
        points = torch.cat([each[part.labels != IGNORED]
                            for each, part in zip(outputs[block], calibration, strict=True)])  # fmt: skip
        kmeans = MiniBatchKMeans(8, random_state=3, n_init=1, batch_size=2048)
        codes = kmeans.fit_predict(F.normalize(points, dim=1).numpy())
        expected = importance.discrete_mutual_information(codes, outcome)
        assert value == pytest.approx(expected, abs=1e-6), f"block {block}"


@pytest.mark.parametrize("granularity", architecture.GRANULARITIES)
def test_run_gives_each_unit_its_blocks_information(granularity):
    calibration = batches(3)
    model = tiny_model()
    units = architecture.units(model.config, granularity)
    found = importance.run(model, calibration, units, settings(), banks.codes_of(model, banks.settings()), 1)
    by_block = importance.mutual_information(tiny_model(), calibration, settings(), 1)
    assert found.units == tuple(unit.name for unit in units)
    assert found.mutual_information == tuple(by_block[unit.block] for unit in units)
    assert len(found.sensitivity) == len(units)
    assert found.tokens == 3 * 2 * 11
    assert found.divergence == pytest.approx(divergence(model, tiny_model(), calibration), rel=1e-3)


def test_run_is_repeatable():
    first, second = [
        importance.run(
            model,
            batches(3),
            architecture.units(model.config, "block"),
            settings(),
            banks.codes_of(model, banks.settings()),
            1,
        )
        for model in (tiny_model(), tiny_model())
    ]
    assert first == second
