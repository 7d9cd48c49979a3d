"""The ways of a GPU compute what the plain path does; here on a CPU, in fp32."""

import banks
import pytest
import torch
from conftest import FAMILIES
from test_recover import PADDING, Killed, adapted, assert_close, examples, gradients, settings, train, until, weights

from pipeline import architecture
from pipeline.data import alpaca
from pipeline.data.alpaca import Example
from pipeline.device import Compute
from pipeline.stages import trials
from pipeline.trial import adapters, fast, fused, graphs, loss, packing, training
from pipeline.trial.assemble import assemble
from pipeline.trial.context import Context
from pipeline.trial.fast import Ways
from pipeline.trial.recover import RecoverError

CPU = torch.device("cpu")
FLAT, PACKED, FUSED = Ways(flat=True), Ways(packed=True), Ways(fused=True)
EACH = pytest.mark.parametrize("ways", [FLAT, PACKED, FUSED, Ways(True, True, True)], ids=["flat", "packed", "fused", "all"])  # fmt: skip  # noqa: E501


@pytest.fixture(autouse=True)
def same_dropout(monkeypatch):
    """Dropout that depends on the size alone, as the ways draw it in another order."""

    def kept(x, threshold):
        generator = torch.Generator().manual_seed(x.shape[-1])
        return torch.randint(256, (x.shape[-1],), generator=generator).expand(x.shape) >= threshold

    monkeypatch.setattr(adapters, "kept", kept)


def byte_dropped(dropout=0.3, **changes):
    model = adapted(dropout=dropout, **changes)
    adapters.use_byte_dropout(model, dropout)
    return model


# --- whole recoveries ----------------------------------------------------------------------------------------------


@EACH
def test_each_way_ends_with_the_plain_paths_parameters(ways):
    chosen = settings(learning_rate=0.01, max_length=32, micro_batch_size=2, validate_every=2)
    ends = []
    for taken in (fast.PLAIN, ways):
        model = byte_dropped()
        before = weights(model)
        result = train(model, examples(24), chosen, 5, ways=taken)
        ends.append((weights(model), result))
        assert max((value - before[name]).abs().max() for name, value in weights(model).items()) > 0.01
    assert_close(ends[1][0], ends[0][0], 2e-4)
    plain, found = ends[0][1], ends[1][1]
    assert found.losses == pytest.approx(plain.losses, abs=1e-4)
    assert found.validation_losses == pytest.approx(plain.validation_losses, abs=1e-4)
    assert found.tokens == plain.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["lora", "full"])
def test_one_vector_ends_with_the_parameters_of_separate_ones(dtype, which):
    ends = []
    for ways in (fast.PLAIN, FLAT):
        model = adapted(dtype=dtype)
        if which == "full":
            adapters.train_in_full(model, set())
        train(model, examples(24), settings(learning_rate=0.01), 3, ways=ways)
        ends.append(weights(model))
        assert all(weight.grad is None for weight in model.parameters())
        assert len({weight.untyped_storage().data_ptr() for weight in ends[-1].values()}) == len(ends[-1])
    assert_close(ends[1], ends[0], 1e-5 if dtype == torch.float32 else 0.02)


@EACH
def test_interrupted_recovery_goes_on_as_if_it_had_not_been(tmp_path, ways):
    chosen = settings(dropout=0.1, save_every=2, validate_every=2)
    straight, again = byte_dropped(), byte_dropped()
    expected = train(straight, examples(12), chosen, 7, ways=ways)
    keep = tmp_path / "one.safetensors"
    with pytest.raises(Killed):
        train(byte_dropped(), examples(12), chosen, 7, keep=keep, progress=until(5), ways=ways)
    assert train(again, examples(12), chosen, 7, keep=keep, ways=ways) == expected
    assert_close(weights(again), weights(straight), 0)


def test_a_loss_that_is_read_later_is_named_by_its_own_step(monkeypatch):
    calls, own = [], training.response_loss

    def breaks(model, part, targets):
        calls.append(part)
        value, count = own(model, part, targets)
        return (value * float("nan") if len(calls) == 3 else value), count

    monkeypatch.setattr(training, "response_loss", breaks)
    with pytest.raises(RecoverError, match="loss is nan at step 2"):
        train(adapted(), examples(), settings(), 6, ways=FLAT)
    assert len(calls) == 6  # nothing was waited for


def test_ways_are_for_a_gpu_that_is_asked_for_them():
    assert fast.chosen(adapted(), True, 32) == fast.PLAIN
    assert fast.packable(torch.bfloat16, None, 256) and fast.packable(torch.bfloat16, 256, 256)
    assert not fast.packable(torch.float32, None, 256) and not fast.packable(torch.bfloat16, 255, 256)


def test_a_model_is_left_as_it_was():
    model = adapted()
    tokens, before = torch.arange(2, 12)[None], model.config._attn_implementation
    expected = model(tokens).logits
    with pytest.raises(InterruptedError), fast.taken(model, Ways(packed=True, fused=True, graphs=True)):
        assert any("forward" in vars(module) for module in model.modules())
        raise InterruptedError
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == before
    assert torch.equal(model(tokens).logits, expected)


# --- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(family, whole):
    model, rows = adapted(family), examples(5)
    value, count = loss.response_loss(model, alpaca.batch(rows, PADDING, whole))
    expected = gradients(model, value)
    with packing.used(model):
        found, same = loss.response_loss(model, packing.pack(rows, PADDING, whole))
        assert (found.item(), same) == (pytest.approx(value.item(), rel=1e-5), count)
        assert_close(gradients(model, found), expected, 1e-4)


def test_packed_rows_meet_a_teachers_targets_in_their_order():
    model, rows = adapted(), examples(5)
    padded, packed = alpaca.batch(rows, PADDING, False), packing.pack(rows, PADDING, False)
    count = int((padded.labels[:, 1:] != alpaca.IGNORED).sum())
    targets = torch.randn(count, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    value, _ = loss.response_loss(model, padded, loss.blended(model, padded, targets, 0.3))
    expected = gradients(model, value)
    with packing.used(model):
        found, same = loss.response_loss(model, packed, loss.blended(model, packed, targets, 0.3))
        assert (found.item(), same) == (pytest.approx(value.item(), rel=1e-5), count)
        assert_close(gradients(model, found), expected, 1e-4)


def test_packed_rows_by_hand():
    rows = [Example((5, 6, 7), 2), Example((8, 9), 1), Example((3, 4), 0)]
    packed = packing.pack(rows, PADDING, False, multiple=8)
    assert packed.tokens.tolist() == [[5, 6, 7, 8, 9, 3, 4, PADDING]]
    assert packed.labels.tolist() == [[-100, -100, 7, -100, 9, -100, 4, -100]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 0]]
    assert packed.starts.tolist() == [0, 3, 5, 7, *[8] * 28] and packed.starts.dtype == torch.int32
    assert (packed.length, packed.longest) == (7, 8)
    plain = packing.pack(rows, PADDING, True)
    assert plain.starts.tolist() == [0, 3, 5, 7, 32] and plain.tokens.shape == (1, 32)
    assert (plain.labels != -100).sum() == 2 + 1 + 1 and plain.longest == 25


def test_rows_are_cut_by_their_own_tokens():
    def sizes(lengths, micro_batch_size):
        rows = [Example(tuple(range(length)), 1) for length in lengths]
        parts = packing.parts(rows, micro_batch_size, 64)
        assert [row for part in parts for row in part] == rows
        return [len(part) for part in parts]

    assert sizes([33] * 8, 4) == [7, 1]  # 256 tokens; padded to 64 they would be 4 and 4
    assert sizes([64] * 5, 4) == [4, 1]
    assert sizes([64], 1) == [1]


def test_mask_within_rows_by_hand():
    mask = packing.within_rows(torch.tensor([0, 2, 5, 5]), 5, torch.float32)[0, 0] == 0
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


# --- fused adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, dropout", [("llama", 0.0), *((family, 0.3) for family in FAMILIES)])
def test_fused_adapters_have_the_loss_and_gradient_of_pefts(family, dropout):
    model, part = byte_dropped(dropout, family=family), alpaca.batch(examples(4), PADDING, False)
    model.train()
    value, _ = loss.response_loss(model, part)
    expected = gradients(model, value)
    with fused.used(model):
        found, _ = loss.response_loss(model, part)
        assert found.item() == pytest.approx(value.item(), rel=1e-5)
        assert_close(gradients(model, found), expected, 2e-4)


def test_fused_adapters_over_bitsandbytes_own_modules(default, tmp_path):
    config, state = banks.pruned()
    bank = banks.make_bank(tmp_path, config, state)
    state = {name: tensor.float() for name, tensor in state.items()}
    units = architecture.units(config, "linear")
    compute = Compute(CPU, torch.float32)
    context = Context(config, state, bank, None, units, {}, [], [], trials.settings(default), compute)
    model = assemble(context, list(banks.mixed_bits(config).values()), real=True).float()
    model.train()
    part = alpaca.batch(examples(3), PADDING, False)
    value, _ = loss.response_loss(model, part)
    expected = gradients(model, value)
    with fused.used(model):
        found, _ = loss.response_loss(model, part)
        assert found.item() == pytest.approx(value.item(), rel=1e-4)
        largest = max(value.abs().max().item() for value in expected.values())
        assert largest > 1e-3
        assert_close(gradients(model, found), expected, 1e-3 * largest)


def test_blocks_whose_bases_are_trained_stay_plain():
    model = adapted()
    adapters.train_in_full(model, {"model.layers.1." + name for name in architecture.linear_names(model.config)})
    with fused.used(model):
        changed = [name.split("layers.")[1] for name, module in model.named_modules() if "forward" in vars(module)]
    attention = [f"1.self_attn.{name}_proj" for name in "qkvo"]
    assert sorted(changed) == sorted([*attention, "1.mlp"])


# --- graphs --------------------------------------------------------------------------------------------------------


def test_blocks_as_graphs_are_captured_once_a_length_and_compute_the_same(monkeypatch):
    captured = []

    def capture(blocks, samples):  # what CUDA would replay, the blocks themselves compute
        captured.append([[tensor.shape for tensor in given] for given in samples])
        assert [given[0].requires_grad for given in samples] == [False] + [True] * (len(blocks) - 1)
        return blocks

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(graphs, "LENGTH", 64)
    chosen = settings(max_length=32, learning_rate=0.01)
    ends = []
    for ways in (PACKED, Ways(packed=True, fused=True, graphs=True)):
        model = byte_dropped()
        result = train(model, examples(24), chosen, 4, ways=ways)
        ends.append((weights(model), result.losses))
    assert_close(ends[1][0], ends[0][0], 2e-4)
    assert ends[1][1] == pytest.approx(ends[0][1], abs=1e-4)
    lengths = [shapes[0][0][1] for shapes in captured]
    assert len(lengths) == len(set(lengths)) >= 1 and all(length % 64 == 0 for length in lengths)
