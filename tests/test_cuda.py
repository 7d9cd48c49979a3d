"""What a GPU computes: the same as the CPU. Left out where there is none."""

import gc
from dataclasses import replace

import banks
import pytest
import torch
from conftest import ROOT, batches, tiny_model
from lm_eval.models.huggingface import HFLM

from pipeline import architecture, checkpoint, storage
from pipeline.compress import bank_writer, grams, importance, layer_bank, prune, quantize, saliency
from pipeline.data import alpaca, tasks
from pipeline.device import Compute
from pipeline.params import TASKS
from pipeline.settings import pruning
from pipeline.stages import recorder, trials
from pipeline.trial import build, evaluate, memory, packing, recover, training, trial
from pipeline.trial.assemble import assemble
from pipeline.trial.context import Context
from pipeline.trial.fast import Ways
from pipeline.trial.recover import Rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def on(device, count=3):
    return [part.to(device) for part in batches(count)]


def both(work):
    """What some work on (model, batches) gives on either device."""
    return tuple(work(tiny_model().to(device), on(device)) for device in (CPU, CUDA))


def assert_close(found, expected, rtol=1e-3):
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-3 * float(expected.abs().max()))


# --- pruning, importance, the bank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["taylor1", "taylor2", "taylor_mix", "magnitude", "activation", "fisher_mask"])
def test_scores_equal_the_cpus(default, kind):
    settings = replace(pruning(default.prune), importance=kind)
    for one, other in zip(*both(lambda model, parts: saliency.importance(model, parts, settings)), strict=True):
        for name in one:
            assert_close(other[name], one[name])


def test_gram_matrices_are_those_of_the_cpu_in_however_many_lots(monkeypatch):
    monkeypatch.setattr(grams, "_BLOCKS_AT_ONCE", 3)  # of four blocks
    for one, other in zip(*both(grams.input_grams), strict=True):
        assert set(one) == set(other)
        for name in one:
            assert_close(other[name], one[name])


@pytest.mark.parametrize("steps", [1, 2])
def test_surgeon_prunes_and_refits_as_on_the_cpu(default, steps):
    changes = {"importance": "surgeon", "compensate": True, "ratio": 0.2, "steps": steps, "scope": "global"}
    settings = replace(pruning(default.prune), **changes)
    one, other = both(lambda model, parts: prune.run(model, parts, settings, 0))
    assert one.config.block_shapes == other.config.block_shapes
    for first, second in zip(one.kept, other.kept, strict=True):
        assert all(torch.equal(first[kind], second[kind]) for kind in first)
    for name, weight in one.state.items():
        assert_close(other.state[name], weight, rtol=1e-2)


def test_importance_equals_the_cpus(default):
    settings = importance.Settings(clusters=4, outcomes=4)
    units = architecture.units(tiny_model().config, "group")
    one, other = both(
        lambda model, parts: importance.run(
            model, parts, units, settings, banks.codes_of(tiny_model(), banks.settings()), 0
        )
    )
    assert other.divergence == pytest.approx(one.divergence, abs=1e-4)
    assert other.sensitivity == pytest.approx(one.sensitivity, abs=1e-4)
    assert other.mutual_information == pytest.approx(one.mutual_information, abs=0.05)


@pytest.mark.parametrize("four_bit", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_cpus(four_bit, double_quant, bits):
    settings = banks.settings(four_bit=four_bit, double_quant=double_quant)
    torch.manual_seed(0)
    weight = torch.randn(128, 192).to(torch.bfloat16)
    one, other = (quantize.quantize(weight.to(device), bits, settings) for device in (CPU, CUDA))
    assert set(one) == set(other)
    values = [quantize.dequantize(stored, torch.float32).cpu() for stored in (one, other)]
    if settings.four_bit == "nf4" or bits == 8:  # FP4 rounds otherwise there
        same = (one["weight"] == other["weight"].cpu()).float().mean().item()
        assert same > 0.999  # a value in the middle between two codes may go either way
        assert (values[0] - values[1]).square().mean() < 1e-4 * weight.float().square().mean()
    errors = [(value - weight.float()).square().mean() for value in values]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    moved = {name: value.cpu() for name, value in other.items()}
    torch.testing.assert_close(quantize.dequantize(moved, torch.float32), values[1], rtol=1e-2, atol=1e-3)


def test_bank_made_on_a_gpu_initializes_as_well(tmp_path):
    config, state = banks.pruned()
    errors = []
    for device in (CPU, CUDA):
        folder = tmp_path / device.type
        folder.mkdir()
        bank_writer.write(state, layer_bank.groups_of(config), banks.settings(), 0, folder, device)
        bank = layer_bank.Bank(folder)
        total = 0.0
        for name in layer_bank.names_of(config):
            adapter = bank.adapter(name, 4)
            made = quantize.dequantize(bank.codes(name, 4), torch.float32) + bank.scale * adapter.b @ adapter.a
            total += float((state[f"{name}.weight"].float() - made).square().sum())
        errors.append(total)
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


# --- trials --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return tasks.load(TASKS, ROOT / "data/sample/benchmarks")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loglikelihoods_equal_lm_evals_own_model(tokenizer, loaded, attention):
    model = tiny_model().to(CUDA)
    model.set_attn_implementation(attention)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, device="cuda")
    for task in loaded.values():
        task._instances = None
        task.build_all_requests(limit=6, rank=0, world_size=1)
        expected = lm.loglikelihood(task.instances, disable_tqdm=True)
        found = evaluate.SharedPrefixLM(model, tokenizer, 512).loglikelihood(task.instances)
        for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
            assert value == pytest.approx(wanted, abs=1e-3)
            assert greedy == wanted_greedy


@pytest.fixture
def context(default, tokenizer, loaded, tmp_path):
    model = tiny_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=704, head_dim=32, num_attention_heads=8)
    config = checkpoint.pruned_config(model.config, architecture.shapes(model.config))
    folder = tmp_path / "bank"
    folder.mkdir()
    bank = banks.make_bank(folder, config, model.state_dict())
    recovery = default.recover.model_copy(update={"steps": 3, "max_length": 128, "save_every": 2})
    scored = default.evaluate.model_copy(update={"limit": 4})
    settings = trials.settings(default.model_copy(update={"recover": recovery, "evaluate": scored}))
    train, held_out = alpaca.split(alpaca.read(ROOT / "data/sample/alpaca.jsonl"), 8, 0)
    rows = [alpaca.encode(part, tokenizer, 128) for part in (train, held_out)]
    units = architecture.units(config, "group")
    compute = Compute(CUDA, torch.bfloat16)
    return Context(config, model.state_dict(), bank, tokenizer, units, loaded, *rows, settings, compute)


def mixed(context):
    return [(4, 8)[index % 2] for index in range(len(context.units))]


def recovering(context, **changes):
    """The context with another recovery."""
    return replace(context, settings=replace(context.settings, recover=replace(context.settings.recover, **changes)))


@pytest.mark.parametrize("fast", [False, True])
def test_trial_is_judged_by_the_prediction_and_keeps_what_it_measured_beside_it(context, fast):
    context = recovering(context, fast=fast)
    trial.run(context, mixed(context))  # cuBLAS takes its workspaces
    gc.collect()
    held = torch.cuda.memory_allocated()
    result, _ = trial.run(context, mixed(context))
    assert result.memory_source == "predicted"
    assert result.peak_memory_bytes == context.predict(mixed(context)).training
    found = result.metrics()
    assert found["run_micro_batch_size"] == context.settings.recover.batch_size  # a GPU has room for a tiny model
    predicted = found["run_predicted_memory_bytes"]
    assert predicted > result.peak_memory_bytes
    assert 0.5 * predicted < found["run_peak_memory_bytes"] - held < 1.02 * predicted  # rows may be shorter
    assert len(result.losses) == 3 and result.losses[-1] < 10
    again, _ = trial.run(context, mixed(context))
    assert again.gold_logprob == pytest.approx(result.gold_logprob, abs=0.02)


def test_study_on_a_gpu_is_not_that_on_a_cpu(default, tmp_path, monkeypatch):
    for name in ("PRUNED", "BANK"):
        (tmp_path / name).mkdir()
        (tmp_path / name / storage.CHECKSUMS).write_text("{}")
    monkeypatch.setattr(recorder.tracking, "md5", str)
    names = {
        recorder.study_identity(default.model_copy(update={"device": device}), tmp_path / "PRUNED", tmp_path / "BANK")
        for device in ("cpu", "cuda", "auto")
    }
    assert len(names) == 2


def test_real_modules_compute_what_the_simulation_does(context):
    bits = [4] * len(context.units)
    real = assemble(context, bits).eval()
    simulated = assemble(replace(context, compute=Compute(CPU, torch.bfloat16)), bits).eval()
    tokens = batches(1)[0].tokens
    with torch.no_grad():
        found, wanted = real(input_ids=tokens.to(CUDA)).logits.float().cpu(), simulated(input_ids=tokens).logits.float()
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_interrupted_recovery_ends_as_an_uninterrupted_one(context, tmp_path):
    settings, ends = replace(context.settings.recover, steps=4), []
    rows = Rows(context.train, context.validation, 1)
    bits = mixed(context)

    def recovered(keep, stop_at=None):
        model = assemble(context, bits)

        def stopping(steps):
            for step in steps:
                if step == stop_at:
                    raise InterruptedError
                yield step

        found = recover.run(model, rows, settings, 0, stopping, keep)
        ends.append((found.losses, found.validation_loss))

    recovered(None)
    keep = tmp_path / "state.safetensors"
    with pytest.raises(InterruptedError):
        recovered(keep, stop_at=2)
    assert keep.exists()
    recovered(keep)
    assert ends[1][0] == pytest.approx(ends[0][0], abs=2e-3)
    assert ends[1][1] == pytest.approx(ends[0][1], abs=2e-3)


@pytest.mark.parametrize(
    "ways",
    [Ways(flat=True), Ways(packed=True), Ways(fused=True), Ways(True, True, True), Ways(True, True, True, True)],
    ids=["flat", "packed", "fused", "all", "graphs"],
)
def test_ways_of_a_gpu_learn_as_the_plain_path_does(context, ways):
    context, found = recovering(context, dropout=0.0, steps=4, save_every=0), []
    rows = Rows(context.train, context.validation, 1)
    for taken in (Ways(), ways):
        model = assemble(context, mixed(context))
        found.append(recover.run(model, rows, context.settings.recover, 0, ways=taken))
    assert found[1].losses == pytest.approx(found[0].losses, abs=0.03)
    assert found[1].validation_loss == pytest.approx(found[0].validation_loss, abs=0.03)
    assert found[0].losses[-1] < found[0].losses[0]


def test_attention_within_packed_rows_is_that_of_the_mask():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 32, dtype=torch.bfloat16, device=CUDA) for heads in (4, 2, 2))
    starts = torch.tensor([0, 7, 30, 40], dtype=torch.int32)
    found, _ = packing.attend(None, query, key, value, None, None, starts.to(CUDA), 23)
    inputs = (states.cpu().float() for states in (query, key, value))
    expected, _ = packing.attend(None, *inputs, None, None, starts, 23)
    torch.testing.assert_close(found.cpu().float(), expected, rtol=0.02, atol=0.02)


def test_optimizer_is_the_papers(context):
    weight = torch.nn.Parameter(torch.ones(400, 400, device=CUDA))
    made = training.adamw([weight], 1e-3, CUDA)
    weight.grad = torch.zeros_like(weight)
    weight.grad[0] = 1
    made.step()
    moved = weight.detach() - 1
    assert moved[0].tolist() == pytest.approx([-1e-3] * 400, rel=1e-3)
    assert not moved[1:].any()  # no weight decay
    state = made.state[weight]
    assert all(state[name].dtype == torch.float32 and state[name].is_paged for name in ("state1", "state2"))


def test_built_checkpoint_loads_on_either_device(context, tmp_path):
    _, model = trial.run(context, mixed(context))
    with storage.writing(tmp_path / "final") as folder:
        figures = build.verified(context, mixed(context), model, folder)
    assert figures["reload_difference"] == 0 and figures["trial_difference"] < 0.5
    tokens = batches(1)[0].tokens
    with torch.no_grad():
        found = [
            checkpoint.load_final(tmp_path / "final", device)(input_ids=tokens.to(device)).logits.float().cpu()
            for device in (CPU, CUDA)
        ]
    assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()  # 8 bits round activations, each device its own way


def test_evaluation_leaves_no_memory_behind(context):
    model = assemble(context, mixed(context)).eval()
    _, peak = memory.measured(
        lambda: evaluate.run(model, context.tokenizer, context.tasks, 4, context.settings.batch_tokens), CUDA
    )
    assert torch.cuda.memory_allocated() < peak
