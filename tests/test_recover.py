import math
import random
import signal
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, tiny_model
from peft import LoraConfig, get_peft_model

from pipeline import architecture
from pipeline.data import alpaca
from pipeline.data.alpaca import IGNORED, Batch, Example
from pipeline.trial import adapters, loss, recover, training
from pipeline.trial.recover import RecoverError, Rows
from pipeline.trial.setting import LOSS_CHUNK

PADDING = 1


def adapted(family="llama", dropout=0.0, seed=0, **changes):
    """A tiny model whose adapters do something: B is not zero."""
    torch.manual_seed(seed)
    model = tiny_model(family, seed=seed, **changes)
    names = architecture.target_modules(model.config)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    torch.manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.05)
    return model.eval()


def examples(count=8, shortest=6, longest=24, seed=0):
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        length = generator.randint(shortest, longest)
        tokens = tuple(generator.randrange(2, VOCABULARY) for _ in range(length))
        found.append(Example(tokens, generator.randint(1, length - 2)))
    return found


def settings(**changes):
    values = {
        "target": "answers", "answers_weight": 0.0, "positions": "response",
        "train": "lora", "steps": 3, "batch_size": 8, "micro_batch_size": 4, "max_length": 64, "learning_rate": 0.001,
        "warmup_steps": 0, "dropout": 0.0, "validate_every": 0, "patience": 0, "save_every": 0,
    }  # fmt: skip
    return recover.Settings(**values | changes)


def train(model, rows, chosen, steps, seed=0, **changes):
    read = Rows(rows, changes.pop("validation", rows[:2]), PADDING)
    return recover.run(model, read, replace(chosen, steps=steps), seed, **changes)


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance), name


@pytest.fixture
def plain_descent(monkeypatch):
    """A step that shows the gradient itself: SGD at rate 1 without clipping."""
    monkeypatch.setattr(training, "adamw", lambda weights, rate, device: torch.optim.SGD(weights, lr=1.0))
    monkeypatch.setattr(training, "_MAX_NORM", 1e9)


BATCHES = {
    "short": alpaca.batch(examples(4), PADDING, False),
    "one_row": alpaca.batch(examples(1), PADDING, False),
    "whole_rows": alpaca.batch(examples(3), PADDING, True),
    "several_chunks": alpaca.batch(examples(8, 80, 120), PADDING, False),
}


def test_a_batch_of_these_tests_needs_several_chunks():
    assert int((BATCHES["several_chunks"].labels[:, 1:] != IGNORED).sum()) > LOSS_CHUNK
    assert int((BATCHES["short"].labels[:, 1:] != IGNORED).sum()) < LOSS_CHUNK


@pytest.mark.parametrize("part", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_response_loss_is_the_models_own(part, family):
    model = adapted(family)
    value, count = loss.response_loss(model, part)
    expected = model(input_ids=part.tokens, labels=part.labels).loss
    assert count == int((part.labels[:, 1:] != IGNORED).sum())
    assert value.item() / count == pytest.approx(expected.item(), abs=1e-5)


def test_response_loss_of_a_model_without_adapters():
    model, part = tiny_model(tie_word_embeddings=False), BATCHES["short"]
    value, count = loss.response_loss(model, part)
    assert value.item() / count == pytest.approx(model(input_ids=part.tokens, labels=part.labels).loss.item(), abs=1e-5)


@pytest.mark.parametrize("part", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_gradient_equals_autograd_through_all_logits(part, family):
    model = adapted(family)
    value, count = loss.response_loss(model, part)
    found = gradients(model, value / count)
    expected = gradients(model, model(input_ids=part.tokens, labels=part.labels).loss)
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    assert_close(found, expected, 1e-5)


def test_padding_changes_nothing():
    model, (one,) = adapted(), examples(1)
    alone = alpaca.batch([one], PADDING, False)
    wide = Batch(
        torch.nn.functional.pad(alone.tokens, (0, 9), value=PADDING),
        torch.nn.functional.pad(alone.labels, (0, 9), value=IGNORED),
    )
    values = [loss.response_loss(model, part) for part in (alone, wide)]
    assert values[0][0].item() == pytest.approx(values[1][0].item(), abs=1e-5)
    assert values[0][1] == values[1][1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(plain_descent, size):
    rows = examples(8)
    steps = []
    for micro in (8, size):
        model = adapted()
        before = weights(model)
        chosen = settings(micro_batch_size=micro, max_length=32)  # as long as any row: no more rows fit
        assert len(training.micro_batches(rows, micro, 32)) == 8 // micro
        result = train(model, rows, chosen, 1)
        steps.append(({name: value - before[name] for name, value in weights(model).items()}, result.losses[0]))
    assert max(value.abs().max() for value in steps[0][0].values()) > 1e-3
    assert_close(steps[1][0], steps[0][0], 1e-5)
    assert steps[1][1] == pytest.approx(steps[0][1], abs=1e-5)


def test_micro_batches_hold_as_many_rows_as_the_tokens_of_full_ones():
    def sizes(lengths, **changes):
        rows = [Example(tuple(range(length)), 1) for length in lengths]
        parts = training.micro_batches(rows, changes.get("micro_batch_size", 4), 64)
        assert [row for part in parts for row in part] == rows
        return [len(part) for part in parts]

    # Room for 4 x 64 tokens; rows are padded to 32, 64, ... as the longest beside them.
    assert sizes([20] * 8) == [8]
    assert sizes([20] * 9) == [8, 1]
    assert sizes([33] * 8) == [4, 4]
    assert sizes([20] * 5 + [64] * 3) == [5, 3]
    assert sizes([20] * 3 + [64] * 3) == [4, 2]
    assert sizes([64], micro_batch_size=1) == [1]


def test_step_is_the_gradient_of_the_mean_token_loss(plain_descent):
    rows, model = examples(8), adapted()
    part = alpaca.batch(rows, PADDING, False)
    wanted = model(input_ids=part.tokens, labels=part.labels).loss
    expected = {name: weights(model)[name] - value for name, value in gradients(model, wanted).items()}
    model.zero_grad()
    assert train(model, rows, settings(), 1).losses == (pytest.approx(wanted.item(), abs=1e-5),)
    assert_close(weights(model), expected, 1e-5)


def test_gradient_is_clipped_to_norm_one(monkeypatch):
    monkeypatch.setattr(training, "adamw", lambda weights, rate, device: torch.optim.SGD(weights, lr=1.0))
    model, rows = adapted(), examples(1)
    part = alpaca.batch(rows, PADDING, False)
    found = gradients(model, model(input_ids=part.tokens, labels=part.labels).loss)
    norm = math.sqrt(sum(value.square().sum().item() for value in found.values()))
    assert norm > 1.2
    model.zero_grad()
    before = weights(model)
    train(model, rows, settings(), 1)
    moved = {name: before[name] - value for name, value in weights(model).items()}
    assert_close(moved, {name: value / norm for name, value in found.items()}, 1e-5)


def test_nan_loss_names_the_step(monkeypatch):
    calls = []
    own = training.response_loss

    def breaks(model, part, targets):
        calls.append(part)
        value, count = own(model, part, targets)
        return (value * math.nan if len(calls) == 5 else value), count

    monkeypatch.setattr(training, "response_loss", breaks)
    with pytest.raises(RecoverError, match=r"loss is nan at step 2; lower recover\.learning_rate \(0\.001\)"):
        train(adapted(), examples(), settings(max_length=32), 6)


class BrokenBackward(torch.autograd.Function):
    """Passes a value through and breaks its gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, outer):
        return outer * math.nan


@pytest.mark.parametrize("validate_every", [0, 1])
def test_nan_gradient_of_the_last_step_is_no_result(monkeypatch, validate_every):
    calls = []
    own = training.response_loss

    def breaks(model, part, targets):
        calls.append(part)
        value, count = own(model, part, targets)
        return (BrokenBackward.apply(value) if len(calls) == 3 else value), count

    monkeypatch.setattr(training, "response_loss", breaks)
    with pytest.raises(RecoverError, match=r"gradient is nan at step 2; lower recover\.learning_rate"):
        train(adapted(), examples(), settings(max_length=32, micro_batch_size=8, validate_every=validate_every), 3)


def test_validation_loss_that_is_nan_is_no_result(monkeypatch):
    monkeypatch.setattr(recover, "row_losses", lambda *arguments: ((math.nan, 3), (1.0, 2)))
    with pytest.raises(RecoverError, match="validation loss is nan at step 3"):
        train(adapted(), examples(), settings(), 3)
    with pytest.raises(RecoverError, match="validation loss is nan at step 0"):
        train(adapted(), examples(), settings(), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_reported_at_the_first_step(value):
    model = adapted()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).fill_(value)
    with pytest.raises(RecoverError, match="at step 0"):
        train(model, examples(), settings(), 3)


def test_loss_falls_on_a_few_rows():
    rows, model = examples(4), adapted()
    result = train(model, rows, settings(batch_size=4, learning_rate=0.01), 60, validation=rows)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert result.validation_loss < 0.3 * result.losses[0]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_loss_falls_for_every_family(family):
    rows, model = examples(2, 12, 16), adapted(family)
    result = train(model, rows, settings(batch_size=2, learning_rate=0.01), 8)
    assert result.losses[-1] < 0.8 * result.losses[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_seeded_runs_are_identical(dropout):
    results = []
    for start in (3, 4):
        model = adapted(dropout=dropout)
        torch.manual_seed(start)  # what came before must not matter
        results.append((train(model, examples(20), settings(), 5, seed=7), weights(model)))
    assert results[0][0] == results[1][0]
    assert_close(results[1][1], results[0][1], 0)


def test_other_seeds_give_other_runs():
    losses = {train(adapted(dropout=0.3), examples(20), settings(), 2, seed=seed).losses for seed in range(3)}
    assert len(losses) == 3


def test_only_the_adapters_change():
    model = adapted()
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    before = weights(model)
    train(model, examples(), settings(), 2)
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    assert not any(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_no_steps_only_measure():
    model, rows = adapted(), examples(6)
    before = weights(model)
    result = train(model, rows, settings(), 0, validation=rows)
    assert_close(weights(model), before, 0)
    assert (result.losses, result.tokens) == ((), 0)
    assert result.validation_rows == loss.row_losses(model, rows, 4, PADDING)


def test_model_is_left_in_evaluation_mode():
    model = adapted(dropout=0.5)
    train(model, examples(), settings(), 1)
    assert not any(module.training for module in model.modules())


def test_tokens_leave_padding_out():
    rows = examples(8)
    assert train(adapted(), rows, settings(), 3).tokens == 3 * sum(len(row.tokens) for row in rows)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_validation_loss_is_the_mean_over_all_response_tokens(size):
    model, rows = adapted(), examples(7)
    part = alpaca.batch(rows, PADDING, False)
    with torch.no_grad():
        expected = model(input_ids=part.tokens, labels=part.labels).loss.item()
    found = loss.row_losses(model, rows, size, PADDING)
    assert loss.mean_loss(found)[0] == pytest.approx(expected, abs=1e-5)
    alone = {loss.row_losses(model, [row], 1, PADDING)[0] for row in rows}
    assert {count for _, count in found} == {count for _, count in alone}
    assert sorted(total for total, _ in found) == pytest.approx(sorted(total for total, _ in alone), abs=1e-4)


def test_error_of_the_validation_loss_is_that_of_a_ratio_over_rows():
    rows = [(20.0, 10), (33.0, 12), (5.0, 3)]
    totals, counts = (torch.tensor([float(one[column]) for one in rows]) for column in (0, 1))
    left = totals - totals.sum() / counts.sum() * counts
    expected = float(left.std(correction=1) * len(rows) ** 0.5 / counts.sum())  # the residuals sum to zero
    assert loss.mean_loss(rows) == (pytest.approx(58 / 25), pytest.approx(expected, rel=1e-4))
    assert loss.mean_loss(rows[:1]) == (2.0, 0)


@pytest.mark.parametrize("rows, size", [(5, 2), (8, 8), (100, 3), (40, 1), (3, 8)])
def test_endless_gives_each_row_once_an_epoch(rows, size):
    every = examples(rows)
    source = recover.endless(every, size, 0)
    for _ in range(3):
        epoch = [next(source) for _ in range(math.ceil(rows / size))]
        assert sorted(row.tokens for part in epoch for row in part) == sorted(row.tokens for row in every)
        assert all(len(part) <= size for part in epoch)


def test_endless_shuffles_each_epoch_anew_and_repeatably():
    every = examples(64)
    sources = [recover.endless(every, 4, seed) for seed in (5, 5, 6)]
    epochs = [[[next(source) for _ in range(16)] for _ in range(2)] for source in sources]
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2]
    assert epochs[0][0] != epochs[0][1]


def test_endless_batches_rows_of_similar_length():
    every = examples(128, 5, 200)
    source = recover.endless(every, 4, 0)
    spread = [max(lengths) - min(lengths) for lengths in ([len(row.tokens) for row in next(source)] for _ in range(32))]
    assert sum(spread) / len(spread) < 30  # four rows at random differ by about 120


@pytest.mark.parametrize("what", ["train", "validation"])
def test_no_rows_is_an_error_instead_of_a_hang(what):
    def stop(*_):
        raise AssertionError("still waiting for rows")

    rows = {"train": examples(4), "validation": examples(2)} | {what: []}
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises((RecoverError, ValueError), match="row"):
            recover.run(adapted(), Rows(**rows, padding=PADDING), settings(steps=1), 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    "warmup, steps, expected",
    [
        (0, 1, [1]),
        (0, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
        (1, 4, [1 / 2, 1, 2 / 3, 1 / 3]),
        (3, 5, [1 / 4, 2 / 4, 3 / 4, 1, 1 / 2]),
        (3, 2, [1 / 4, 2 / 4]),
        (2, 2, [1 / 3, 2 / 3]),
    ],
)
def test_rate_by_hand(warmup, steps, expected):
    assert [training.rate(step, warmup, steps) for step in range(steps)] == pytest.approx(expected)


@pytest.mark.parametrize("warmup, steps", [(0, 3), (2, 3), (7, 3)])
def test_rate_after_the_last_step_is_not_negative(warmup, steps):
    assert training.rate(steps, warmup, steps) >= 0


def test_run_follows_the_schedule(monkeypatch):
    rates = []
    own = training.adamw

    def watched(*arguments):
        optimizer = own(*arguments)
        optimizer.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(training, "adamw", watched)
    train(adapted(), examples(), settings(learning_rate=0.01, warmup_steps=1), 4)
    assert rates == pytest.approx([0.005, 0.01, 0.02 / 3, 0.01 / 3])


def test_optimizer_has_no_weight_decay():
    optimizer = training.adamw([torch.nn.Parameter(torch.ones(2))], 0.1, torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_byte_dropout_zeroes_the_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout, ones = adapters.ByteDropout(p), torch.ones(333, 301)
    threshold = round(p * 256)
    found = dropout.train()(ones)
    assert found.unique().tolist() == pytest.approx([0, 256 / (256 - threshold)])
    deviation = (threshold / 256 * (1 - threshold / 256) / ones.numel()) ** 0.5
    assert float((found == 0).float().mean()) == pytest.approx(threshold / 256, abs=4 * deviation)
    assert float(found.mean()) == pytest.approx(1, abs=4 * deviation * 256 / (256 - threshold))
    assert torch.equal(dropout.eval()(ones), ones)


def test_byte_dropout_scales_gradients_as_values():
    torch.manual_seed(0)
    values = torch.randn(40, 8, requires_grad=True)
    found = adapters.ByteDropout(0.25).train()(values)
    found.sum().backward()
    expected = torch.where(found == 0, 0.0, 4 / 3)
    torch.testing.assert_close(values.grad, expected)


# --- full-parameter fine-tuning ----------------------------------------------------------------------------------


def test_full_training_reaches_all_that_is_not_quantized():
    model = adapted()
    quantized = {"model.layers.0.mlp.down_proj", "model.layers.3.self_attn.q_proj"}
    adapters.train_in_full(model, quantized)
    frozen = {
        adapters.linear_of(name) for name, one in model.get_base_model().named_parameters() if not one.requires_grad
    }
    assert frozen == quantized


@pytest.mark.parametrize("tied", [True, False])
def test_full_gradient_equals_autograd_through_all_logits(tied):
    model = adapted(tie_word_embeddings=tied)
    adapters.train_in_full(model, set())
    part = BATCHES["several_chunks"]
    found = gradients(model, loss.response_loss(model, part)[0])
    logits = model(input_ids=part.tokens).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), part.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    expected = gradients(model, plain)
    assert any("lm_head" in name or "embed_tokens" in name for name in expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-6), name


# --- early stopping ----------------------------------------------------------------------------------------------


def losses_in_turn(monkeypatch, values):
    given = iter(values)
    monkeypatch.setattr(recover, "row_losses", lambda *_: ((next(given), 1),))


def test_stops_after_so_many_losses_that_are_no_lower_and_goes_back_to_the_lowest(monkeypatch):
    whole = settings(validate_every=2, patience=2)
    at_the_lowest = adapted(seed=1)
    losses_in_turn(monkeypatch, [3.0, 2.0, 2.5, 2.0])
    model = adapted(seed=1)
    found = train(model, examples(16), whole, 20)
    assert found.validation_losses == {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0}
    assert found.validation_loss == 2.0
    assert len(found.losses) == 8
    losses_in_turn(monkeypatch, [3.0, 2.0])
    state = training.Training(at_the_lowest, replace(whole, steps=20))
    rows = recover.endless(examples(16), 8, 0)
    torch.manual_seed(0)
    at_the_lowest.train()
    for _ in range(4):
        parts = training.micro_batches(next(rows), whole.micro_batch_size, whole.max_length)
        state.take_step([alpaca.batch(part, PADDING, False) for part in parts])
    assert_close(weights(model), weights(at_the_lowest), 0)


def test_last_step_is_judged_too(monkeypatch):
    losses_in_turn(monkeypatch, [3.0, 2.0])
    assert train(adapted(), examples(), settings(validate_every=3), 5).validation_losses == {3: 3.0, 5: 2.0}


def test_without_patience_it_trains_to_the_end(monkeypatch):
    losses_in_turn(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    found = train(adapted(), examples(), settings(validate_every=1), 4)
    assert len(found.losses) == 4
    assert found.validation_loss == 1.0


# --- interrupted and taken up again ------------------------------------------------------------------------------


class Killed(Exception):
    pass


def until(last):
    def steps(items):
        for item in items:
            if item == last:
                raise Killed
            yield item

    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["lora", "full"])
def test_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, dtype, which):
    chosen = settings(dropout=0.1, save_every=2, validate_every=2)

    def fresh():
        model = adapted(dropout=0.1, dtype=dtype)
        if which == "full":
            adapters.train_in_full(model, set())
        return model

    straight = fresh()
    expected = train(straight, examples(12), chosen, 7)
    keep = tmp_path / "state" / "one.safetensors"
    with pytest.raises(Killed):
        train(fresh(), examples(12), chosen, 7, keep=keep, progress=until(5))
    assert keep.exists()
    again = fresh()
    asked = []
    found = train(
        again, examples(12), chosen, 7, keep=keep, progress=lambda steps: asked.append(list(steps)) or asked[0]
    )
    assert asked == [[4, 5, 6]]
    assert found == expected
    assert_close(weights(again), weights(straight), 0)
    assert list(keep.parent.iterdir()) == []


def test_nothing_is_kept_unless_asked_for(tmp_path):
    with pytest.raises(Killed):
        train(adapted(), examples(), settings(), 3, keep=tmp_path / "one.safetensors", progress=until(2))
    assert list(tmp_path.iterdir()) == []
