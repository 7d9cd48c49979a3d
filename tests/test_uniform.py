"""One shape for all blocks: the cheapest one that meets the ratio, with each block's own best structures."""

import dataclasses
import itertools

import pytest
import torch
import transformers
from conftest import FAMILIES, batches, mask, tiny_config, tiny_model
from safetensors.torch import save_file

from pipeline import architecture, checkpoint
from pipeline.architecture import KINDS, BlockShape
from pipeline.compress import prune, structures, uniform
from pipeline.compress.structures import PruneError, Span
from pipeline.settings import pruning

IMPORTANCES = ("taylor1", "taylor2", "taylor_mix", "magnitude", "random", "activation", "fisher_mask", "surgeon")


@pytest.fixture
def settings(default):
    def changed(**values):
        whole = {"shapes": "uniform", "attention_blocks": Span(), "mlp_blocks": Span()}
        return dataclasses.replace(pruning(default.prune), **(whole | values))

    return changed


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def scores_of(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {kind: torch.rand(architecture.group_count(shape, kind), generator=generator) for kind in KINDS}
        for shape in architecture.shapes(config)
    ]


def sizes(keep):
    """(heads, channels) of each block."""
    return [(len(here["attention"]), len(here["mlp"])) for here in keep]


def least(scores, number):
    """The lowest sum of so many scores, all subsets tried."""
    return min(sum(subset) for subset in itertools.combinations(scores.double().tolist(), number))


# A head weighs 6 matrices of 2 columns, a channel 3 of one: as much as four channels.
SMALL = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2} | {
    "intermediate_size": 10
}


@pytest.mark.parametrize("dear", [0.3, 1, 3])
@pytest.mark.parametrize("channels_gone", [1, 4, 7, 9, 12, 15, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_shape_is_the_cheapest_of_all_that_meet_the_target(seed, channels_gone, dear, settings):
    config = tiny_config(**SMALL)
    scores = scores_of(config, seed)
    for block in scores:
        block["attention"] *= 4 * dear
    channel = architecture.group_parameters(config, BlockShape(8, 4, 10), "mlp")
    assert architecture.group_parameters(config, BlockShape(8, 4, 10), "attention") == 4 * channel
    prices = {
        (4 - heads, 10 - channels): sum(least(b["attention"], heads) + least(b["mlp"], channels) for b in scores)
        for heads, channels in itertools.product(range(4), range(10))
        if 4 * heads + channels == channels_gone
    }
    keep = prune.select(scores, config, 3 * channels_gone * channel, settings(multiple_of=1, scope="global"))
    assert sizes(keep) == [min(prices, key=prices.get)] * 3


def test_each_block_keeps_its_own_best(settings):
    config = tiny_config()
    scores = scores_of(config)
    keep = prune.select(scores, config, 4 * (6144 + 16 * 192), settings(multiple_of=16))
    ((heads, channels),) = set(sizes(keep))
    assert (heads, channels) != (2, 96)
    for here, block in zip(keep, scores, strict=True):
        assert here["attention"].tolist() == sorted(block["attention"].topk(heads).indices.tolist())
        assert here["mlp"].tolist() == sorted(block["mlp"].topk(channels).indices.tolist())
    assert len({tuple(here["mlp"].tolist()) for here in keep}) > 1


def test_rounding_does_not_favour_shapes_that_remove_less(settings):
    config = tiny_config()  # a head weighs 32 channels
    scores = [{"attention": torch.full((2,), 32 * 1.05), "mlp": torch.ones(96)} for _ in range(4)]
    # 44 channels cost 44; a head and 12 channels 45.6, but 12 round to none, which leaves 33.6
    keep = prune.select(scores, config, 4 * 44 * 192, settings(multiple_of=24))
    assert sizes(keep) == [(2, 48)] * 4


def test_local_scope_takes_alike_of_heads_and_channels(settings):
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    scores = scores_of(config)
    for block in scores:
        block["attention"] *= 1000
    head, channel = (architecture.group_parameters(config, BlockShape(8, 4, 96), kind) for kind in KINDS)
    target = 4 * (2 * head + 48 * channel)
    assert sizes(prune.select(scores, config, target, settings(multiple_of=1, scope="local"))) == [(2, 48)] * 4
    assert sizes(prune.select(scores, config, target, settings(multiple_of=1, scope="global")))[0][0] == 4


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("kind, other", [("attention", "mlp"), ("mlp", "attention")])
def test_kinds_that_may_not_go_stay_whole(kind, other, scope, settings):
    config = tiny_config(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    shape = architecture.shapes(config)[0]
    target = 4 * 2 * architecture.group_parameters(config, shape, "attention")
    keep = prune.select(scores_of(config), config, target, settings(structures=(kind,), scope=scope, multiple_of=8))
    left = {"attention": (2, 96), "mlp": (4, 64)}[kind]
    assert sizes(keep) == [left] * 4
    assert all(len(here[other]) == architecture.group_count(shape, other) for here in keep)


@pytest.mark.parametrize("channels", [96, 90, 21])
@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 2])
def test_widths_are_multiples_and_meet_the_target_to_half_a_lot(channels, size, share, settings):
    config = tiny_config(intermediate_size=channels)
    channel = architecture.group_parameters(config, BlockShape(4, 2, channels), "mlp")
    most = 4 * (channels - min(size, channels)) * channel
    keep = prune.select(scores_of(config), config, round(share * most), settings(structures=("mlp",), multiple_of=size))
    ((_, kept),) = set(sizes(keep))
    assert kept == channels or kept % size == 0
    if share <= 1:
        # what does not fill a lot is gone with the first one
        assert abs(4 * (channels - kept) * channel - share * most) <= 4 * size * channel / 2 + 1
    else:
        assert kept == min(size, channels)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_every_importance_gives_one_shape_at_the_ratio(importance, scope, settings):
    model = tiny_model()
    chosen = settings(
        ratio=0.25, importance=importance, scope=scope, multiple_of=8, compensate=importance == "surgeon", noise=0
    )
    found = prune.run(model, batches(), chosen, 0)
    assert len(set(map(tuple, found.config.block_shapes))) == 1
    assert abs(found.ratio - 0.25) * count(model) <= 4 * 8 * 192 / 2
    assert found.parameters == (count(model), count(checkpoint.from_state(found.config, found.state)))


@pytest.mark.parametrize("level, aggregate", [("vector", "prod"), ("parameter", "max"), ("vector", "last")])
@pytest.mark.parametrize("compensate", [False, True])
def test_several_steps_end_in_one_shape(level, aggregate, compensate, settings):
    model = tiny_model("qwen2", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    chosen = settings(importance="taylor1", level=level, aggregate=aggregate, steps=3, ratio=0.3)
    found = prune.run(model, batches(), dataclasses.replace(chosen, compensate=compensate, multiple_of=4), 0)
    assert len(set(map(tuple, found.config.block_shapes))) == 1
    assert abs(found.ratio - 0.3) * count(model) <= 4 * 4 * 192 / 2
    if not compensate:
        _, state = prune.remove(model, found.kept)
        assert all(torch.equal(tensor, found.state[name]) for name, tensor in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_model_of_one_shape_answers_as_the_masked_one_and_loads_as_a_stock_class(family, settings, tmp_path):
    model = tiny_model(family)
    ratio = 0.5 if architecture.experts(model.config) else 0.3  # a head goes where channels alone would be half gone
    chosen = settings(ratio=ratio, importance="magnitude", scope="local", multiple_of=8, compensate=False, noise=0)
    found = prune.run(model, batches(), chosen, 0)
    ((heads, kv_heads, channels),) = set(map(tuple, found.config.block_shapes))
    assert kv_heads == 1 and channels < 96
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = tiny_config(family, **sizes, **{architecture.channels_field(model.config): channels})
    config.save_pretrained(tmp_path)
    save_file(found.state, tmp_path / "model.safetensors", {"format": "pt"})
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not type(stock).__module__.startswith("pipeline")
    mask(model, found.kept)
    with torch.no_grad():
        tokens = batches(1)[0].tokens
        smaller = checkpoint.from_state(found.config, found.state)
        expected = model(input_ids=tokens).logits
        torch.testing.assert_close(smaller(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
        near = 1e-5 if architecture.experts(model.config) else 0  # transformers multiplies by all experts at once
        torch.testing.assert_close(stock(input_ids=tokens).logits, smaller(input_ids=tokens).logits, atol=near, rtol=0)


@pytest.mark.parametrize(
    "changes, layers, told",
    [
        ({"shapes": "free", "mlp_blocks": Span(2, -2)}, 4, None),
        ({}, 4, None),
        ({"mlp_blocks": Span(0, 3)}, 4, None),
        ({"mlp_blocks": Span(0, 3)}, None, None),
        ({"mlp_blocks": Span(2, -2), "structures": ("attention",)}, 4, None),
        ({"mlp_blocks": Span(0, 2)}, 4, "but prune.mlp_blocks 0 to 2 spare some"),
        ({"mlp_blocks": Span(0, -2)}, None, "but prune.mlp_blocks 0 to -2 spare some"),
        (
            {"attention_blocks": Span(1, -1), "mlp_blocks": Span(2, 3)},
            None,
            "prune.attention_blocks 1 to -1 and prune.mlp_blocks 2 to 3 spare some; set first to 0 and last to -1",
        ),
    ],
)
def test_ranges_that_spare_blocks_contradict_one_shape(changes, layers, told, settings):
    fault = structures.spared(settings(**changes), layers)
    assert fault is None if told is None else told in fault


def test_run_refuses_ranges_that_spare_blocks_of_this_model(settings):
    with pytest.raises(PruneError, match=r"^prune\.shapes: uniform gives all blocks one shape"):
        prune.run(tiny_model(), batches(), settings(mlp_blocks=Span(0, 2)), 0)


def test_costs_between_whole_structures_are_in_proportion():
    costs = torch.tensor([0.0, 2.0, 6.0, float("inf")], dtype=torch.float64)
    assert [uniform._between(costs, place) for place in (0, 0.5, 1, 1.25, 2)] == [0, 1, 2, 3, 6]
