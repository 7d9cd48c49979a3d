"""The layer bank with codes and adapters that heed what the linears receive."""

import banks
import pytest
import torch
from conftest import batches, tiny_model

from pipeline.compress import bank_writer, codes, layer_bank, linear_grams, lowrank, quantize
from pipeline.compress.bank_writer import BankError, Inputs

HEEDING = {"method": "calibrated", "init": "weighted"}


@pytest.fixture(scope="module")
def calibration():
    return batches(40, seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def grams(model, calibration):
    return list(linear_grams.collect(tiny_model(), calibration))


def written(folder, model, grams, tokens=10**6, **changes):
    folder.mkdir(exist_ok=True)
    groups = layer_bank.groups_of(model.config)
    chosen = banks.settings(**changes)
    unheeded = bank_writer.write(model.state_dict(), groups, chosen, 0, folder, grams=map(dict, grams), tokens=tokens)
    return layer_bank.Bank(folder), unheeded


def seen(model, bank, grams, bits, adapters=True):
    """Sum over linears of the squared error of their outputs, adapters included."""
    total = 0.0
    for block in grams:
        for name, gram in block.items():
            error = model.get_submodule(name).weight.float() - quantize.dequantize(
                bank.codes(name, bits), torch.float32
            )
            if adapters:
                adapter = bank.adapter(name, bits)
                error = error - bank.scale * adapter.b @ adapter.a
            total += float(((error @ gram) * error).sum())
    return total


def test_groups_are_the_linears_with_the_same_inputs(model):
    groups = layer_bank.groups_of(model.config)
    assert [len(group) for group in groups[:4]] == [3, 1, 2, 1]
    assert [name for group in groups for name in group] == layer_bank.names_of(model.config)


def test_bank_holds_calibrated_codes_at_4_bits_and_the_nearest_at_8(tmp_path, model, grams):
    bank, unheeded = written(tmp_path, model, grams, **HEEDING)
    assert unheeded == 0
    for block in grams:
        for name, gram in block.items():
            weight = model.get_submodule(name).weight.detach()
            plain = quantize.quantize(weight, 8, bank.settings)
            assert all(torch.equal(bank.codes(name, 8)[key], plain[key]) for key in plain)
            alone = codes.calibrated([weight], gram, 4)[0]
            values = [quantize.dequantize(each, torch.float32) for each in (bank.codes(name, 4), alone)]
            assert (values[0] != values[1]).float().mean() < 0.02  # products of other shapes round otherwise


def test_calibrated_and_weighted_each_lower_what_the_outputs_lose(tmp_path, model, grams):
    losses = {}
    for name, changes in {
        "plain": {},
        "codes": {"method": "calibrated"},
        "start": {"init": "weighted"},
        "both": HEEDING,
    }.items():
        bank, _ = written(tmp_path / name, model, grams, **changes)
        losses[name] = seen(model, bank, grams, 4)
    assert losses["both"] < min(losses["codes"], losses["start"])
    assert max(losses["codes"], losses["start"]) < losses["plain"]


def test_weighted_start_is_the_closed_form_for_the_banks_own_codes(tmp_path, model, grams):
    bank, _ = written(tmp_path, model, grams, **HEEDING)
    name, gram = next(iter(grams[1].items()))
    error = model.get_submodule(name).weight.float() - quantize.dequantize(bank.codes(name, 4), torch.float32)
    best = lowrank.weighted(error, lowrank.root(gram), bank.settings.r, bank.scale)
    found = bank.adapter(name, 4)
    root = lowrank.root(gram).float()
    left = [float(((error - bank.scale * each.b @ each.a) @ root).norm()) for each in (found, best)]
    assert left[0] == pytest.approx(left[1], rel=1e-3)


@pytest.mark.parametrize("init", ["weighted", "loftq"])
def test_more_iterations_never_see_more_error(model, grams, init):
    name, gram = next(iter(grams[0].items()))
    weight, root = model.get_submodule(name).weight.detach(), lowrank.root(gram).float()
    left = []
    for iterations in (1, 3):
        chosen = banks.settings(method="calibrated", init=init, iterations=iterations)
        ((stored, adapter),) = bank_writer.initialize([weight], 4, chosen, Inputs(gram))
        error = weight.float() - quantize.dequantize(stored, torch.float32) - chosen.scale * adapter.b @ adapter.a
        left.append(float((error if init == "loftq" else error @ root).norm()))
    assert left[1] <= left[0] * 1.001


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_other_starts_take_calibrated_codes_too(model, grams, init):
    name, gram = next(iter(grams[0].items()))
    weight = model.get_submodule(name).weight.detach()
    lost = []
    for method in ("nearest", "calibrated"):
        torch.manual_seed(0)
        chosen = banks.settings(method=method, init=init)
        ((stored, adapter),) = bank_writer.initialize([weight], 4, chosen, Inputs(gram))
        error = weight.float() - quantize.dequantize(stored, torch.float32) - chosen.scale * adapter.b @ adapter.a
        lost.append(float(((error @ gram) * error).sum()))
    assert lost[1] < 0.9 * lost[0]


def test_too_little_text_rounds_to_the_nearest_and_says_how_much_would_do(tmp_path, model, grams, capsys):
    widths = [
        len(block[group[0]]) for block in grams for group in layer_bank.groups_of(model.config) if group[0] in block
    ]
    narrow, wide = min(widths), max(widths)
    assert narrow < wide
    bank, unheeded = written(tmp_path, model, grams, tokens=linear_grams.tokens_needed(narrow), **HEEDING)
    few = [name for block in grams for name, gram in block.items() if len(gram) > narrow]
    assert unheeded == len(few) > 0
    said = capsys.readouterr().out
    assert f"{len(few)} linears are rounded to the nearest" in said
    assert f"{linear_grams.tokens_needed(wide)} would do" in said
    for name in few:
        plain = quantize.quantize(model.get_submodule(name).weight.detach(), 4, bank.settings)
        assert all(torch.equal(bank.codes(name, 4)[key], plain[key]) for key in plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_stop_with_the_layers_name(tmp_path, model, grams, value):
    broken = [dict(block) for block in grams]
    name = "model.layers.2.mlp.down_proj"
    broken[2][name] = broken[2][name].clone()
    broken[2][name][0, 0] = value
    with pytest.raises(BankError, match=rf"{name}: what this layer receives is not finite"):
        written(tmp_path, model, broken, **HEEDING)
    assert not list(tmp_path.iterdir())


def test_nearest_codes_with_a_plain_start_read_no_inputs(tmp_path, model):
    bank, unheeded = written(tmp_path, model, [])
    assert unheeded == 0
    assert not bank.settings.reads_inputs
