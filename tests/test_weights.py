"""Weights that hold a model are taken as they are, under whatever names wrappers gave them."""

import json

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from pipeline import checkpoint
from pipeline.checkpoint import configs, weights
from pipeline.checkpoint.headers import INDEX, WHOLE


def saved(folder, family="llama", rename=lambda name: name, **changes):
    """Save a tiny model under other names; return its tensors."""
    model = tiny_model(family, torch.bfloat16, **changes)
    model.save_pretrained(folder)
    save_file({rename(name): tensor for name, tensor in load_file(folder / WHOLE).items()}, folder / WHOLE)
    return model.state_dict()


def split(folder, names=lambda name: name):
    """Divide a folder's weights into two files with an index."""
    state = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    places = {}
    for part in range(2):
        held = {names(name): tensor for name, tensor in list(state.items())[part::2]}
        save_file(held, folder / f"model-{part + 1}.safetensors")
        places |= dict.fromkeys(held, f"model-{part + 1}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def copied(source, target):
    """Check a folder, copy it with its config, and load the copy."""
    target.mkdir()
    checked = weights.check(source, configs.read_config(source))
    weights.copy(checked, target)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return checked, checkpoint.load_model(target).state_dict()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.2.", "layers.2._orig_mod."),
        lambda name: f"module.{name}" if "layers.1" in name else name,
    ],
    ids=["compiled", "parallel", "peft", "both", "one_block_compiled", "a_part"],
)
def test_what_wrappers_put_before_names_is_taken_off(rename, tmp_path, capsys):
    expected = saved(tmp_path / "model", rename=rename)
    checked, found = copied(tmp_path / "model", tmp_path / "copy")
    assert checked.renamed
    assert_equal(found, expected)
    assert set(load_file(tmp_path / "copy" / WHOLE)) == set(expected) - {"lm_head.weight"}
    assert "the weights are named as in" in capsys.readouterr().out


def test_shards_are_renamed_with_their_index(tmp_path):
    expected = saved(tmp_path / "model")
    split(tmp_path / "model", lambda name: f"module.{name}")
    _, found = copied(tmp_path / "model", tmp_path / "copy")
    assert_equal(found, expected)
    assert set(json.loads((tmp_path / "copy" / INDEX).read_text())["weight_map"]) == set(expected) - {"lm_head.weight"}


def test_shards_are_copied_as_they_are(tmp_path):
    expected = saved(tmp_path / "model")
    split(tmp_path / "model")
    checked, found = copied(tmp_path / "model", tmp_path / "copy")
    assert not checked.renamed
    assert_equal(found, expected)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert json.loads((tmp_path / "copy" / INDEX).read_text())["weight_map"] == index["weight_map"]


def test_stale_index_beside_a_whole_file_is_left_out_and_told(tmp_path, capsys):
    expected = saved(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00009.safetensors"}}))
    _, found = copied(tmp_path / "model", tmp_path / "copy")
    assert_equal(found, expected)
    assert not (tmp_path / "copy" / INDEX).exists()
    assert f"{INDEX} is not used" in capsys.readouterr().out


def test_model_saved_without_its_head_is_taken(tmp_path):
    expected = saved(tmp_path / "model")
    AutoModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "bare")
    assert "embed_tokens.weight" in load_file(tmp_path / "bare" / WHOLE)
    _, found = copied(tmp_path / "bare", tmp_path / "copy")
    assert_equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_passes_with_its_number_of_parameters(family, tied, tmp_path):
    saved(tmp_path / "model", family, tie_word_embeddings=tied)
    model = tiny_model(family, tie_word_embeddings=tied)
    checked = weights.check(tmp_path / "model", configs.read_config(tmp_path / "model"))
    assert checked.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_head_that_is_stored_too_passes(tmp_path):
    saved(tmp_path / "model")
    state = load_file(tmp_path / "model" / WHOLE)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model" / WHOLE)
    _, found = copied(tmp_path / "model", tmp_path / "copy")
    assert torch.equal(found["lm_head.weight"], state["model.embed_tokens.weight"])


def test_rotary_frequencies_of_old_checkpoints_pass(tmp_path):
    expected = saved(tmp_path / "model")
    state = load_file(tmp_path / "model" / WHOLE)
    state |= {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": torch.ones(8) for block in range(4)}
    save_file(state, tmp_path / "model" / WHOLE)
    _, found = copied(tmp_path / "model", tmp_path / "copy")
    assert_equal(found, expected)


def test_rows_of_zeros_and_biases_of_zeros_pass(tmp_path):
    saved(tmp_path / "model", "qwen2")
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model" / WHOLE).items()}
    for name, tensor in state.items():
        if name.endswith("up_proj.weight"):
            tensor[:60] = 0  # a pruned model that was padded
        if name.endswith(".bias"):
            tensor.zero_()
    save_file(state, tmp_path / "model" / WHOLE)
    _, found = copied(tmp_path / "model", tmp_path / "copy")
    assert not found["model.layers.0.mlp.up_proj.weight"][:60].any()


def test_a_pruned_checkpoint_passes(tmp_path):
    from banks import pruned

    config, state = pruned("qwen2")
    checkpoint.from_state(config, state).save_pretrained(tmp_path / "model")
    _, found = copied(tmp_path / "model", tmp_path / "copy")
    assert_equal(found, dict(state))
