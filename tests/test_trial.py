"""A trial depends on its params alone; its model is put together from the bank, and trained in full where asked."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from banks import make_bank, mixed_bits, pruned
from conftest import tiny_model
from peft.tuners.lora import LoraLayer

from pipeline import GIB, architecture, checkpoint
from pipeline.bits import Vector
from pipeline.compress import quantize
from pipeline.data.alpaca import Example
from pipeline.device import Compute
from pipeline.results.cells import changed
from pipeline.settings import settings_of
from pipeline.stages import trials
from pipeline.trial import adapters, build, recover, training, trial
from pipeline.trial import context as contexts
from pipeline.trial.assemble import assemble
from pipeline.trial.context import Context, Passes
from pipeline.trial.memory import Peak
from pipeline.trial.recover import Rows
from pipeline.trial.result import MEASURED, Memory, Result
from pipeline.trial.scores import Scores
from pipeline.trial.trial import Phases

CPU = torch.device("cpu")


@pytest.fixture
def context(default):
    model = tiny_model(dtype=torch.bfloat16)
    config = checkpoint.pruned_config(model.config, architecture.shapes(model.config))
    units = architecture.units(config, "block")
    bank = SimpleNamespace(settings=settings_of(quantize.Settings, default.quantize))
    settings = trials.settings(default)
    return Context(config, model.state_dict(), bank, None, units, {}, [], [], settings, Compute(CPU, torch.bfloat16))


def drawn(context):
    state = assemble(context, [16] * len(context.units)).state_dict()
    return {name: weight for name, weight in state.items() if "lora_A" in name}


def test_adapters_of_16_bits_are_drawn_by_the_params_seed_alone(context):
    torch.manual_seed(1)
    first = drawn(context)
    before = torch.get_rng_state()
    second = drawn(context)
    assert torch.equal(torch.get_rng_state(), before)
    assert first and all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert len({float(weight.float().sum()) for weight in first.values()}) == len(first)
    other = replace(context, settings=replace(context.settings, seed=context.settings.seed + 1))
    assert not any(torch.equal(weight, first[name]) for name, weight in drawn(other).items())


# --- the model of a bit vector -----------------------------------------------------------------------------------


def context_of(model, params, folder):
    """What trials share of a model, (config, tensors), whose linears are units of their own."""
    config, state = model
    # the bank's r and alpha / r are not those of the params
    bank = make_bank(folder, config, state, r=4, lora_alpha=12)
    units = architecture.units(config, "linear")
    settings = trials.settings(params)
    return Context(config, state, bank, None, units, {}, [], [], settings, Compute(CPU, torch.bfloat16))


def in_turn(context):
    """4, 8 and 16 bits in turn, and each linear's."""
    widths = mixed_bits(context.config)
    return list(widths.values()), widths


def base_tensors(model):
    """Tensors below the adapters, by the names they have in the pruned model."""
    every = model.get_base_model().state_dict()
    return {name.replace(".base_layer", ""): value for name, value in every.items() if "lora_" not in name}


def dequantized(context, widths):
    """The weights below 16 bits as bitsandbytes gives their codes back."""
    found = {}
    for name, width in widths.items():
        if width != 16:
            found[f"{name}.weight"] = quantize.dequantize(context.bank.codes(name, width), torch.bfloat16)
    return found


@pytest.fixture
def mixed(default, tmp_path):
    """Context of a pruned model, its linears' bits and the model that a trial makes of them."""
    context = context_of(pruned(), changed(default, "recover", dropout=0.3), tmp_path)
    bits, widths = in_turn(context)
    return context, widths, assemble(context, bits)


def test_weights_below_the_adapters_are_the_banks_at_each_linears_bits(mixed):
    context, widths, model = mixed
    expected = context.state | dequantized(context, widths)
    found = base_tensors(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_adapters_add_the_banks_product_at_each_linears_bits(mixed):
    context, widths, model = mixed
    for name, width in widths.items():
        found = model.get_base_model().get_submodule(name).get_delta_weight("default")
        if width == 16:
            assert not found.any()
            continue
        adapter = context.bank.adapter(name, width)
        expected = 12 / 4 * adapter.b @ adapter.a
        assert (found - expected).norm() < 0.01 * expected.norm()  # they are rounded to bf16


def test_every_linear_has_an_adapter_of_the_banks_rank_with_the_params_dropout(mixed):
    context, widths, model = mixed
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert layers.keys() == widths.keys() and len(layers) == 7 * 4
    for layer in layers.values():
        assert (layer.r["default"], layer.scaling["default"]) == (4, 3.0)
        dropout = layer.lora_dropout["default"]
        assert type(dropout) is adapters.ByteDropout and dropout.threshold == 77  # round(256 * 0.3)


def test_space_holds_what_peaks_within_the_budget(default, tmp_path):
    params = changed(default, "search", max_8bit_fraction=1.0)
    context = context_of(pruned(), params, tmp_path)
    context = replace(context, units=architecture.units(context.config, "block"))
    peaks = {bits: context.predict(bits).training for bits in product((4, 8), repeat=4)}
    budget = sorted(peaks.values())[9] / GIB  # ten of sixteen vectors fit
    space = trials._space(params, context, int(budget * GIB))
    assert {bits for bits in peaks if bits in space} == {bits for bits, peak in peaks.items() if peak <= budget * GIB}
    assert sum(bits in space for bits in peaks) == 10


# --- training all that is not quantized --------------------------------------------------------------------------


@pytest.fixture(params=[("llama", True), ("qwen2", False)], ids=["tied", "untied_with_biases"])
def in_full(request, default, tokenizer, tmp_path):
    """Context, bits, the linears' bits and the model of a trial after two steps of full training."""
    family, tied = request.param
    model = tiny_model(family, torch.bfloat16, tie_word_embeddings=tied)
    whole = checkpoint.pruned_config(model.config, architecture.shapes(model.config)), model.state_dict()
    # a rate that moves even a norm's weights, about 1, by more than bf16 rounds away
    context = context_of(
        whole, changed(default, "recover", target="answers", train="full", learning_rate=0.05), tmp_path
    )
    context = replace(context, tokenizer=tokenizer)
    bits, widths = in_turn(context)
    trained = assemble(context, bits)
    rows = [Example(tuple(range(2 + index, 20 + 2 * index)), 5) for index in range(8)]
    recover.run(trained, Rows(rows, rows[:1], tokenizer.pad_token_id), replace(context.settings.recover, steps=2), 0)
    return context, bits, widths, trained


def test_full_training_changes_every_tensor_but_the_quantized_ones(in_full):
    context, _, widths, trained = in_full
    constant = dequantized(context, widths)
    found = base_tensors(trained)
    assert found.keys() == context.state.keys()
    for name, value in found.items():
        if name in constant:
            assert torch.equal(value, constant[name]), name
        else:
            assert not torch.equal(value, context.state[name]), name


def test_checkpoint_of_full_training_holds_what_was_trained(in_full, tmp_path, monkeypatch):
    context, bits, widths, trained = in_full
    folder = tmp_path / "final"

    def reloaded(folder, device=CPU):
        return build.probe(checkpoint.load_final(folder), checkpoint.load_tokenizer(folder))

    monkeypatch.setattr(build, "probe_in_fresh_process", reloaded)  # a process of its own takes ten seconds
    figures = build.verified(context, bits, trained, folder)
    assert figures["reload_difference"] == 0
    logits = build.probe(trained, context.tokenizer)
    assert (reloaded(folder) - logits).norm() < 0.05 * logits.norm()  # int8 also rounds what goes in
    saved, kept = base_tensors(checkpoint.load_final(folder)), base_tensors(trained)
    for name in context.state.keys() - dequantized(context, widths).keys():
        assert torch.equal(saved[name], kept[name]), name


def test_optimizer_on_a_gpu_is_the_papers():
    optimizer = training.adamw([torch.nn.Parameter(torch.ones(2))], 1e-3, torch.device("cuda"))
    assert type(optimizer) is bitsandbytes.optim.PagedAdamW32bit
    assert optimizer.is_paged and optimizer.args.optim_bits == 32
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0)]


# --- results


def measured(**changes):
    """A result as a trial gives it, with as many digits as computed."""
    scores = Scores(
        {"piqa": 0.5}, {"piqa": 0.25}, {"piqa_acc_norm": 0.75}, 0.5, 0.25, -1 / 3, 0.1, 2, {"piqa": [(1.0, -1 / 3)] * 2}
    )
    recovered = recover.Recovered.of((3.5, 3.25), ((20 / 3, 10), (30.0, 12)), {2: 2.5}, 640)
    parts = {
        "vector": Vector(0.2, (4, 4, 8, 4)),
        "scores": scores,
        "recovered": recovered,
        "memory": Memory(2**30, 2**28, "predicted"),
    }
    return Result.of(**parts | {"seconds": {"recover": 1.5}} | changes)


@pytest.mark.parametrize(
    "memory",
    [
        Memory(2**30, 2**28, "predicted"),
        Memory(None, 2**28, "predicted"),
        Memory(3, 2, "predicted", {"run_peak_memory_bytes": 4}),
    ],
)
def test_result_survives_its_json_to_the_last_digit(memory):
    result = measured(memory=memory)
    plain = json.loads(json.dumps(result.as_json()))
    assert list(plain) == MEASURED
    assert Result.from_json(plain) == result
    assert Result.from_json(plain).metrics() == result.metrics()


def test_what_was_measured_item_by_item_is_kept_to_six_digits_and_means_to_all():
    plain = measured().as_json()
    assert plain["by_item"] == {"piqa": [(1.0, -0.333333)] * 2} and plain["by_row"] == [(6.666667, 10), (30.0, 12)]
    assert plain["gold_logprob"] == -1 / 3 and plain["validation_loss"] == (20 / 3 + 30) / 22


def test_model_that_was_not_trained_has_no_peak_of_training():
    result = measured(memory=Memory(None, 500, "predicted"))
    assert result.peak_memory_bytes is None and result.inference_memory_bytes == 500
    assert not {"peak_memory_bytes", "peak_memory_gib"} & result.metrics().keys()
    assert Result.from_json(result.as_json()).peak_memory_bytes is None


def test_what_a_gpu_measured_stands_beside_the_prediction_under_names_of_its_own(context):
    phases, passes, predicted = Phases(context), Passes(8, 4096), Peak(10, 5, "predicted")
    phases.peaks = {"recover": 30, "evaluate": 20}
    inference = {"run_inference_memory_bytes": 20, "run_batch_tokens": 4096}
    training = {"run_peak_memory_bytes": 30, "run_predicted_memory_bytes": 10, "run_micro_batch_size": 8}
    assert phases.of_run(passes, predicted, True) == inference | training
    assert phases.of_run(passes, predicted, False) == inference
    phases.peaks["recover"] = None
    assert phases.of_run(passes, predicted, True) == {}


def test_memory_that_an_earlier_version_measured_is_read_as_it_was():
    earlier = measured().as_json() | {"memory_source": "measured"}
    earlier["other"] = {**earlier["other"], "predicted_peak_memory_bytes": 7.0}
    result = Result.from_json(earlier)
    assert (result.memory_source, result.metrics()["predicted_peak_memory_bytes"]) == ("measured", 7.0)


# --- how full a pass is ------------------------------------------------------------------------------------------


def test_passes_are_the_users_where_there_is_no_gpu(context):
    recovery = context.settings.recover
    assert context.passes([4] * 4, None) == Passes(recovery.micro_batch_size, context.settings.batch_tokens)


def test_passes_are_as_full_as_the_room_on_a_gpu_and_never_above_a_batch(context):
    recovery = replace(context.settings.recover, batch_size=12, micro_batch_size=2)
    settings = replace(context.settings, recover=recovery, batch_tokens=4096)
    context, bits = replace(context, settings=settings), [4, 8, 4, 8]
    peaks = {rows: context.predict_run(bits, Passes(rows, 4096)).training for rows in (12, 6, 3, 2)}
    assert peaks[12] > peaks[6] > peaks[3] > peaks[2] == context.predict(bits).training
    for rows, peak in peaks.items():
        assert context.passes(bits, peak).rows == rows  # just fits
    assert context.passes(bits, peaks[12] - 1).rows == 6
    assert context.passes(bits, 0) == Passes(2, 4096)  # it is left to the allocator whether that fits
    inference = {tokens: context.predict_run(bits, Passes(2, tokens)).inference for tokens in (8192, 32768)}
    assert [context.passes(bits, peak).tokens for peak in inference.values()] == [8192, 32768]
    assert context.passes(bits, 2**40) == Passes(12, 32768)
    roomy = replace(context, settings=replace(settings, batch_tokens=2**17))
    assert roomy.passes(bits, 2**40).tokens == 2**17


def test_untouched_model_is_measured_once_and_again_where_its_file_is_damaged(context, tmp_path, monkeypatch):
    calls = []

    def run(context, bits, work):
        calls.append((bits, work))
        return measured(vector=Vector(0.0, (16,) * 4), memory=Memory(None, 7, "predicted")), None

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(contexts, "untouched", lambda context, base: context)
    kept = tmp_path / "untouched" / "one.json"
    first = trial.untouched_result(context, tmp_path, kept, trial.Work(limit=3))
    assert calls == [((16,) * 4, trial.Work(limit=3, trained=False))]
    assert trial.untouched_result(context, tmp_path, kept) == first and len(calls) == 1
    kept.write_text("{")
    assert trial.untouched_result(context, tmp_path, kept) == first and len(calls) == 2
