"""Models that are damaged, incomplete or not what they say: one error each, which names the file and what to do."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import tiny_model
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file

from pipeline.data import models
from pipeline.data.fetch import BASE, FetchError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"


def config(**changes):
    def change(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | changes))

    return change


def without(*keys):
    def change(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if key not in keys}))

    return change


def weights(edit):
    """Load all tensors, edit the dictionary, save it again."""

    def change(folder):
        state = load_file(folder / WEIGHTS)
        state = edit(state) or state
        save_file(state, folder / WEIGHTS)

    return change


def value(name, at, number):
    def edit(state):
        state[name] = state[name].clone()
        state[name].view(-1)[at] = number

    return weights(edit)


def filled(name, number):
    return weights(lambda state: state.update({name: torch.full_like(state[name], number)}))


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, share):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def header(edit):
    """Edit the header of the weights and leave their bytes."""

    def change(folder):
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        values = json.loads(content[8 : 8 + length])
        edit(values)
        new = json.dumps(values).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])

    return change


def sharded(folder, weight_map):
    """Name the weights as a shard, with an index of this content."""
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps(weight_map))


def index(weight_map):
    return lambda folder: sharded(folder, weight_map)


def tokenizer(edit, name="tokenizer.json"):
    def change(folder):
        values = json.loads((folder / name).read_text())
        edit(values)
        (folder / name).write_text(json.dumps(values))

    return change


def extra_token(values):
    values["added_tokens"].append(
        {"id": 512, "content": "<pad>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
    )


def taken(*names):
    return weights(lambda state: [state.pop(name) for name in names] and None)


def blocks(count):
    def edit(state):
        for name in list(state):
            if name.startswith("model.layers.3."):
                state.pop(name) if count < 4 else state.update({name.replace(".3.", ".4."): state[name].clone()})

    return weights(edit)


DEEP = "[" * 100_000 + "]" * 100_000
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 300000\n"
SHARD = "model-00001-of-00001.safetensors"

CASES = {
    # config.json
    "config is missing": (remove(CONFIG), ["config.json is missing", "download"]),
    "config is empty": (write(CONFIG, ""), ["config.json is no JSON"]),
    "config is cut off": (cut(CONFIG, 0.5), ["config.json is no JSON"]),
    "config is a list": (write(CONFIG, "[]"), ["config.json is no JSON object"]),
    "config is binary": (write(CONFIG, b"\xff\x00\x81"), ["config.json is no JSON"]),
    "config is nested deep": (write(CONFIG, DEEP), ["config.json is nested too deep"]),
    "config has a number of 5,000 digits": (write(CONFIG, '{"a": ' + "9" * 5000 + "}"), ["config.json is no JSON"]),
    "no model type": (without("model_type"), ["config.json: model_type is None"]),
    "model type is a number": (config(model_type=3), ["config.json: model_type is 3"]),
    "unknown family": (config(model_type="gpt2"), ["config.json: model family 'gpt2'", "llama"]),
    "a billion layers": (config(num_hidden_layers=10**9), ["num_hidden_layers is 1000000000", "1 to 1,000"]),
    "no layers": (config(num_hidden_layers=0), ["num_hidden_layers is 0"]),
    "negative layers": (config(num_hidden_layers=-4), ["num_hidden_layers is -4"]),
    "layers as a text": (config(num_hidden_layers="4"), ["num_hidden_layers is 4, not a whole number"]),
    "layers as true": (config(num_hidden_layers=True), ["num_hidden_layers is True"]),
    "layers as a fraction": (config(num_hidden_layers=4.5), ["num_hidden_layers is 4.5"]),
    "layers are missing": (without("num_hidden_layers"), ["num_hidden_layers is missing"]),
    "layers are null": (config(num_hidden_layers=None), ["num_hidden_layers is None"]),
    "hidden size is missing": (without("hidden_size"), ["hidden_size is missing"]),
    "hidden size of nothing": (config(hidden_size=0), ["hidden_size is 0"]),
    "hidden size beyond any model": (config(hidden_size=10**15), ["hidden_size is 1000000000000000"]),
    "vocabulary beyond any model": (config(vocab_size=10**12), ["vocab_size"]),
    "no positions": (config(max_position_embeddings=0), ["max_position_embeddings is 0"]),
    "no heads": (config(num_attention_heads=0), ["num_attention_heads is 0"]),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=None), ["is no multiple of"]),
    "key heads that do not divide": (config(num_key_value_heads=3), ["no multiple of num_key_value_heads 3"]),
    "odd head": (config(head_dim=15), ["head's size 15 is odd"]),
    "head beyond any model": (config(head_dim=10**7), ["head_dim is 10000000"]),
    "unknown activation": (config(hidden_act="sparkle"), ["hidden_act 'sparkle'"]),
    "activation is a number": (config(hidden_act=7), ["hidden_act 7"]),
    "unknown rope type": (config(rope_parameters={"rope_type": "spiral"}), ["rope_type 'spiral'"]),
    "unknown rope type of old": (config(rope_scaling={"type": "spiral", "factor": 2.0}), ["rope_type 'spiral'"]),
    "rope is a text": (config(rope_parameters="linear"), ["rope_parameters is no object"]),
    "rope theta is NaN": (config(rope_theta=float("nan")), ["rope_theta is nan"]),
    "norm epsilon is NaN": (config(rms_norm_eps=float("nan")), ["rms_norm_eps is nan"]),
    "norm epsilon is infinite": (config(rms_norm_eps=float("inf")), ["rms_norm_eps is inf"]),
    "norm epsilon is negative": (config(rms_norm_eps=-1e-6), ["rms_norm_eps is -1e-06"]),
    "norm epsilon is a text": (config(rms_norm_eps="small"), ["rms_norm_eps is 'small'"]),
    "unknown type of weights": (config(dtype="float99"), ["dtype is 'float99'"]),
    "weights of integers": (config(dtype="int8"), ["dtype is 'int8'"]),
    "tied is a text": (config(tie_word_embeddings="yes"), ["tie_word_embeddings is 'yes'"]),
    "already quantized": (config(quantization_config={"quant_method": "awq"}), ["already quantized (method awq)"]),
    # config and weights do not belong together
    "more layers in the config": (config(num_hidden_layers=6), ["6 blocks", "weights have 4", WEIGHTS]),
    "fewer layers in the config": (config(num_hidden_layers=3), ["3 blocks", "weights have 4", WEIGHTS]),
    "fewer layers in the weights": (blocks(3), ["4 blocks", "weights have 3", WEIGHTS]),
    "more layers in the weights": (blocks(5), ["4 blocks", "weights have 5", WEIGHTS]),
    "other hidden size": (config(hidden_size=32), ["config.json asks for", WEIGHTS]),
    "other channels": (config(intermediate_size=97), ["up_proj", "[96, 64]", "[97, 64]"]),
    "other vocabulary": (config(vocab_size=500), ["embed_tokens", "[512, 64]", "[500, 64]"]),
    "untied without a head": (config(tie_word_embeddings=False), ["the weights lack lm_head.weight"]),
    "weights of another family": (config(model_type="qwen3"), ["lack", "q_norm", WEIGHTS]),
    "a bias that is not there": (config(attention_bias=True), ["lack", "q_proj.bias"]),
    # the weights' tensors
    "a tensor is missing": (taken(UP), [WEIGHTS, f"lack {UP}", "save_pretrained"]),
    "embedding is missing": (taken("model.embed_tokens.weight"), ["lack model.embed_tokens.weight"]),
    "many are missing": (taken(*(f"model.layers.{i}.mlp.{n}_proj.weight" for i in range(3) for n in ("up", "down"))),
                         ["lack", "and 1 more"]),
    "a tensor too many": (weights(lambda s: s.update({"score.weight": torch.ones(2, 64)})), ["hold score.weight"]),
    "unknown prefix": (weights(lambda s: {f"net.{k}": v for k, v in s.items()}), ["lack", "hold net."]),
    "twice under two names": (weights(lambda s: s.update({f"module.{UP}": s[UP].clone()})), [UP, "twice"]),
    "an adapter not merged": (weights(lambda s: s.update({"model.layers.0.q.lora_A.weight": torch.ones(2, 2)})),
                              ["adapter", "merge_and_unload"]),
    "transposed": (weights(lambda s: s.update({UP: s[UP].T.contiguous()})), [UP, "[64, 96]", "[96, 64]"]),
    "a tensor of no size": (weights(lambda s: s.update({UP: torch.zeros(0, 64)})), [UP, "is empty"]),
    "a tensor of integers": (weights(lambda s: s.update({UP: torch.ones(96, 64, dtype=torch.int8)})), [UP, "I8"]),
    "NaN": (value(UP, 77, float("nan")), [WEIGHTS, UP, "NaN", "sound checkpoint"]),
    "infinite": (value(UP, 0, float("inf")), [WEIGHTS, UP, "infinite"]),
    "infinite and negative": (value(NORM, 3, float("-inf")), [WEIGHTS, NORM, "infinite"]),
    "all zeros": (filled(UP, 0.0), [WEIGHTS, UP, "all zeros"]),
    "a norm of zeros": (filled(NORM, 0.0), [NORM, "all zeros"]),
    "two heads that differ": (weights(lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"] + 1})),
                              ["ties lm_head.weight", "tie_word_embeddings"]),
    # the weights' file
    "no weights": (remove(WEIGHTS), ["no safetensors file", "save_pretrained"]),
    "empty file": (write(WEIGHTS, b""), [WEIGHTS, "cut off", "download it again"]),
    "five bytes": (write(WEIGHTS, b"12345"), [WEIGHTS, "cut off"]),
    "half of the file": (cut(WEIGHTS, 0.5), [WEIGHTS, "cut off", "download it again"]),
    "the last byte is missing": (cut(WEIGHTS, 0.999999), [WEIGHTS, "cut off"]),
    "cut within the header": (cut(WEIGHTS, 0.001), [WEIGHTS, "cut off"]),
    "bytes too many": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"x"), [WEIGHTS, "cut off or"]),
    "Git LFS pointer": (write(WEIGHTS, LFS), [WEIGHTS, "Git LFS pointer", "git lfs pull"]),
    "a web page": (write(WEIGHTS, "<html>" + "x" * 500), [WEIGHTS, "no safetensors file"]),
    "zeros only": (write(WEIGHTS, bytes(4096)), [WEIGHTS, "no JSON"]),
    "header is no JSON": (write(WEIGHTS, struct.pack("<Q", 4) + b"{{{{"), [WEIGHTS, "header that is no JSON"]),
    "header is a list": (write(WEIGHTS, struct.pack("<Q", 2) + b"[]"), [WEIGHTS, "no JSON object"]),
    "header is nested deep": (write(WEIGHTS, struct.pack("<Q", 200_000) + DEEP.encode()), [WEIGHTS, "no JSON"]),
    "header of nothing": (write(WEIGHTS, struct.pack("<Q", 2) + b"{}"), [WEIGHTS, "holds no tensor"]),
    "header longer than the file": (write(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), [WEIGHTS, "cut off"]),
    "shape lies": (header(lambda h: h[UP].update(shape=[96, 65])), [WEIGHTS, UP, "do not agree"]),
    "shape is negative": (header(lambda h: h[UP].update(shape=[-96, -64])), [UP, "do not agree"]),
    "shape is no list": (header(lambda h: h[UP].update(shape=6144)), [UP, "do not agree"]),
    "unknown type": (header(lambda h: h[UP].update(dtype="BF17")), [UP, "do not agree"]),
    "type lies": (header(lambda h: h[UP].update(dtype="F32")), [UP, "do not agree"]),
    "type is missing": (header(lambda h: h[UP].pop("dtype")), [UP, "do not agree"]),
    "place is missing": (header(lambda h: h[UP].pop("data_offsets")), [UP, "do not agree"]),
    "tensor is a number": (header(lambda h: h.update({UP: 3})), [UP, "do not agree"]),
    "places overlap": (header(lambda h: h[UP].update(data_offsets=[0, 96 * 64 * 2])), [WEIGHTS, "overlap"]),
    "another name": (lambda f: (f / WEIGHTS).rename(f / "net.safetensors"), ["net.safetensors", "rename", WEIGHTS]),
    # the index
    "index without a map": (index({"metadata": {}}), [INDEX, "no weight_map"]),
    "index is a list": (index([]), [INDEX, "no JSON object"]),
    "index of nothing": (index({"weight_map": {}}), [INDEX, "no weight_map"]),
    "index of numbers": (index({"weight_map": {"a": 1}}), [INDEX, "no weight_map"]),
    "index out of the folder": (index({"weight_map": {"a": "../x.safetensors"}}), [INDEX, "'../x.safetensors'"]),
    "index of a whole path": (index({"weight_map": {"a": "/etc/x.safetensors"}}), [INDEX, "'/etc/x.safetensors'"]),
    "index of a pickle": (index({"weight_map": {"a": "pytorch_model.bin"}}), [INDEX, "'pytorch_model.bin'"]),
    "index of a lost shard": (index({"weight_map": {"a": SHARD, "b": "model-2.safetensors"}}),
                              ["model-2.safetensors is missing", INDEX, "complete"]),
    # the tokenizer
    "no tokenizer": (remove("tokenizer.json"), ["its tokenizer", "tokenizer.json"]),
    "tokenizer of {}": (write("tokenizer.json", "{}"), ["its tokenizer does not load", "tokenizer.json"]),
    "tokenizer is empty": (write("tokenizer.json", ""), ["its tokenizer does not load"]),
    "tokenizer is cut off": (cut("tokenizer.json", 0.5), ["its tokenizer does not load"]),
    "tokenizer of no words": (tokenizer(lambda t: t["model"].update(vocab={}, merges=[])), ["its tokenizer"]),
    "tokenizer config is cut off": (cut("tokenizer_config.json", 0.5), ["its tokenizer does not load"]),
    "no end of text": (tokenizer(lambda t: [t.pop("eos_token"), t.pop("pad_token")], "tokenizer_config.json"),
                       ["its tokenizer", "ends none"]),
    "a token without a row": (tokenizer(extra_token), ["1 tokens without a row", "<pad>", "resize_token_embeddings"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.parametrize("case", CASES)
def test_bad_model_is_refused_with_one_error_and_nothing_is_written(case, model_folder, tmp_path):
    harm, told = CASES[case]
    folder = shutil.copytree(model_folder, tmp_path / "model")
    harm(folder)
    with pytest.raises(FetchError) as caught:
        models.fetch_model(f"path:{folder}")
    message = str(caught.value)
    for text in ("model.source", str(folder), *told):
        assert text in message
    assert len(message) < 1500 and "Traceback" not in message
    assert not BASE.exists() and not any(BASE.parent.iterdir())


def gguf_file(path):
    """A GGUF file of one small tensor, and of no model that transformers knows."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patched(offset, content):
    return lambda data: data[:offset] + content + data[offset + len(content) :]


def array_of(count):
    def change(data):
        at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
        return data[:at] + struct.pack("<IQ", 4, count) + data[at + 12 :]

    return change


GGUF = {
    "empty": (lambda data: b"", "no GGUF file"),
    "another kind": (lambda data: b"GGML" + data[4:], "no GGUF file"),
    "four bytes": (lambda data: data[:4], "cut off within its header"),
    "header cut": (lambda data: data[:60], "cut off within its header"),
    "tensors cut": (lambda data: data[:-40], "is cut off: it has"),
    "version": (patched(4, struct.pack("<I", 9)), "its version is 9"),
    "no tensors": (patched(8, struct.pack("<Q", 0)), "0 tensors"),
    "2^60 tensors": (patched(8, struct.pack("<Q", 2**60)), "tensors"),
    "2^60 fields": (patched(16, struct.pack("<Q", 2**60)), "fields"),
    "fields that are not there": (patched(16, struct.pack("<Q", 5000)), "the.gguf is"),
    "a name of 2^60 bytes": (patched(24, struct.pack("<Q", 2**60)), "cut off within its header"),
    "an array of 2^60 numbers": (array_of(2**60), "cut off within its header"),
    "an unknown field": (
        lambda data: data.replace(b"general.name\x08", b"general.name\x63"), "unknown type"),
    "an unknown quantization": (lambda data: data.replace(struct.pack("<QQ", 32, 2) + b"\0\0\0\0",
                                                          struct.pack("<QQ", 32, 2) + b"\x63\0\0\0"), "do not agree"),
    "a shape of 2^60": (lambda data: data.replace(struct.pack("<QQ", 32, 2), struct.pack("<QQ", 32, 2**60)), "cut off"),
    "a shape of nothing": (lambda data: data.replace(struct.pack("<QQ", 32, 2), struct.pack("<QQ", 32, 0)),
                           "do not agree"),
    "no whole model": (lambda data: data, "the.gguf"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF)
def test_bad_gguf_file_is_refused_with_one_error(case, tmp_path):
    harm, told = GGUF[case]
    folder, target = tmp_path / "package", tmp_path / "target"
    folder.mkdir()
    target.mkdir()
    data = gguf_file(folder / "the.gguf").read_bytes()
    (folder / "the.gguf").write_bytes(harm(data))
    with pytest.raises(models.WeightsError) as caught:
        models.convert(folder, target, "package:tiny==1")
    assert told in str(caught.value) and "the.gguf" in str(caught.value)
    assert ("again" in str(caught.value)) or "take a" in str(caught.value)
    assert not any(target.iterdir())


def test_there_are_enough_cases():
    assert len(CASES) + len(GGUF) >= 75


def test_the_model_that_is_harmed_is_sound(model_folder):
    models.fetch_model(f"path:{model_folder}")
    assert (BASE / WEIGHTS).read_bytes() == (model_folder / WEIGHTS).read_bytes()
    assert sum(parameter.numel() for parameter in tiny_model().parameters()) > 0
