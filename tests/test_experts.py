"""Models with experts: what they have of their own. What all families share, the other files test for them too."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
import transformers
from banks import make_bank, mixed_bits, real_model
from banks import settings as bank_settings
from conftest import batches, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from pipeline import architecture, checkpoint, checks, fits
from pipeline.architecture import BlockShape
from pipeline.checkpoint import configs, weights
from pipeline.checkpoint.experts import routes
from pipeline.checkpoint.headers import WeightsError
from pipeline.compress import bank_writer, importance, layer_bank, linear_grams, prune, saliency
from pipeline.compress.structures import PruneError, Settings, Span
from pipeline.data.alpaca import IGNORED, Batch, Example
from pipeline.errors import UserError
from pipeline.export import limits
from pipeline.params import ParamsError
from pipeline.trial import even, fused, loss, memory, recover, traced, training
from pipeline.trial.recover import Rows
from pipeline.trial.setting import Setting

FAMILY = "qwen3_moe"
PRUNING = Settings(
    ratio=0.2, importance="taylor1", level="parameter", aggregate="sum", scope="global", shapes="free",
    structures=("attention", "mlp"), multiple_of=8, attention_blocks=Span(), mlp_blocks=Span(), noise=0.0, steps=1,
    compensate=False,
)  # fmt: skip


def saved(folder, **changes):
    """Save transformers' own random model, as models are published; return it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(FAMILY, **changes), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.save_pretrained(folder)
    return model.float().eval()


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 6},
        {"num_experts": 40},  # more than the choices of all tokens: some read nothing
        {"attention_bias": True},
        {"sliding_window": 5, "use_sliding_window": True},
        {"output_router_logits": True},
    ],
)
def test_base_model_answers_as_transformers_own(changes, implementation, tmp_path):
    own = saved(tmp_path, **changes)
    own.set_experts_implementation(implementation)
    model = checkpoint.load_base(tmp_path, dtype=torch.float32)
    assert type(model) is checkpoint.PRUNED[FAMILY] and type(own) is transformers.Qwen3MoeForCausalLM
    for tokens in (batches(1)[0].tokens, torch.tensor([[5]])):
        with torch.no_grad():
            expected, found = own(input_ids=tokens).logits, model(input_ids=tokens).logits
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_gradients_are_those_of_transformers_own(tmp_path):
    own, part = saved(tmp_path), batches(1, rows=8, length=24)[0]  # enough that each expert reads some
    model = checkpoint.load_base(tmp_path, dtype=torch.float32)
    for one in (own, model):
        one(input_ids=part.tokens, labels=part.labels).loss.backward()
    experts, fused_experts = (one.model.layers[1].mlp.experts for one in (model, own))
    for index, expert in enumerate(experts):
        both = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
        torch.testing.assert_close(both, fused_experts.gate_up_proj.grad[index], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(
            expert.down_proj.weight.grad, fused_experts.down_proj.grad[index], atol=1e-6, rtol=1e-4
        )
    router = model.model.layers[1].mlp.gate.weight.grad
    torch.testing.assert_close(router, own.model.layers[1].mlp.gate.weight.grad, atol=1e-6, rtol=1e-4)
    assert router.abs().max() > 1e-5


def test_saved_model_loads_into_transformers_own_class(tmp_path):
    model = tiny_model(FAMILY)
    model.save_pretrained(tmp_path)
    tiny_config(FAMILY).save_pretrained(tmp_path)
    own, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), batches(1)[0].tokens
    assert type(own) is transformers.Qwen3MoeForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(own(tokens).logits, model(tokens).logits, atol=2e-6, rtol=1e-5)


def test_fetched_weights_are_compared_with_experts_by_their_stored_names(tmp_path):
    own = saved(tmp_path)
    config = configs.read_config(tmp_path)
    found = weights.check(tmp_path, config)
    assert found.parameters == sum(parameter.numel() for parameter in own.parameters())
    assert found.parameters == architecture.parameters(config) == architecture.parameters(fits.read(tmp_path))
    changed = json.loads((tmp_path / "config.json").read_text()) | {"num_local_experts": 7}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(WeightsError, match=r"lack model\.layers\.0\.mlp\.experts\.6\.gate_proj\.weight"):
        weights.check(tmp_path, configs.read_config(tmp_path))


def test_routes_hold_each_choice_once():
    chosen = torch.tensor([[2, 0], [0, 3], [3, 2], [0, 2]])
    found = {expert: list(zip(tokens.tolist(), places.tolist(), strict=True))
             for expert, tokens, places in routes(chosen, 5)}  # fmt: skip
    assert found == {0: [(0, 1), (1, 0), (3, 0)], 2: [(0, 0), (2, 1), (3, 1)], 3: [(1, 1), (2, 0)]}


def test_experts_share_tokens_evenly_where_there_is_no_data():
    chosen = torch.empty(7, 2, dtype=torch.long, device="meta")
    assert [len(tokens) for _, tokens, _ in routes(chosen, 4)] == architecture.evenly(14, 4) == [4, 4, 3, 3]


def test_units_hold_the_linears_of_all_experts():
    config = tiny_config(FAMILY, num_experts=3)
    group = {unit.name: unit.linears for unit in architecture.units(config, "group")}
    at = "model.layers.2.mlp.experts"
    assert len(group) == 4 * 4
    assert group["2.gate_up"] == tuple(f"{at}.{i}.{name}_proj" for i in range(3) for name in ("gate", "up"))
    assert group["2.down"] == tuple(f"{at}.{i}.down_proj" for i in range(3))
    linear = {unit.name: unit.linears for unit in architecture.units(config, "linear")}
    assert len(linear) == 4 * 7 and linear["2.up_proj"] == tuple(f"{at}.{i}.up_proj" for i in range(3))
    together = layer_bank.groups_of(config)  # what reads the same inputs
    assert len(together) == 4 * (2 + 2 * 3) and (f"{at}.1.gate_proj", f"{at}.1.up_proj") in together


# --- pruning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["surgeon", "activation", "fisher_mask"])
def test_whole_model_needs_no_scores(importance):
    model = tiny_model(FAMILY)
    found = prune.run(model, batches(), replace(PRUNING, ratio=0.0, importance=importance, compensate=True), 0)
    assert found.ratio == 0 and architecture.shapes(found.config) == architecture.shapes(tiny_config(FAMILY))
    smaller, tokens = checkpoint.from_state(found.config, found.state), batches(1)[0].tokens
    with torch.no_grad():
        assert torch.equal(smaller(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"importance": "surgeon"}, r"prune\.importance: surgeon"),
        ({"importance": "fisher_mask"}, r"prune\.importance: fisher_mask"),
        ({"compensate": True}, r"prune\.compensate: true"),
    ],
)
def test_pruning_by_what_experts_receive_is_refused(changes, told):
    chosen = replace(PRUNING, **changes)
    with pytest.raises(PruneError, match=told + r" cannot be had of a model with experts.*prune\.ratios to \[0\]"):
        prune.run(tiny_model(FAMILY), batches(), chosen, 0)


def test_pruning_by_what_experts_receive_is_refused_before_anything_runs(raw_params, tmp_path):
    tiny_config(FAMILY).save_pretrained(tmp_path)
    raw_params["model"]["source"] = f"path:{tmp_path}"
    raw_params["quantize"]["r"] = 4
    raw_params["export"]["formats"] = ["hf"]
    checks.parse(raw_params)  # taylor1
    raw_params["prune"] |= {"importance": "surgeon", "compensate": True}
    with pytest.raises(ParamsError, match=r"prune\.importance: surgeon cannot be had of a model with experts"):
        checks.parse(raw_params)
    raw_params["prune"]["ratios"] = [0]
    checks.parse(raw_params)
    raw_params["export"]["formats"] = ["gguf"]
    with pytest.raises(ParamsError, match="none has experts; take"):
        checks.parse(raw_params)


@pytest.mark.parametrize("level", ["parameter", "vector"])
def test_order_of_an_experts_channels_is_that_of_their_scores_and_changes_no_answer(level):
    model, tokens = tiny_model(FAMILY), batches(1)[0].tokens
    with torch.no_grad():
        before = model(tokens).logits
    scores = saliency.weight_scores(model, {}, {}, "magnitude")
    saliency.order_experts(model, scores, level)
    for name, score in scores.items():  # permuted with the weights
        assert torch.equal(score, model.get_submodule(name).weight)
    for expert in model.model.layers[3].mlp.experts:
        rows = [expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight.T]
        values = sum(one.abs().sum(1) if level == "parameter" else one.sum(1).abs() for one in rows)
        assert torch.all(values[:-1] >= values[1:])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, before, atol=2e-6, rtol=1e-5)


def test_each_expert_loses_its_own_least_channels():
    model, least = tiny_model(FAMILY), {}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, expert in enumerate(model.model.layers[1].mlp.experts):
            least[index] = torch.randperm(96, generator=generator)[:32]  # other channels in each
            for linear, dim in ((expert.gate_proj, 0), (expert.up_proj, 0), (expert.down_proj, 1)):
                linear.weight.index_fill_(dim, least[index], 0)
    tokens = batches(1)[0].tokens
    with torch.no_grad():
        expected = model(tokens).logits
    chosen = replace(PRUNING, importance="magnitude", structures=("mlp",), mlp_blocks=Span(1, 1), multiple_of=1)
    cost = architecture.group_parameters(model.config, architecture.shapes(model.config)[1], "mlp")
    found = prune.run(model, [], replace(chosen, ratio=32 * cost / architecture.parameters(model.config)), 0)
    assert [shape.channels for shape in architecture.shapes(found.config)] == [96, 64, 96, 96]
    with torch.no_grad():
        answers = checkpoint.from_state(found.config, found.state)(tokens).logits
    torch.testing.assert_close(answers, expected, atol=2e-6, rtol=1e-5)


def test_gradients_of_experts_that_read_nothing_are_zero():
    model, part = tiny_model(FAMILY, num_experts=40), batches(1, rows=1, length=6)[0]
    first, second = saliency.gradients(model, [part], "taylor_mix")
    assert set(first) == set(second) == set(architecture.linears(model.config))
    silent = [name for name, value in first.items() if not value.any()]
    assert silent and all(".experts." in name for name in silent) and len(silent) < len(first)


@pytest.mark.parametrize("importance", ["taylor1", "taylor2", "magnitude", "random"])
def test_ratio_is_met_by_each_measure_that_experts_have(importance):
    model = tiny_model(FAMILY)
    found = prune.run(model, batches(), replace(PRUNING, importance=importance), 0)
    assert found.ratio == pytest.approx(0.2, abs=0.01)


# --- quantization ------------------------------------------------------------------------------------------------


def received(model, parts):
    """Gram matrices of what the experts of block 1 receive, by the router's own choices, and their tokens."""
    block, grams, tokens = model.model.layers[1], {}, {}
    for part in parts:
        real, routed = (part.labels != IGNORED).flatten(), []
        real[:: part.labels.shape[1]] = True  # each row's first token is never a label
        handle = block.mlp.gate.register_forward_hook(
            lambda _, given, out, routed=routed: routed.extend([given[0], out[2]])
        )
        with torch.no_grad():
            model(input_ids=part.tokens)
            handle.remove()
            hidden, chosen = routed
            for index, expert in enumerate(block.mlp.experts):
                x = hidden[real & (chosen == index).any(1)]
                inner = nn.functional.silu(expert.gate_proj(x)) * expert.up_proj(x)
                tokens[index] = tokens.get(index, 0) + len(x)
                for name, rows in (("gate_proj", x), ("up_proj", x), ("down_proj", inner)):
                    key = f"model.layers.1.mlp.experts.{index}.{name}"
                    grams[key] = grams.get(key, 0) + rows.T @ rows
    total = linear_grams.count_tokens(parts)
    return {name: gram / total for name, gram in grams.items()}, tokens


def test_gram_matrices_are_those_of_the_tokens_that_an_expert_reads():
    model, parts = tiny_model(FAMILY), batches(12, rows=4, length=16)
    labels = parts[0].labels.clone()
    labels[:, 7:] = IGNORED
    parts[0] = Batch(parts[0].tokens, labels)
    expected, tokens = received(model, parts)
    blocks = list(linear_grams.collect(model, parts))
    assert [name for block in blocks for name in block] == list(architecture.linears(model.config))
    found, enough = blocks[1], 0
    for name, gram in expected.items():
        expert = int(name.split(".")[5])
        if tokens[expert] < 2 * len(gram):
            assert found[name] is None
        else:
            enough += 1
            torch.testing.assert_close(found[name], gram, rtol=1e-4, atol=1e-5)
    assert len(expected) > enough > len(expected) / 3
    assert sum(tokens.values()) == 2 * linear_grams.count_tokens(parts)


def test_experts_that_read_too_little_are_rounded_to_the_nearest_and_counted(tmp_path, capsys):
    model, parts = tiny_model(FAMILY), batches(4, rows=4, length=16)  # 256 tokens, each read by 2 experts of 6
    config, state = model.config, model.state_dict()
    grams, tokens = list(linear_grams.collect(model, parts)), linear_grams.count_tokens(parts)
    unread = sum(value is None for block in grams for value in block.values())
    assert 0 < unread < len(layer_bank.names_of(config))
    chosen = bank_settings(method="calibrated", init="gaussian")
    counted = bank_writer.write(state, layer_bank.groups_of(config), chosen, 0, tmp_path, grams=grams, tokens=tokens)
    assert counted == unread and f"{unread} linears are rounded to the nearest" in capsys.readouterr().out
    bank, nearest = layer_bank.Bank(tmp_path), tmp_path / "nearest"
    nearest.mkdir()
    nearest = make_bank(nearest, config, state, init="gaussian")
    for block in grams:
        for name, gram in block.items():
            same = torch.equal(bank.codes(name, 4)["weight"], nearest.codes(name, 4)["weight"])
            assert same == (gram is None)


def test_router_is_never_quantized(tmp_path):
    model = tiny_model(FAMILY, torch.bfloat16)
    config, state = model.config, model.state_dict()
    bank = make_bank(tmp_path, config, state, init="gaussian")
    real = real_model(config, state, bank, mixed_bits(config))
    for index in range(4):
        name = f"model.layers.{index}.mlp.gate.weight"
        assert torch.equal(real.get_parameter(name), state[name]) and real.get_parameter(name).dtype == torch.bfloat16


# --- recovery ----------------------------------------------------------------------------------------------------


def adapted(**changes):
    model = tiny_model(FAMILY, **changes)
    names = architecture.target_modules(model.config)
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))


def trained(model, rows, steps):
    settings = training.Settings(
        target="answers", answers_weight=0.0, positions="response", train="lora", steps=steps, batch_size=2,
        micro_batch_size=1, max_length=16, learning_rate=0.01, warmup_steps=0, dropout=0.0, validate_every=2,
        patience=0, save_every=0,
    )  # fmt: skip
    return recover.run(model, Rows(rows, rows, 0), settings, 0)


ROWS = [Example(tuple(range(5 + i, 11 + i)), 1) for i in range(2)]


def test_recovery_goes_on_where_experts_read_nothing():
    model = adapted(num_experts=40)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    result = trained(model, ROWS, 10)
    assert result.losses[-1] < 0.8 * result.losses[0]
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name for name in moved)
    still = {name for name, weight in before.items() if "lora_B" in name} - moved
    assert still and all(".experts." in name for name in still)


def test_fused_adapters_pass_experts_that_read_nothing():
    model, part = adapted(num_experts=40).eval(), batches(1, rows=1, length=6)[0]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.05)

    def gradients(value):
        model.zero_grad()
        value.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients(loss.response_loss(model, part)[0])
    with fused.used(model):
        found = gradients(loss.response_loss(model, part)[0])
    assert found.keys() == expected.keys()
    assert any(".experts." in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3)


def test_whole_chain_at_ratio_zero(tmp_path):
    text, model = batches(16, rows=4, length=16), tiny_model(FAMILY, num_experts=4)
    pruned = prune.run(model, text, replace(PRUNING, ratio=0.0, importance="surgeon", compensate=True), 0)
    smaller = checkpoint.from_state(pruned.config, pruned.state)
    groups = layer_bank.groups_of(pruned.config)
    with torch.no_grad():
        expected = smaller(input_ids=text[0].tokens).logits.log_softmax(-1)
    apart = {}
    for method, init in (("nearest", "loftq"), ("calibrated", "weighted")):
        folder = tmp_path / method
        folder.mkdir()
        chosen, tokens = bank_settings(method=method, init=init), linear_grams.count_tokens(text)
        grams = linear_grams.collect(smaller, text)
        bank_writer.write(smaller.state_dict(), groups, chosen, 0, folder, grams=grams, tokens=tokens)
        bank = layer_bank.Bank(folder)
        state = layer_bank.simulated(smaller.state_dict(), bank, dict.fromkeys(layer_bank.names_of(pruned.config), 4))
        with torch.no_grad():
            found = checkpoint.from_state(pruned.config, state)(input_ids=text[0].tokens).logits.log_softmax(-1)
        apart[method] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert 0 < apart["calibrated"] < apart["nearest"] < 1
    units = architecture.units(pruned.config, "group")
    priors = importance.run(smaller, text, units, importance.Settings(clusters=4, outcomes=4), bank, 0)
    assert len(priors.units) == 16 and all(math.isfinite(value) for value in priors.sensitivity)
    by_name = dict(zip(priors.units, priors.sensitivity, strict=True))
    assert any(by_name[f"{block}.gate_up"] for block in range(4))


# --- memory ------------------------------------------------------------------------------------------------------


SETTING = Setting(tokens=192, rows=3, r=4, double_quant=False, inference_tokens=96, inference_rows=2)


@pytest.mark.parametrize(
    "changes",
    [{"fast": True}, {"gradient_checkpointing": True}, {"full": True}, {"tokens": 4, "rows": 2}],  # 8 choices among 9
)
def test_prediction_equals_a_trace_of_the_whole_under_any_setting(changes):
    shapes = [BlockShape(4, 2, 96), BlockShape(2, 1, 50), BlockShape(4, 2, 96)]
    config = checkpoint.pruned_config(tiny_config(FAMILY, num_hidden_layers=3, num_experts=9), shapes)
    generator, setting = random.Random(1), replace(SETTING, **changes)
    widths = {name: generator.choice((4, 8)) for name in architecture.linears(config)}
    found = memory.predict(config, widths, setting)
    peaks = [step(traced.model_of(config, widths, setting), setting)[1] for step in (traced.training, traced.inference)]
    assert [found.training, found.inference] == peaks


def test_prediction_of_eight_bits_adds_the_inputs_that_experts_read():
    config, setting = checkpoint.buildable(tiny_config(FAMILY)), SETTING
    widths = dict.fromkeys(architecture.linears(config), 4)
    names = [f"model.layers.1.mlp.experts.{index}.down_proj" for index in range(6)]
    less, more = (memory.predict(config, widths | dict.fromkeys(names, bits), setting) for bits in (4, 8))
    stored = 6 * ((64 * 96 + 64 * 4) - (64 * 96 // 2 + 64 * 96 // 64 * 4 + 64))
    assert more.training - less.training == stored + 2 * (192 * 2) * 96


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"mlp_only_layers": [1]}, "some blocks have an MLP in place of experts"),
        ({"decoder_sparse_step": 2}, "some blocks have an MLP in place of experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is more than the 6 experts"),
    ],
)
def test_blocks_that_are_not_alike_are_refused_with_the_reason(changes, told, tmp_path):
    config = tiny_config(FAMILY, **changes)
    config.save_pretrained(tmp_path)
    assert told in fits.unusable(fits.read(tmp_path))
    with pytest.raises(WeightsError, match=told):
        configs.read_config(tmp_path)
    with pytest.raises(UserError, match=told):
        even.config_of(config.to_dict(), "a plan")


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_counts_that_are_none_are_refused(value, tmp_path):
    tiny_config(FAMILY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": value}))
    assert "num_local_experts" in fits.unusable(fits.read(tmp_path))
    with pytest.raises(WeightsError, match="num_local_experts"):
        configs.read_config(tmp_path)


def test_published_names_of_fields_are_read(tmp_path):
    tiny_config(FAMILY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["num_experts"] = values.pop("num_local_experts")  # as in Qwen3-30B-A3B's own
    path.write_text(json.dumps(values))
    assert architecture.experts(fits.read(tmp_path)) == architecture.experts(configs.read_config(tmp_path)) == 6


def test_gguf_is_refused_with_the_reason():
    assert "none has experts; take [hf]" in limits.gguf(tiny_config(FAMILY))
