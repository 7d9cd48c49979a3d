import copy
import json
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from banks import logits, make_bank, mixed_bits, pruned, real_model
from conftest import FAMILIES, batches, tiny_config, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import architecture, checkpoint, storage
from pipeline.architecture import BlockShape
from pipeline.compress import layer_bank

MODULES = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: torch.nn.Linear}
FORMATS = [("nf4", False), ("fp4", True)]


def equal(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def saved(model, folder):
    model.save_pretrained(folder)
    return checkpoint.load_model(folder)


def tensors_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(params=FORMATS, ids=["nf4", "fp4-double"])
def mixed(request, tmp_path):
    """Config, tensors, bank and a model with linears at 4, 8 and 16 bits."""
    four_bit, double_quant = request.param
    config, state = pruned("qwen2")
    bank = make_bank(tmp_path, config, state, four_bit=four_bit, double_quant=double_quant)
    return config, state, bank, real_model(config, state, bank, mixed_bits(config))


# --- pruned models


@pytest.mark.parametrize(
    "family, dtype", [("llama", torch.float32), *((family, torch.bfloat16) for family in FAMILIES)]
)
def test_pruned_model_is_the_same_after_saving_and_loading(family, dtype, tmp_path):
    config, state = pruned(family, dtype)
    model = checkpoint.from_state(config, state)
    loaded = saved(model, tmp_path)
    assert type(loaded) is type(model)
    assert loaded.dtype == model.dtype == dtype
    assert loaded.config.model_type == f"pruned_{family}"
    assert loaded.config.block_shapes == config.block_shapes
    assert equal(state, loaded.state_dict())
    assert torch.equal(logits(model), logits(loaded))
    assert not loaded.training


def test_auto_classes_know_pruned_models(tmp_path):
    config, state = pruned("qwen3")
    checkpoint.from_state(config, state).save_pretrained(tmp_path)
    assert equal(state, AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    assert architecture.shapes(checkpoint.load_config(tmp_path)) == architecture.shapes(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_untied_head_survives_pruning_and_saving(family, tmp_path):
    model = tiny_model(family, tie_word_embeddings=False)
    config = checkpoint.pruned_config(model.config, architecture.shapes(model.config))
    loaded = saved(checkpoint.from_state(config, model.state_dict()), tmp_path)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_config_keeps_every_other_field(family):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    if family == "gemma3_text":  # by type of blocks
        rope = {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 700.0}}
    config = tiny_config(family, rope_parameters=rope, rms_norm_eps=1e-3)
    found = checkpoint.pruned_config(config, [BlockShape(2, 1, 9)] * 4)
    changed = {"model_type", "architectures", "block_shapes", "transformers_version"}
    before, after = config.to_dict(), found.to_dict()
    assert {key: after[key] for key in after.keys() - changed} == {key: before[key] for key in before.keys() - changed}
    assert after["block_shapes"] == [[2, 1, 9]] * 4
    again = checkpoint.pruned_config(found, [BlockShape(2, 1, 5)] * 4)
    assert (type(again), again.block_shapes) == (type(found), [[2, 1, 5]] * 4)


def test_one_blocks_config_does_not_change_the_models():
    config = checkpoint.pruned_config(tiny_config(), [BlockShape(2, 1, 9 + i) for i in range(4)])
    block = config.block(3)
    assert (block.num_attention_heads, block.num_key_value_heads, block.intermediate_size) == (2, 1, 12)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 96)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_block_follows_the_models_attention_implementation(family):
    model = checkpoint.from_state(*pruned(family))
    model.set_attn_implementation("eager")
    (part,) = batches(1)
    with torch.no_grad():
        found = model(input_ids=part.tokens, output_attentions=True).attentions
    assert [one.shape[1] for one in found] == [shape.heads for shape in architecture.shapes(model.config)]


def test_registering_again_changes_nothing():
    checkpoint.register_types()
    config, state = pruned()
    assert isinstance(checkpoint.from_state(config, state), checkpoint.PRUNED["llama"])


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_model_generates_the_same_with_a_cache(family):
    model = checkpoint.from_state(*pruned(family, torch.float32)).eval()
    (part,) = batches(1)  # 12 tokens, more than a window
    told = [model.generate(part.tokens, max_new_tokens=5, do_sample=False, use_cache=cached, eos_token_id=None)
            for cached in (True, False)]  # fmt: skip
    assert told[0].shape[1] == 17 and torch.equal(*told)


def test_copy_of_a_pruned_model_answers_the_same():
    model = checkpoint.from_state(*pruned("phi3"))
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


# --- mixed bits


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2"])
def test_mixed_model_of_each_family_is_the_same_after_saving_and_loading(family, tmp_path):
    config, state = pruned(family)
    model = real_model(config, state, make_bank(tmp_path, config, state, init="gaussian"), mixed_bits(config))
    before = logits(model)
    loaded = saved(model, tmp_path / "mixed")
    assert {type(loaded.get_submodule(name)) for name in mixed_bits(config)} == {*MODULES.values()}
    assert torch.equal(before, logits(loaded))
    dense = logits(checkpoint.from_state(config, state))
    assert 0 < (before - dense).norm() < 0.5 * dense.norm()


def test_each_linear_has_the_module_of_its_bits(mixed):
    config, _, _, model = mixed
    for name, bits in mixed_bits(config).items():
        module = model.get_submodule(name)
        assert type(module) is MODULES[bits]
        if bits == 8:
            assert module.state.threshold == 0  # no outlier columns kept in 16 bits
    assert type(model.lm_head) is torch.nn.Linear


def test_mixed_model_is_the_same_after_saving_and_loading(mixed, tmp_path):
    config, state, bank, model = mixed
    before = logits(model)
    loaded = saved(model, tmp_path / "mixed")
    for name, bits in mixed_bits(config).items():
        assert type(loaded.get_submodule(name)) is MODULES[bits]
    assert torch.equal(before, logits(loaded))
    assert loaded.config.quantization_config.linear_bits == {
        name: bits for name, bits in mixed_bits(config).items() if bits != 16
    }
    dense = logits(checkpoint.from_state(config, state))
    assert not torch.equal(before, dense)
    assert (before - dense).norm() < 0.5 * dense.norm()


def test_saved_mixed_model_holds_the_banks_own_codes(mixed, tmp_path):
    config, state, bank, model = mixed
    logits(model)
    model.save_pretrained(tmp_path / "mixed")
    expected = layer_bank.quantized(state, bank, mixed_bits(config))
    expected.pop("lm_head.weight")  # tied
    found = tensors_of(tmp_path / "mixed")
    assert set(found) == set(expected)
    # bitsandbytes packs shape and type anew, as JSON whose keys may stand in another order
    assert all(torch.equal(found[name], expected[name]) for name in found if "quant_state." not in name)


def test_saved_config_names_method_and_bits(mixed, tmp_path):
    config, _, bank, model = mixed
    model.save_pretrained(tmp_path / "mixed")
    found = json.loads((tmp_path / "mixed/config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "mixed_bits"
    assert (found["four_bit"], found["double_quant"]) == (bank.settings.four_bit, bank.settings.double_quant)
    assert found["linear_bits"]["model.layers.0.self_attn.q_proj"] == 4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_uniform_bits_are_the_same_after_saving_and_loading(bits, tmp_path):
    config, state = pruned()
    bank = make_bank(tmp_path, config, state)
    model = real_model(config, state, bank, dict.fromkeys(layer_bank.names_of(config), bits))
    before = logits(model)
    loaded = saved(model, tmp_path / "saved")
    assert {type(loaded.get_submodule(name)) for name in layer_bank.names_of(config)} == {MODULES[bits]}
    assert torch.equal(before, logits(loaded))


def test_building_a_mixed_model_leaves_the_shared_config_and_tensors_alone(tmp_path):
    config, state = pruned()
    bank = make_bank(tmp_path, config, state)
    before = {name: value.clone() for name, value in state.items()}
    logits(real_model(config, state, bank, mixed_bits(config)))
    assert getattr(config, "quantization_config", None) is None
    assert equal(before, state)


def test_four_bit_modules_keep_the_plain_cpu_layout(mixed, tmp_path):
    model = mixed[3]
    for one in (model, saved(model, tmp_path / "mixed")):
        before = {name: module.weight.shape for name, module in one.named_modules() if isinstance(module, MODULES[4])}
        assert len(before) == 10
        logits(one.eval())
        for name, shape in before.items():
            assert one.get_submodule(name).support_avx512bf16_for_cpu is False
            assert one.get_submodule(name).weight.shape == shape


def adapted(model):
    torch.manual_seed(0)
    names = architecture.target_modules(model.config)
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return found


def lora_gradients(model):
    (part,) = batches(1)
    model.train()
    model.zero_grad()
    model(input_ids=part.tokens, labels=part.tokens).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(6, 64), (8, 48), (8, 80), (5, 100), (3, 50), (7,)])
def test_four_bits_are_decoded_block_by_block_whatever_the_rows(kind, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, state = bnb.functional.quantize_4bit(weight, quant_type=kind, blocksize=64)
    halves = torch.stack((stored.flatten() >> 4, stored.flatten() & 15), 1).flatten()[: weight.numel()]
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    by_hand = (state.code[halves.long()] * scales).reshape(shape)
    torch.testing.assert_close(bnb.functional.dequantize_4bit(stored, state), by_hand)


def test_adapters_have_the_same_gradients_after_an_evaluation(mixed):
    # On processors with AVX512-BF16 bitsandbytes repacks 4-bit weights in evaluation, and gradients went wrong.
    model = adapted(mixed[3])
    before = lora_gradients(model)
    logits(model.eval())
    after = lora_gradients(model)
    assert len(before) == 2 * 28
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    assert equal(before, after)


def test_gradients_of_adapters_on_four_bits_are_those_on_the_dequantized_model(tmp_path):
    config, state = pruned()
    bank = make_bank(tmp_path, config, state)
    bits_of = dict.fromkeys(layer_bank.names_of(config), 4)
    real = adapted(real_model(config, state, bank, bits_of))
    logits(real.eval())
    simulated = adapted(checkpoint.from_state(config, layer_bank.simulated(state, bank, bits_of)))
    expected = lora_gradients(simulated)
    for name, gradient in lora_gradients(real).items():
        assert (gradient - expected[name]).norm() <= 0.1 * expected[name].norm()


def test_final_model_loads_with_its_adapter(mixed, tmp_path):
    base, folder = mixed[3], tmp_path / "final"
    base.save_pretrained(folder)
    without = logits(base)
    model = adapted(base).eval()
    model.save_pretrained(folder / checkpoint.ADAPTER)
    loaded = checkpoint.load_final(folder)
    assert not loaded.training
    assert torch.equal(logits(model), logits(loaded))
    assert not torch.equal(without, logits(loaded))
    with loaded.disable_adapter():
        assert torch.equal(without, logits(loaded))


def test_tokenizer_pads_on_the_right_with_a_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    loaded = checkpoint.load_tokenizer(tmp_path)
    assert (loaded.pad_token_id, loaded.padding_side) == (loaded.eos_token_id, "right")
    assert loaded.encode("A tree.") == tokenizer.encode("A tree.")


# --- folders with checksums


@pytest.fixture
def folder(tmp_path):
    with storage.writing(tmp_path / "artifacts/pruned") as inside:
        (inside / "weights.bin").write_bytes(bytes(range(256)) * 40_000)  # more than one chunk
        (inside / "adapter").mkdir()
        (inside / "adapter/config.json").write_text("{}")
    return tmp_path / "artifacts/pruned"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_checksums_are_the_files_sha256(folder):
    # of b"{}", by sha256sum
    known = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    sums = json.loads((folder / storage.CHECKSUMS).read_text())
    assert set(sums) == {"weights.bin", "adapter/config.json"}
    assert sums["adapter/config.json"] == known
    assert storage.sha256(folder / "weights.bin") == sums["weights.bin"] != known


def test_verify_names_the_content(folder, tmp_path):
    name = storage.verify(folder, "prune")
    assert len(name) == 12 and int(name, 16) >= 0
    assert storage.verify(folder, "prune") == name
    with storage.writing(tmp_path / "other") as inside:
        for path, content in contents(folder).items():
            (inside / path).parent.mkdir(exist_ok=True)
            (inside / path).write_bytes(content)
        (inside / storage.CHECKSUMS).unlink()
    assert storage.verify(tmp_path / "other", "prune") == name
    flip(folder / "weights.bin")
    sums = {path: storage.sha256(folder / path) for path in ("weights.bin", "adapter/config.json")}
    (folder / storage.CHECKSUMS).write_text(json.dumps(sums))
    assert storage.verify(folder, "prune") != name


@pytest.mark.parametrize("file", ["weights.bin", "adapter/config.json", storage.CHECKSUMS])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (halve, "does not match|never finished|truncated or edited"),
        (flip, "does not match|never finished|truncated or edited"),
        (Path.unlink, "is missing"),
    ],
)
def test_changed_checkpoint_is_refused_with_its_stage(folder, file, harm, message):
    harm(folder / file)
    with pytest.raises(storage.CheckpointError, match=message) as error:
        storage.verify(folder, "prune")
    assert str(folder) in str(error.value)
    assert "dvc repro --force --single-item prune" in str(error.value)


def test_missing_checkpoint_is_refused_with_its_stage(tmp_path):
    with pytest.raises(storage.CheckpointError, match="bank is missing .* --single-item quantize"):
        storage.verify(tmp_path / "bank", "quantize")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_writing_leaves_the_old_folder_and_nothing_else(folder, error):
    before = contents(folder)
    with pytest.raises(error), storage.writing(folder) as inside:
        (inside / "weights.bin").write_text("half")
        raise error
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]
    storage.verify(folder, "prune")


def test_failed_first_writing_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), storage.writing(tmp_path / "new") as inside:
        (inside / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_writing_replaces_the_whole_folder_only_at_the_end(folder):
    before = contents(folder)
    with storage.writing(folder) as inside:
        (inside / "only.txt").write_text("new")
        assert inside.parent == folder.parent  # the same file system, so that the move is one step
        assert contents(folder) == before
    assert set(contents(folder)) == {"only.txt", storage.CHECKSUMS}
    assert list(folder.parent.iterdir()) == [folder]
    storage.verify(folder, "prune")


def test_written_folder_is_readable_by_others(folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    files = {"weights.bin": 0o644, "config.json": 0o644, storage.CHECKSUMS: 0o644}
    assert modes == files | {"pruned": 0o755, "adapter": 0o755}


def test_old_folder_survives_when_the_new_one_cannot_take_its_place(folder, monkeypatch):
    before = contents(folder)

    def refuse(path, target, move=Path.rename):
        if path.name.startswith(".") and Path(target) == folder:
            monkeypatch.undo()
            raise OSError("stale file handle")
        return move(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(storage.DiskError, match="stale file handle"), storage.writing(folder) as inside:
        (inside / "only.txt").write_text("new")
    assert contents(folder) == before


def test_write_text_creates_and_replaces(tmp_path):
    path = tmp_path / "reports/deep/text.json"
    for text in ("first, longer than the second", "zweitens ü"):
        storage.write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]
