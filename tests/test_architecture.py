import pytest
import torch
from conftest import FAMILIES, batches, tiny_config, tiny_model

from pipeline import architecture, checkpoint, families
from pipeline.architecture import BlockShape

SHAPES = [BlockShape(4, 2, 96), BlockShape(2, 1, 40), BlockShape(4, 2, 7), BlockShape(2, 1, 1)]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def pruned_model(family, **changes):
    config = checkpoint.pruned_config(tiny_config(family, **changes), SHAPES)
    return checkpoint.PRUNED[family](config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", architecture.GRANULARITIES)
def test_units_hold_every_linear_of_the_model_once(family, granularity):
    model = tiny_model(family)
    a_block = {"block": 1, "group": 4, "linear": 4 if family == "phi3" else 7}[granularity]
    real = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    units = architecture.units(model.config, granularity)
    assert len(units) == 4 * a_block
    assert len({unit.name for unit in units}) == len(units)
    assert sorted(name for unit in units for name in unit.linears) == sorted(real)
    assert sorted(architecture.linears(model.config)) == sorted(real)
    assert all(name.startswith(f"model.layers.{unit.block}.") for unit in units for name in unit.linears)
    assert [unit.block for unit in units] == sorted(unit.block for unit in units)


def test_group_units_fuse_what_serving_runtimes_fuse():
    first = {
        unit.name: [name.rsplit(".", 1)[1] for name in unit.linears]
        for unit in architecture.units(tiny_config(), "group")
    }
    assert first["2.qkv"] == ["q_proj", "k_proj", "v_proj"]
    assert first["2.o"] == ["o_proj"]
    assert first["2.gate_up"] == ["gate_proj", "up_proj"]
    assert first["2.down"] == ["down_proj"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in FAMILIES]
    + [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True})],
)
@pytest.mark.parametrize(("kind", "less"), [("attention", BlockShape(2, 1, 96)), ("mlp", BlockShape(4, 2, 95))])
def test_group_parameters_is_what_a_real_model_loses(family, changes, kind, less):
    config = tiny_config(family, **changes)
    whole = BlockShape(4, 2, 96)
    models = [
        checkpoint.PRUNED[family](checkpoint.pruned_config(config, [one, whole, whole, whole])) for one in (whole, less)
    ]
    assert count(models[0]) - count(models[1]) == architecture.group_parameters(config, whole, kind)


def test_group_parameters_counts_qwen2_biases_by_hand():
    # q: 2 heads of 16, k and v: 1 head of 16, o: 32 columns; biases on q, k, v only
    attention = (32 + 16 + 16 + 32) * 64 + (32 + 16 + 16)
    config = tiny_config("qwen2")
    assert architecture.group_parameters(config, BlockShape(4, 2, 96), "attention") == attention
    assert architecture.group_parameters(config, BlockShape(4, 2, 96), "mlp") == 3 * 64


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_shape_and_bias_match_the_modules_of_a_pruned_model(family):
    model = pruned_model(family)
    for index, shape in enumerate(architecture.shapes(model.config)):
        assert shape == SHAPES[index]
        for linear in architecture.description(model.config).linears:
            module = model.get_submodule(architecture.linear_name(index, linear.name))
            assert tuple(module.weight.shape) == architecture.linear_shape(model.config, shape, linear.name)
            assert (module.bias is not None) == architecture.has_bias(model.config, linear)


def test_shapes_of_a_whole_model_are_its_config_fields():
    assert architecture.shapes(tiny_config("qwen3")) == [BlockShape(4, 2, 96)] * 4


def test_head_dim_falls_back_to_hidden_size_over_heads():
    config = tiny_config()
    assert architecture.head_dim(config) == 16
    config.head_dim = None
    assert architecture.head_dim(config) == 64 // 4
    config.head_dim = 24
    assert architecture.head_dim(config) == 24


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (["queries"], list(range(32, 64))),
        (["keys"], list(range(16, 32))),
        (["channels"], [1]),
        (["queries", "keys", "hidden"], [*range(32, 64), *range(80, 96), *range(96, 160)]),
        (["hidden"], None),
    ],
)
def test_a_key_value_head_keeps_its_query_heads_and_fused_parts_follow_each_other(axes, expected):
    keep = {"attention": torch.tensor([1]), "mlp": torch.tensor([1])}
    found = architecture.kept(tiny_config(), BlockShape(4, 2, 96), axes, keep)
    assert (found if found is None else found.tolist()) == expected


@pytest.mark.parametrize(("kind", "structure"), [("attention", 1), ("mlp", 40)])
@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in FAMILIES]
    + [("llama", {"num_key_value_heads": 4}), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_coupled_rows_are_those_that_matter_no_more_without_their_reader(family, changes, kind, structure):
    model, block = tiny_model(family, **changes), 2
    shape = architecture.shapes(model.config)[block]

    coupled, reads = {}, []
    for member in architecture.members(model.config, shape, kind):
        first = member.start + structure * member.width
        name = architecture.linear_name(block, member.linear)
        if member.dim == 0:
            coupled.setdefault(name, []).extend(range(first, first + member.width))
        else:
            reads.append((name, slice(first, first + member.width)))
    with torch.no_grad():
        for name, columns in reads:  # of several linears where there are experts
            model.get_submodule(name).weight[:, columns] = 0
    if family == "olmo2" and kind == "attention":  # a norm of all heads feels q and k all the same
        for name in ("q_proj", "k_proj"):
            del coupled[f"model.layers.{block}.self_attn.{name}"]
    logits = model(input_ids=batches(1)[0].tokens).logits
    (logits * torch.randn_like(logits)).sum().backward()
    for linear in architecture.linears(model.config):
        for parameter in model.get_submodule(linear).parameters():  # weight, and bias if it has one
            felt = parameter.grad.flatten(1).any(1) if parameter.dim() == 2 else parameter.grad != 0
            assert (~felt).nonzero().flatten().tolist() == coupled.get(linear, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_family_of_a_pruned_config_is_that_of_its_origin(family):
    config = tiny_config(family)
    assert architecture.family(config) == family
    assert architecture.family(checkpoint.pruned_config(config, SHAPES)) == family


def test_unsupported_family_is_refused_with_the_supported_ones():
    config = tiny_config()
    config.model_type = "gpt2"
    with pytest.raises(ValueError, match="'gpt2' is not supported; use one of llama, .* Another"):
        architecture.family(config)


def test_family_with_images_is_refused_with_what_helps():
    assert "not supported (it reads images too; save its language model alone" in architecture.unsupported("gemma3")
    assert not set(families.REASONS) & set(families.FAMILIES)


def test_parts_of_a_fused_matrix_are_members_of_their_own():
    config, shape = tiny_config("phi3"), BlockShape(4, 2, 96)
    found = [(member.linear, member.dim, member.start, member.width, member.size)
             for kind in architecture.KINDS for member in architecture.members(config, shape, kind)]  # fmt: skip
    assert found == [
        ("self_attn.qkv_proj", 0, 0, 32, 64),
        ("self_attn.qkv_proj", 0, 64, 16, 32),
        ("self_attn.qkv_proj", 0, 96, 16, 32),
        ("self_attn.o_proj", 1, 0, 32, 64),
        ("mlp.gate_up_proj", 0, 0, 1, 96),
        ("mlp.gate_up_proj", 0, 96, 1, 96),
        ("mlp.down_proj", 1, 0, 1, 96),
    ]
    assert architecture.linear_shape(config, shape, "self_attn.qkv_proj") == (128, 64)


def test_norms_over_all_heads_count_as_parameters_of_a_head():
    config, shape = tiny_config("olmo2"), BlockShape(4, 2, 96)
    weights = (32 + 16 + 16 + 32) * 64
    assert architecture.group_parameters(config, shape, "attention") == weights + 32 + 16


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 5}, 5),
        ("qwen3", {"sliding_window": 5}, None),
        ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}, 5),
        ("gemma3_text", {}, 8),
        ("phi3", {"sliding_window": 7}, 7),
    ],
)
def test_window_is_what_blocks_really_attend_within(family, changes, expected):
    config = tiny_config(family, **changes)
    assert architecture.window(config) == expected
    attentions = [block.self_attn for block in tiny_model(family, **changes).model.layers]
    if architecture.description(config).window == "typed":
        assert {attention.sliding_window for attention in attentions} - {None} == {expected} - {None}
