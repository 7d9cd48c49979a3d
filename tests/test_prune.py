import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import FAMILIES, ROOT, batches, mask, tiny_config, tiny_model

from pipeline import architecture, checkpoint
from pipeline.architecture import KINDS, BlockShape
from pipeline.compress import grams, prune, saliency, surgeon
from pipeline.compress.structures import PruneError, Span
from pipeline.data import alpaca
from pipeline.data.alpaca import IGNORED, Batch
from pipeline.results import plan
from pipeline.settings import pruning

# Phi-4-mini's: on a part of each head, with a factor for each frequency.
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "factor": 2.0,
            "original_max_position_embeddings": 512, "short_factor": [1.5] * 6, "long_factor": [2.0] * 6}  # fmt: skip
READERS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


@pytest.fixture
def settings(default):
    def changed(**values):
        return dataclasses.replace(pruning(default.prune), **values)

    return changed


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def random_keep(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = []
    for shape in architecture.shapes(config):
        groups = {kind: architecture.group_count(shape, kind) for kind in KINDS}
        stay = {kind: int(torch.randint(1, size + 1, (1,), generator=generator)) for kind, size in groups.items()}
        keep.append(
            {kind: torch.randperm(size, generator=generator)[: stay[kind]].sort()[0] for kind, size in groups.items()}
        )
    return keep


def columns(config, shape, kind, structures):
    return architecture.kept(config, shape, [architecture.linear_of(config, READERS[kind]).inputs], {kind: structures})


def reader(model, block, kind):
    return model.get_submodule(architecture.linear_name(block, READERS[kind]))


def ragged():
    """Batches of two, two and one rows, with 11, 4, 7, 9 and 11 labelled positions."""
    found = [*batches(2), *batches(1, rows=1, seed=5)]
    for part, row, length in ((found[0], 1, 5), (found[1], 0, 8), (found[1], 1, 10)):
        part.labels[row, length:] = IGNORED
    return found


def row_losses(model, part):
    """Mean next-token cross-entropy of each row, from the definition."""
    logits = model(input_ids=part.tokens, use_cache=False).logits.double()
    found = []
    for row in range(len(part.tokens)):
        at = [i for i in range(1, part.tokens.shape[1]) if part.labels[row, i] != IGNORED]
        chosen = logits[row, [i - 1 for i in at]].log_softmax(-1)
        found.append(-chosen[torch.arange(len(at)), part.labels[row, at]].mean())
    return found


def row_gradients(model, parts, wanted):
    """Gradients of each row's loss: one list per row, in the order of ``wanted``."""
    for tensor in wanted:
        tensor.requires_grad_(True)
    rows = [Batch(part.tokens[i : i + 1], part.labels[i : i + 1]) for part in parts for i in range(len(part.tokens))]
    return [torch.autograd.grad(row_losses(model, row)[0], wanted) for row in rows]


def mean(values):
    return torch.stack(list(values)).mean(0)


# --- removal


@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in FAMILIES]
    + [("llama", {"num_key_value_heads": 4}), ("llama", {"attention_bias": True, "mlp_bias": True})]
    + [("phi3", {"rope_parameters": LONGROPE})],
)
def test_pruned_model_computes_what_the_masked_dense_model_does(family, changes):
    model = tiny_model(family, **changes)
    keep = random_keep(model.config)
    assert any(len(one["attention"]) == 1 for one in keep)
    smaller = checkpoint.from_state(*prune.remove(model, keep))
    (part,) = batches(1)
    with torch.no_grad():
        dense = model(input_ids=part.tokens).logits
        found = smaller(input_ids=part.tokens).logits
        expected = mask(model, keep)(input_ids=part.tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - dense).abs().max() > 0.01


def test_heads_keep_their_size_where_the_config_does_not_name_it():
    config = tiny_config("qwen2")
    del config.head_dim  # as in Qwen2.5's own config.json: hidden size / heads
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    keep = random_keep(config)
    assert any(len(one["attention"]) == 1 for one in keep)
    smaller = checkpoint.from_state(*prune.remove(model, keep))
    (part,) = batches(1)
    with torch.no_grad():
        found = smaller(input_ids=part.tokens).logits
        expected = mask(model, keep)(input_ids=part.tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_takes_exactly_the_parameters_of_its_groups(family):
    model = tiny_model(family)
    keep = random_keep(model.config, seed=1)
    smaller = checkpoint.from_state(*prune.remove(model, keep))
    gone = sum(
        architecture.group_parameters(model.config, shape, kind) * (architecture.group_count(shape, kind) - len(stay))
        for shape, here in zip(architecture.shapes(model.config), keep, strict=True)
        for kind, stay in here.items()
    )
    assert gone > 0
    assert count(smaller) == count(model) - gone


def test_removal_leaves_the_dense_model_as_it_was():
    model = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune.remove(model, random_keep(model.config))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family, steps", [*((family, 1) for family in FAMILIES), ("llama", 3), ("qwen2", 3)])
def test_run_removes_the_ratio_and_reports_it(family, steps, settings):
    # 0.25 tells the removed share from the kept one
    model = tiny_model(family)
    found = prune.run(model, batches(), settings(ratio=0.25, steps=steps, importance="magnitude"), 0)
    after = count(checkpoint.from_state(found.config, found.state))
    assert found.parameters == (count(model), after)
    assert found.ratio == pytest.approx(1 - after / count(model))
    half_a_head = architecture.group_parameters(model.config, BlockShape(4, 2, 96), "attention") / 2
    assert abs(count(model) - after - 0.25 * count(model)) <= half_a_head


@pytest.mark.parametrize("importance", ["taylor1", "magnitude"])
def test_kept_structures_of_several_steps_are_numbered_as_in_the_original(importance, settings):
    model = tiny_model("qwen2", num_attention_heads=8, num_key_value_heads=4)
    found = prune.run(model, batches(), settings(ratio=0.3, steps=3, importance=importance), 0)
    config, state = prune.remove(model, found.kept)
    assert config.block_shapes == found.config.block_shapes
    assert any(len(here["mlp"]) < 96 for here in found.kept)
    for name, tensor in state.items():
        assert torch.equal(tensor, found.state[name])


@pytest.mark.parametrize("steps, compensate", [(1, True), (1, False), (2, True)])
def test_several_ratios_are_each_what_a_run_of_its_own_gives(steps, compensate, settings, monkeypatch):
    model, ratios = tiny_model(), [0.3, 0.1]
    chosen = settings(importance="taylor1", steps=steps, compensate=compensate)
    alone = [prune.run(model, batches(), dataclasses.replace(chosen, ratio=ratio), 0) for ratio in ratios]
    real, scored = prune.scored, []
    monkeypatch.setattr(prune, "scored", lambda which, *rest: scored.append(which) or real(which, *rest))
    for one, found in zip(alone, prune.at_ratios(model, batches(), chosen, ratios, 0), strict=True):
        assert found.parameters == one.parameters and found.state.keys() == one.state.keys()
        assert all(torch.equal(tensor, one.state[name]) for name, tensor in found.state.items())
    assert sum(which is model for which in scored) == 1 and len(scored) == 1 + len(ratios) * (steps - 1)


@pytest.mark.parametrize(("importance", "compensate"), [("taylor1", False), ("surgeon", True)])
def test_second_step_goes_on_from_the_smaller_model_and_its_own_scores(importance, compensate, settings):
    model, parts = tiny_model(num_attention_heads=8, num_key_value_heads=4), batches()
    chosen = settings(ratio=0.3, importance=importance, compensate=compensate)
    every = count(model)

    def half(model, target):
        measured = grams.input_grams(model, parts) if compensate else None
        keep = prune.select(saliency.importance(model, parts, chosen), model.config, target, chosen)
        return keep, checkpoint.from_state(*prune.remove(model, keep, measured))

    first, smaller = half(model, round(0.15 * every))
    second, smallest = half(smaller, round(0.3 * every) - (every - count(smaller)))
    expected = [[old[kind][new[kind]].tolist() for kind in KINDS] for old, new in zip(first, second, strict=True)]
    found, at_once = (prune.run(model, parts, dataclasses.replace(chosen, steps=steps), 0) for steps in (2, 1))
    assert [[here[kind].tolist() for kind in KINDS] for here in found.kept] == expected
    assert [[here[kind].tolist() for kind in KINDS] for here in at_once.kept] != expected
    for name, tensor in smallest.state_dict().items():
        assert torch.equal(found.state[name], tensor)


def test_ratio_zero_removes_nothing(settings):
    model = tiny_model()
    found = prune.run(model, batches(), settings(ratio=0.0), 0)
    assert found.ratio == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state[name])


# --- selection


def scores_of(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {kind: torch.rand(architecture.group_count(shape, kind), generator=generator) for kind in KINDS}
        for shape in architecture.shapes(config)
    ]


def removed(config, keep, kind):
    return [
        sorted(set(range(architecture.group_count(shape, kind))) - set(here[kind].tolist()))
        for shape, here in zip(architecture.shapes(config), keep, strict=True)
    ]


def removed_parameters(config, keep):
    return sum(
        architecture.group_parameters(config, shape, kind) * len(gone)
        for kind in KINDS
        for shape, gone in zip(architecture.shapes(config), removed(config, keep, kind), strict=True)
    )


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("number", [1, 4, 7, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_global_selection_is_the_cheapest_subset_of_all(kind, number, seed, settings):
    config = tiny_config(
        num_hidden_layers=3, intermediate_size=4, num_attention_heads=4, num_key_value_heads=4, head_dim=4
    )
    scores = scores_of(config, seed)
    cost = architecture.group_parameters(config, BlockShape(4, 4, 4), kind)
    places = list(itertools.product(range(3), range(4)))
    subsets = (
        subset
        for subset in itertools.combinations(places, number)
        if all(sum(block == b for b, _ in subset) < 4 for block in range(3))
    )
    best = min(subsets, key=lambda subset: sum(float(scores[block][kind][i]) for block, i in subset))
    keep = prune.select(scores, config, number * cost, settings(scope="global", structures=(kind,)))
    assert [(block, i) for block, gone in enumerate(removed(config, keep, kind)) for i in gone] == sorted(best)


def test_global_selection_ranks_by_score_per_parameter(settings):
    config = tiny_config(num_hidden_layers=2)
    head, channel = (architecture.group_parameters(config, BlockShape(4, 2, 96), kind) for kind in KINDS)
    scores = [{"attention": torch.ones(2) * head, "mlp": torch.ones(96) * channel} for _ in range(2)]
    scores[1]["attention"][1] *= 0.5  # dearer than any channel as a sum, cheapest by parameter
    scores[0]["mlp"][7] *= 0.9
    keep = prune.select(scores, config, head + channel, settings(scope="global"))
    assert removed(config, keep, "attention") == [[], [1]]
    assert removed(config, keep, "mlp") == [[7], []]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("structures", [("attention", "mlp"), ("attention",), ("mlp",)])
@pytest.mark.parametrize("share", [0.1, 0.37, 0.6, 0.99])
def test_selection_meets_its_target_to_half_a_structure(scope, structures, share, settings):
    config = tiny_config(num_attention_heads=16, num_key_value_heads=8, head_dim=4)
    shape = BlockShape(16, 8, 96)
    costs = {kind: architecture.group_parameters(config, shape, kind) for kind in structures}
    removable = 4 * sum(cost * (architecture.group_count(shape, kind) - 1) for kind, cost in costs.items())
    target = round(share * removable)
    keep = prune.select(scores_of(config), config, target, settings(scope=scope, structures=structures))
    assert abs(removed_parameters(config, keep) - target) <= max(costs.values()) / 2


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("channels", [96, 90, 21])
@pytest.mark.parametrize("size", [1, 4, 8, 64])
@pytest.mark.parametrize("share", [0.2, 0.55, 2])
def test_channels_that_stay_are_the_best_and_a_multiple(scope, channels, size, share, settings):
    config = tiny_config(intermediate_size=channels)
    scores, cost = scores_of(config), architecture.group_parameters(config, BlockShape(4, 2, channels), "mlp")
    target = round(share * 4 * channels * cost)
    keep = prune.select(scores, config, target, settings(scope=scope, structures=("mlp",), multiple_of=size))
    for here, block in zip(keep, scores, strict=True):
        kept = len(here["mlp"])
        assert kept == channels or kept % size == 0
        assert kept >= min(size, channels)
        assert here["mlp"].tolist() == sorted(block["mlp"].argsort(descending=True)[:kept].tolist())
    if share > 1:
        assert all(len(here["mlp"]) == min(size, channels) for here in keep)
    elif target <= 4 * (channels - min(size, channels)) * cost:
        assert abs(removed_parameters(config, keep) - target) <= max(size / 2, 0.5) * cost


@pytest.mark.parametrize("scope", ["global", "local"])
def test_selection_keeps_the_best_of_each_kind_in_each_block(scope, settings):
    config = tiny_config()
    scores = scores_of(config)
    keep = prune.select(scores, config, 10**9, settings(scope=scope))
    for here, block in zip(keep, scores, strict=True):
        for kind in KINDS:
            assert here[kind].tolist() == [int(block[kind].argmax())]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize(
    ("structures", "attention", "mlp", "touched"),
    [
        (("attention", "mlp"), (1, 2), (2, -1), {"attention": [1, 2], "mlp": [2, 3]}),
        (("mlp",), (0, -1), (0, 0), {"attention": [], "mlp": [0]}),
        (("attention",), (3, 3), (0, -1), {"attention": [3], "mlp": []}),
        # -2 is the last block but one
        (("attention", "mlp"), (1, -2), (0, -3), {"attention": [1, 2], "mlp": [0, 1]}),
    ],
)
def test_selection_stays_in_its_blocks_and_kinds(scope, structures, attention, mlp, touched, settings):
    config = tiny_config()
    spans = [Span(first, last) for first, last in (attention, mlp)]
    chosen = settings(scope=scope, structures=structures, attention_blocks=spans[0], mlp_blocks=spans[1])
    keep = prune.select(scores_of(config), config, 10**9, chosen)
    for kind, blocks in touched.items():
        assert [block for block, gone in enumerate(removed(config, keep, kind)) if gone] == blocks


def test_kept_indices_ascend_and_do_not_depend_on_ties(settings):
    config = tiny_config()
    scores = [{"attention": torch.ones(2), "mlp": torch.ones(96)} for _ in range(4)]
    found = [prune.select(scores, config, 40000, settings()) for _ in range(2)]
    for here, again in zip(*found, strict=True):
        for kind in KINDS:
            assert torch.equal(here[kind], again[kind])
            assert here[kind].tolist() == sorted(here[kind].tolist())


def test_local_scope_takes_the_same_share_of_each_block_where_global_does_not(settings):
    config = tiny_config(num_attention_heads=16, num_key_value_heads=8, head_dim=4)
    scores = scores_of(config)
    for kind in KINDS:
        scores[2][kind] *= 100  # a block that a global ranking would spare
    target = removed_parameters(config, [{"attention": torch.arange(6), "mlp": torch.arange(72)}] * 4)
    keep = prune.select(scores, config, target, settings(scope="local"))
    for kind, gone in (("attention", 2), ("mlp", 24)):
        assert [len(one) for one in removed(config, keep, kind)] == [gone] * 4
        for here, block in zip(removed(config, keep, kind), scores, strict=True):
            assert here == sorted(block[kind].argsort()[:gone].tolist())
    spared = prune.select(scores, config, target, settings(scope="global"))
    assert [removed(config, spared, kind)[2] for kind in KINDS] == [[], []]


# --- shapes of real models


def parameters_of(values, blocks):
    """Parameters of a model of these config values with blocks of (key/value heads, channels), added up by hand."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    queries = heads // values.get("num_key_value_heads", heads)
    total = (1 if values["tie_word_embeddings"] else 2) * values["vocab_size"] * hidden + hidden
    for kv_heads, channels in blocks:
        rows = kv_heads * (queries + 2) * hidden // heads  # of q, k and v
        columns = kv_heads * queries * hidden // heads  # of o
        total += (rows + columns + 3 * channels + 2) * hidden
        total += rows if values["model_type"] == "qwen2" else 0
    return total


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
@pytest.mark.parametrize(
    ("preset", "every"),
    [
        ("default", 134_515_008),  # SmolLM2
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
    ],
)
def test_models_of_the_presets_lose_the_ratio_to_half_a_point(preset, every, ratio, scope, monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = plan.asked(preset, "24")
    values, config = plan.MODELS[asked.source], asked.config
    whole = architecture.shapes(config)[0]
    assert parameters_of(values, [(whole.kv_heads, whole.channels)] * config.num_hidden_layers) == every
    chosen = dataclasses.replace(pruning(asked.params.prune), scope=scope, ratio=ratio)
    prune.check(config, chosen)
    keep = prune.select(scores_of(config), config, round(ratio * every), chosen)
    left = parameters_of(values, [(len(here["attention"]), len(here["mlp"])) for here in keep])
    assert abs(1 - left / every - ratio) <= 0.005


# --- settings that do not fit


def span(first, last):
    return Span(first, last)


@pytest.mark.parametrize(("first", "last"), [(4, 4), (0, 4), (2, 1), (5, -1), (3, -2), (0, -5)])
def test_block_range_outside_the_model_is_refused(first, last, settings):
    config = tiny_config()
    with pytest.raises(PruneError) as error:
        prune.check(config, settings(mlp_blocks=span(first, last)))
    assert str(error.value) == f"prune.mlp_blocks: {first} to {last} is no range within blocks 0 to 3"


def test_both_block_ranges_are_reported_at_once(settings):
    with pytest.raises(PruneError) as error:
        prune.check(tiny_config(), settings(attention_blocks=span(9, -1), mlp_blocks=span(0, 7)))
    assert str(error.value).splitlines() == [
        "prune.attention_blocks: 9 to -1 is no range within blocks 0 to 3",
        "prune.mlp_blocks: 0 to 7 is no range within blocks 0 to 3",
    ]


def test_ratio_too_large_names_what_is_possible(settings):
    config = tiny_config()
    every = count(tiny_model())
    # two MLPs, 95 of 96 channels each, 3 x 64 parameters a channel
    possible = 2 * 95 * 3 * 64
    chosen = {"structures": ("mlp",), "mlp_blocks": span(1, 2)}
    prune.check(config, settings(ratio=possible / every - 1e-9, **chosen))
    with pytest.raises(
        PruneError, match=rf"^prune.ratios: 0.4 of {every:,} parameters is more than the 0.234 "
    ) as error:
        prune.check(config, settings(ratio=0.4, **chosen))
    assert "lower it or widen the ranges" in str(error.value)


def test_run_refuses_before_it_scores(settings, monkeypatch):
    monkeypatch.setattr(saliency, "importance", lambda *_: pytest.fail("scored"))
    with pytest.raises(PruneError, match="attention_blocks"):
        prune.run(tiny_model(), batches(), settings(attention_blocks=span(4, 4)), 0)


# --- importance


def test_taylor1_is_the_slope_of_the_loss_when_a_weight_is_scaled(settings):
    model, parts = tiny_model(), ragged()
    first, second = saliency.gradients(model, parts, "taylor1")
    scores = saliency.weight_scores(model, first, second, "taylor1")
    step = 0.05
    for name in (
        architecture.linear_name(0, "self_attn.k_proj"),
        architecture.linear_name(1, "mlp.gate_proj"),
        architecture.linear_name(3, "self_attn.o_proj"),
    ):
        weight = model.get_submodule(name).weight
        for place in scores[name].abs().flatten().argsort(descending=True)[:3].tolist():
            before = float(weight.detach().view(-1)[place])
            losses = []
            for factor in (1 + step, 1 - step):
                with torch.no_grad():
                    weight.view(-1)[place] = before * factor
                    losses.append(torch.stack([row for part in parts for row in row_losses(model, part)]).mean())
                    weight.view(-1)[place] = before
            slope = float(losses[0] - losses[1]) / (2 * step)
            assert float(scores[name].view(-1)[place]) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("kind", ["taylor1", "taylor2", "taylor_mix"])
def test_taylor_scores_equal_their_formulas_from_gradients_of_rows(kind):
    model, parts = tiny_model(), ragged()
    first, second = saliency.gradients(model, parts, kind)
    found = saliency.weight_scores(model, first, second, kind)
    names = list(architecture.linears(model.config))
    weights = [model.get_submodule(name).weight for name in names]
    gradients = list(zip(*row_gradients(model, parts, weights), strict=True))
    for name, weight, of_rows in zip(names, weights, gradients, strict=True):
        slope, fisher = mean(of_rows), mean(one.square() for one in of_rows)
        expected = {
            "taylor1": weight * slope,
            "taylor2": weight**2 * fisher,
            "taylor_mix": weight * slope - weight**2 * fisher / 2,
        }[kind]
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-8)


def members(kind, one):
    """What leaves with a structure: (linear, dimension, places); two query heads of 16 share a key/value head."""
    if kind == "mlp":
        return [("mlp.gate_proj", 0, [one]), ("mlp.up_proj", 0, [one]), ("mlp.down_proj", 1, [one])]
    queries, keys = range(32 * one, 32 * one + 32), range(16 * one, 16 * one + 16)
    return [
        ("self_attn.q_proj", 0, queries),
        ("self_attn.k_proj", 0, keys),
        ("self_attn.v_proj", 0, keys),
        ("self_attn.o_proj", 1, queries),
    ]


SIZES = {"parameter": lambda vector: float(vector.abs().sum()), "vector": lambda vector: float(vector.sum().abs())}
REDUCTIONS = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "prod": lambda values: math.prod(values) ** (1 / len(values)),
    "max": max,
    "last": lambda values: values[-1],
}


@pytest.mark.parametrize(
    ("kind", "level", "how"),
    [
        ("taylor1", "parameter", "sum"),
        ("taylor1", "vector", "prod"),
        ("taylor2", "parameter", "mean"),
        ("taylor_mix", "parameter", "max"),
        ("taylor_mix", "vector", "last"),
        ("magnitude", "vector", "sum"),
    ],
)
def test_importance_is_the_papers_summed_slice_by_slice(kind, level, how, settings):
    model, parts = tiny_model(num_hidden_layers=2, intermediate_size=12), ragged()
    found = saliency.importance(model, parts, settings(importance=kind, level=level, aggregate=how))
    names = list(architecture.linears(model.config))
    weights = [model.get_submodule(name).weight for name in names]
    scores = {}
    for name, weight, of_rows in zip(
        names, weights, zip(*row_gradients(model, parts, weights), strict=True), strict=True
    ):
        first, second = mean(of_rows) * weight, mean(one.square() for one in of_rows) * weight.square()
        # eq. 6, the Hessian's diagonal being the mean square of the rows' gradients
        every = {"taylor1": first, "taylor2": second, "taylor_mix": first - second / 2, "magnitude": weight}
        scores[name] = every[kind].detach().double()
    for block, (structures, number) in itertools.product(range(2), (("attention", 2), ("mlp", 12))):
        for one in range(number):
            sums = [
                sum(SIZES[level](scores[architecture.linear_name(block, name)].select(dim, place)) for place in places)
                for name, dim, places in members(structures, one)
            ]
            assert float(found[block][structures][one]) == pytest.approx(REDUCTIONS[how](sums), rel=1e-3)


def test_vector_score_of_a_channels_column_is_the_slope_of_the_loss_in_its_scale(settings):
    # which is that of the whole channel: what it does passes through its column of down_proj
    model, parts = tiny_model(dtype=torch.float64), ragged()
    found = saliency.importance(model, parts, settings(importance="taylor1", level="vector", aggregate="last"))
    step = 0.02  # norms compute in fp32 even so: smaller steps drown in its rounding
    for block in (0, 3):
        weight = reader(model, block, "mlp").weight
        for channel in found[block]["mlp"].topk(3).indices.tolist():
            before, losses = weight[:, channel].clone(), []
            for factor in (1 + step, 1 - step, 1):
                with torch.no_grad():
                    weight[:, channel] = before * factor
                    losses.append(float(mean(row for part in parts for row in row_losses(model, part))))
            slope = (losses[0] - losses[1]) / (2 * step)
            assert float(found[block]["mlp"][channel]) == pytest.approx(abs(slope), rel=5e-3)


@pytest.mark.parametrize("kind", ["taylor1", "taylor2", "fisher_mask", "activation"])
def test_importance_leaves_no_gradients_behind(kind, settings):
    model = tiny_model()
    saliency.importance(model, batches(), settings(importance=kind))
    assert all(parameter.grad is None for parameter in model.parameters())


def masked_gradients(model, parts):
    """Gradients of each row's loss by an explicit mask on what the structures hand to their readers."""
    places, masks, handles = [], [], []

    def hook(mask_):
        def scale(_, inputs):
            return (inputs[0] * mask_.repeat_interleave(inputs[0].shape[-1] // len(mask_)),)

        return scale

    for block, shape in enumerate(architecture.shapes(model.config)):
        for kind in KINDS:
            ones = torch.ones(architecture.group_count(shape, kind), requires_grad=True)
            places.append((block, kind))
            masks.append(ones)
            handles.append(reader(model, block, kind).register_forward_pre_hook(hook(ones)))
    gradients = row_gradients(model, parts, masks)
    for handle in handles:
        handle.remove()
    return dict(zip(places, zip(*gradients, strict=True), strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("parts", [batches(), ragged()], ids=["even", "ragged"])
def test_fisher_mask_is_the_mean_square_of_each_rows_mask_gradient(family, parts):
    model = tiny_model(family)
    found = saliency.fisher_mask(model, parts)
    for (block, kind), of_rows in masked_gradients(model, parts).items():
        expected = mean(one.square() for one in of_rows)
        torch.testing.assert_close(found[block][kind], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["taylor1", "taylor2", "fisher_mask", "activation"])
def test_scores_do_not_depend_on_how_rows_are_batched(kind, settings):
    model, parts = tiny_model(), ragged()
    alone = [Batch(part.tokens[i : i + 1], part.labels[i : i + 1]) for part in parts for i in range(len(part.tokens))]
    found, expected = (saliency.importance(model, one, settings(importance=kind)) for one in (parts, alone))
    for here, there in zip(found, expected, strict=True):
        for structures in KINDS:
            torch.testing.assert_close(here[structures], there[structures], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["taylor1", "taylor2", "fisher_mask", "activation"])
def test_padding_does_not_change_scores(kind, settings):
    model = tiny_model()
    rows = [alpaca.Example(tuple(part.tokens[0].tolist()), 3) for part in batches(4)]
    short = [alpaca.Example(row.tokens[: 6 + i], 3) for i, row in enumerate(rows)]
    padded = [alpaca.batch(short, padding, True) for padding in (1, 7)]
    found, expected = (saliency.importance(model, [one], settings(importance=kind)) for one in padded)
    for here, there in zip(found, expected, strict=True):
        for structures in KINDS:
            torch.testing.assert_close(here[structures], there[structures], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_activation_is_the_share_of_energy_written_into_the_residual_stream(settings, family):
    model, parts = tiny_model(family), batches()
    found = saliency.importance(model, parts, settings(importance="activation"))
    tokens = torch.cat([part.tokens for part in parts])
    inputs = {}
    handles = [
        reader(model, block, kind).register_forward_pre_hook(
            lambda _, seen, place=(block, kind): inputs.__setitem__(place, seen[0])
        )
        for block in range(4)
        for kind in KINDS
    ]
    outputs = []
    handles += [block.register_forward_hook(lambda *seen: outputs.append(seen[2])) for block in model.model.layers]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    for (block, kind), value in inputs.items():
        output = outputs[block][0] if isinstance(outputs[block], tuple) else outputs[block]
        weight = reader(model, block, kind).weight.detach()
        if family == "olmo2":  # a norm scales it on its way: the share of what the sublayer writes
            output = value @ weight.T
        shape = BlockShape(4, 2, 96)
        for structure in range(0, architecture.group_count(shape, kind), 1 if kind == "attention" else 19):
            here = columns(model.config, shape, kind, torch.tensor([structure]))
            written = value[..., here] @ weight[:, here].T
            expected = float(written.square().mean() / output.square().mean())
            assert float(found[block][kind][structure]) == pytest.approx(expected, rel=1e-3)


def test_random_importance_is_seeded_and_leaves_the_global_generator_alone(settings):
    model = tiny_model()
    state = torch.get_rng_state()
    found = [saliency.importance(model, [], settings(importance="random"), seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    for kind, size in (("attention", 2), ("mlp", 96)):
        once, again, other = (one[1][kind] for one in found)
        assert once.shape == (size,)
        assert torch.equal(once, again)
        assert not torch.equal(once, other)
        assert not torch.equal(once, found[0][2][kind])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [6.0, 15.0]),
        ("mean", [2.0, 5.0]),
        ("max", [3.0, 8.0]),
        ("last", [3.0, 1.0]),
        # the geometric mean: it orders as the product does
        ("prod", [6 ** (1 / 3), 48 ** (1 / 3)]),
    ],
)
def test_members_become_one_score_by_hand(how, expected):
    members = torch.tensor([[1.0, 6.0], [2.0, 8.0], [3.0, 1.0]])
    torch.testing.assert_close(saliency.aggregated(members, how), torch.tensor(expected))


def test_product_of_tiny_scores_does_not_underflow():
    members = torch.tensor([[1.0, 2.0], [4.0, 3.0], [1.0, 5.0], [1.0, 1.0]]) * 1e-15
    found = saliency.aggregated(members, "prod")
    assert float(found[1] / found[0]) == pytest.approx((30 / 4) ** (1 / 4), rel=1e-4)


@pytest.mark.parametrize(
    ("level", "member"),
    [
        # what a linear gives to the score of structure 1: sums of |w|, or |sums| of w
        ("parameter", lambda weights, dim: float(weights.abs().sum())),
        ("vector", lambda weights, dim: float(weights.sum(dim).abs().sum())),
    ],
)
def test_level_takes_absolute_values_before_or_after_the_sum(level, member):
    model = tiny_model()
    scores = {name: model.get_submodule(name).weight.detach() for name in architecture.linears(model.config)}
    found = saliency.structure_scores(model, scores, level, "sum")
    rows = {
        "attention": (
            ("q_proj", (slice(32, 64),), 1),
            ("k_proj", (slice(16, 32),), 1),
            ("v_proj", (slice(16, 32),), 1),
            ("o_proj", (slice(None), slice(32, 64)), 0),
        ),
        "mlp": (
            ("gate_proj", (slice(1, 2),), 1),
            ("up_proj", (slice(1, 2),), 1),
            ("down_proj", (slice(None), slice(1, 2)), 0),
        ),
    }
    for kind, members in rows.items():
        part = "self_attn" if kind == "attention" else "mlp"
        expected = sum(member(scores[f"model.layers.2.{part}.{name}"][where], dim) for name, where, dim in members)
        assert float(found[2][kind][1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("level", "expected"), [("parameter", 5.0), ("vector", 1.0)])
def test_level_by_hand(level, expected):
    config = tiny_config(num_hidden_layers=1, intermediate_size=1, hidden_size=2, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=2)  # fmt: skip
    scores = {name: torch.zeros(2, 2) for name in architecture.linears(config)}
    scores |= {architecture.linear_name(0, f"mlp.{name}_proj"): torch.zeros(1, 2) for name in ("gate", "up")}
    scores[architecture.linear_name(0, "mlp.down_proj")] = torch.tensor([[3.0], [-2.0]])
    found = saliency.structure_scores(SimpleNamespace(config=config), scores, level, "sum")
    assert found[0]["mlp"].tolist() == [expected]


# --- compensation


def correlated(rows=200, inputs=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, 6, generator=generator, dtype=torch.float64) @ mixing + 0.3 * noise
    return values, torch.randn(10, inputs, generator=generator, dtype=torch.float64)


KEPT = torch.tensor([0, 2, 3, 5, 8, 9, 13, 17, 20, 23])


def test_refit_is_the_ridge_solution_around_the_unchanged_columns():
    values, weight = correlated()
    gram = values.T @ values
    found = prune.refit(weight, gram, KEPT)
    # least squares with rows added that pull W' to W_S
    pull = (prune._REFIT_DAMPING * gram.diagonal().median()).sqrt()
    left = torch.cat([values[:, KEPT], pull * torch.eye(len(KEPT), dtype=torch.float64)])
    right = torch.cat([values @ weight.T, pull * weight[:, KEPT].T])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.T, rtol=1e-6, atol=1e-8)


def test_refit_nears_plain_least_squares_and_lowers_the_reconstruction_error(monkeypatch):
    monkeypatch.setattr(prune, "_REFIT_DAMPING", 1e-2)
    values, weight = correlated()
    target = values @ weight.T

    def error(smaller):
        return float((target - values[:, KEPT] @ smaller.T).norm())

    best = error(torch.linalg.lstsq(values[:, KEPT], target).solution.T)
    found, plain = error(prune.refit(weight, values.T @ values, KEPT)), error(weight[:, KEPT])
    assert best <= found < 1.1 * best
    assert found < 0.6 * plain


def test_refit_of_all_columns_changes_nothing():
    values, weight = correlated()
    torch.testing.assert_close(prune.refit(weight, values.T @ values, torch.arange(24)), weight)


def test_refit_keeps_the_type_of_the_weight():
    values, weight = correlated()
    assert prune.refit(weight.bfloat16(), (values.T @ values).float(), KEPT).dtype == torch.bfloat16


@pytest.mark.parametrize("tile", [grams._TILE, 40])  # wider than the inputs; no divisor of their number
def test_input_grams_are_those_of_the_reading_linears(tile, monkeypatch):
    monkeypatch.setattr(grams, "_TILE", tile)
    model, parts = tiny_model(), batches()
    measured = grams.input_grams(model, parts)
    seen = []
    handle = reader(model, 2, "mlp").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for part in parts:
            model(input_ids=part.tokens)
    handle.remove()
    values = torch.cat(seen)
    torch.testing.assert_close(measured[2]["mlp"], values.T @ values / len(values), rtol=1e-4, atol=1e-6)


def test_compensation_brings_the_first_pruned_block_nearer_to_the_dense_one(settings):
    # only block 0 is pruned, so that the inputs of its readers are those that the fit saw
    model, parts = tiny_model(), batches(8)
    only = {"ratio": 0.1, "structures": ("mlp",), "mlp_blocks": span(0, 0), "importance": "magnitude"}
    model_out = model.model.layers[0].mlp
    inputs = []
    handle = model_out.register_forward_pre_hook(lambda _, seen: inputs.append(seen[0]))
    with torch.no_grad():
        for part in parts:
            model(input_ids=part.tokens)
        handle.remove()
        values = torch.cat([one.flatten(0, 1) for one in inputs])
        errors = []
        for compensate in (False, True):
            found = prune.run(model, parts, settings(**only, compensate=compensate), 0)
            smaller = checkpoint.from_state(found.config, found.state)
            errors.append(float((smaller.model.layers[0].mlp(values) - model_out(values)).norm()))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("width", [1, 3])
def test_surgeon_cost_is_the_least_error_of_any_refit(width):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    gram = inputs.T @ inputs
    damped = gram + torch.eye(12) * surgeon._DAMPING * gram.diagonal().median()
    errors = []
    for structure in range(12 // width):
        gone = list(range(structure * width, (structure + 1) * width))
        kept = [column for column in range(12) if column not in gone]
        refitted = torch.zeros_like(weight)
        refitted[:, kept] = torch.linalg.solve(damped[kept][:, kept], (weight @ damped[:, kept]).T).T
        change = weight - refitted
        errors.append(float((change @ damped * change).sum()))
    costs = surgeon.surgeon_order(weight, gram, width, chunk=1)
    first = int(costs.argmin())
    assert first == errors.index(min(errors))
    assert float(costs[first]) == pytest.approx(min(errors), rel=1e-3)


def test_surgeon_costs_follow_from_removing_and_refitting_again():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight = torch.randn(4, 6, generator=generator)
    gram = inputs.T @ inputs
    damped = gram + torch.eye(6) * surgeon._DAMPING * gram.diagonal().median()
    costs = surgeon.surgeon_order(weight, gram, 1, chunk=1)
    order = costs.argsort().tolist()
    highest, before = 0.0, 0.0
    for place in range(1, 6):
        kept = sorted(order[place:])
        refitted = torch.zeros_like(weight)
        refitted[:, kept] = torch.linalg.solve(damped[kept][:, kept], (weight @ damped[:, kept]).T).T
        error = float(((weight - refitted) @ damped * (weight - refitted)).sum())
        highest = max(highest, error - before)
        assert float(costs[order[place - 1]]) == pytest.approx(highest, rel=1e-2)
        before = error
    assert costs[order[-1]] == float("inf")


@pytest.mark.parametrize("family, expected", [("llama", [None]), ("gemma2", ["self_attn.o_proj", "mlp.down_proj"])])
def test_surgeon_compares_blocks_by_the_gradient_where_errors_arise(family, expected, settings, monkeypatch):
    asked = []

    def energy(model, parts, linear=None):
        asked.append(linear)
        return torch.ones(4)

    monkeypatch.setattr(surgeon, "gradient_energy", energy)
    saliency.importance(tiny_model(family), batches(), settings(importance="surgeon"))
    assert asked == expected


@pytest.mark.parametrize(
    "family, linear", [("llama", None), ("olmo2", "mlp.down_proj"), ("gemma3_text", "self_attn.o_proj")]
)
def test_gradient_energy_is_the_mean_squared_gradient_at_each_output(family, linear):
    model = tiny_model(family)
    (part,) = batches(count=1)
    found = surgeon.gradient_energy(model, [part], linear)
    for energy, block in zip(found, range(4), strict=True):
        leaves = []

        def cut(_, inputs, output, leaves=leaves):
            leaves.append(output.detach().requires_grad_(True))
            return leaves[-1]

        block = model.model.layers[block]
        handle = (block.get_submodule(linear) if linear else block).register_forward_hook(cut)
        logits = model(input_ids=part.tokens).logits[:, :-1]
        handle.remove()
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part.labels[:, 1:].flatten(), reduction="sum"
        ).backward()
        count = (part.labels != alpaca.IGNORED).sum()
        assert float(energy) == pytest.approx(float(leaves[0].grad.square().sum() / count), rel=1e-4)


def test_surgeon_with_compensation_meets_the_ratio(settings):
    model = tiny_model()
    chosen = settings(importance="surgeon", compensate=True, ratio=0.25)
    pruned = prune.run(model, batches(count=4, rows=4, length=32), chosen, 0)
    assert pruned.ratio == pytest.approx(0.25, abs=0.02)


def test_surgeon_does_not_order_what_may_not_go(settings):
    model, parts = tiny_model(), batches(count=4, rows=4, length=32)
    chosen = settings(importance="surgeon", structures=("mlp",), mlp_blocks=span(1, 2))
    scores = saliency.importance(model, parts, chosen)
    bounded = [block["mlp"].isfinite().any().item() for block in scores]
    assert bounded == [False, True, True, False]
    assert all(block["attention"].isinf().all() for block in scores)


def observed(model, parts):
    """What readers receive, (block, kind) -> [tokens, inputs], and each block's gradient energy; each row unpadded."""
    seen, outputs = {(block, kind): [] for block in range(2) for kind in KINDS}, []
    handles = [
        reader(model, *place).register_forward_pre_hook(lambda _, inputs, place=place: seen[place].append(inputs[0][0]))
        for place in seen
    ]
    handles += [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in model.model.layers]
    energy, tokens = torch.zeros(2), 0
    for part in parts:
        for row, labels in zip(part.tokens, part.labels, strict=True):
            row = row[: 1 + int((labels != IGNORED).sum())]
            outputs.clear()
            logits = model(input_ids=row[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")
            energy += torch.stack([one.square().sum() for one in torch.autograd.grad(losses, outputs)])
            tokens += len(row) - 1
    for handle in handles:
        handle.remove()
    return {place: torch.cat(values).detach().double() for place, values in seen.items()}, energy / tokens


def least_error(weight, root, gone):
    """The least ||(W - W') R||^2 of all W' without the columns ``gone``."""
    kept = [column for column in range(weight.shape[1]) if column not in gone]
    target = (weight @ root).T
    return float((target - root[kept].T @ torch.linalg.lstsq(root[kept].T, target).solution).square().sum())


def costs_by_trial(weight, inputs, width):
    """What each structure costs when all that are left are tried and the cheapest goes, not below any before it."""
    gram = inputs.T @ inputs / len(inputs)
    root = torch.linalg.cholesky(gram + surgeon._DAMPING * gram.diagonal().median() * torch.eye(len(gram)))
    costs, gone, before = [math.inf] * (len(gram) // width), [], 0.0
    while costs.count(math.inf) > 1:
        errors = {
            one: least_error(weight, root, [*gone, *range(one * width, one * width + width)])
            for one, cost in enumerate(costs)
            if cost == math.inf
        }
        first = min(errors, key=errors.get)
        highest = max((cost for cost in costs if cost < math.inf), default=0.0)
        costs[first] = max(highest, errors[first] - before)
        gone += range(first * width, first * width + width)
        before = errors[first]
    return costs


def test_surgeon_importance_is_the_least_error_after_refit_by_the_gradients_energy(settings):
    model = tiny_model(
        num_hidden_layers=2, intermediate_size=7, num_attention_heads=8, num_key_value_heads=4, head_dim=4
    )
    parts = [*ragged(), *batches(1, seed=9)]
    inputs, _ = observed(model, parts)
    _, energy = observed(model, parts[::2])  # no more than three batches, evenly chosen
    found = saliency.importance(model, parts, settings(importance="surgeon"))
    for block, (kind, width, factor) in itertools.product(
        range(2), (("attention", 8, surgeon._HEAD_FACTOR), ("mlp", 1, 1.0))
    ):
        weight = reader(model, block, kind).weight.detach().double()
        costs = torch.tensor(costs_by_trial(weight, inputs[block, kind], width))
        expected = costs * energy[block] ** surgeon._ENERGY_POWER * factor
        torch.testing.assert_close(found[block][kind], expected, rtol=1e-2, atol=0)


# --- dead and broken weights


def padded_back(model, channels):
    """Return the model with all but the first channels of each block dead: their weights are zero."""
    with torch.no_grad():
        for block in model.model.layers:
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[channels:] = 0
            block.mlp.down_proj.weight[:, channels:] = 0
    return model


def test_damping_is_the_median_and_that_of_living_inputs_where_most_are_dead():
    def energy(*diagonal):
        return float(grams.typical_energy(torch.diag(torch.tensor(diagonal))))

    assert energy(1.0, 5.0, 3.0) == 3.0
    assert energy(0.0, 5.0, 3.0) == 3.0
    assert energy(0.0, 0.0, 0.0, 5.0, 3.0, 4.0, 0.0) == 4.0
    assert energy(0.0, 0.0) == 1.0


@pytest.mark.parametrize("compensate", [True, False])
def test_model_padded_back_with_zeros_loses_its_dead_channels_first(settings, compensate):
    model = padded_back(tiny_model(), 36)  # 60 of 96 are dead: the median of what down_proj receives is zero
    chosen = settings(importance="surgeon", compensate=compensate, structures=("mlp",), scope="local", ratio=0.2)
    found = prune.run(model, batches(count=4, rows=4, length=32), chosen, 0)
    assert all(set(range(36)) <= set(block["mlp"].tolist()) for block in found.kept)
    smaller = checkpoint.from_state(found.config, found.state)
    tokens = batches(1)[0].tokens
    with torch.no_grad():
        torch.testing.assert_close(smaller(tokens).logits, model(tokens).logits, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, settings):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(
        PruneError, match=r"model\.layers\.2\.mlp\.up_proj\.weight of the model holds values that are not"
    ):
        prune.run(model, batches(), settings(importance="magnitude"), 0)


def test_activations_that_are_not_finite_are_told_by_the_layer_that_receives_them():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = math.inf
    with pytest.raises(
        PruneError, match=r"^model\.layers\.1\.self_attn\.o_proj: what this layer receives is not finite"
    ):
        grams.input_grams(model, batches())


def test_scores_that_are_not_numbers_are_refused(settings):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    with pytest.raises(PruneError, match="block 0: the taylor1 scores of its attention structures are not numbers"):
        saliency.importance(model, batches(), settings(importance="taylor1"))
