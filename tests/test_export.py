"""The built model in the forms that other programs run: the file's bytes, llama.cpp's answers, folders, refusals."""

import ast
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import gguf
import pytest
import torch
from conftest import FAMILIES, tiny_config, tiny_model
from gguf import GGMLQuantizationType as Kind

from pipeline import architecture, checkpoint
from pipeline.compress import codes
from pipeline.data.alpaca import Batch
from pipeline.device import Compute
from pipeline.export import (
    answers,
    card,
    dense,
    feedback,
    gguf_file,
    hf,
    iq4nl,
    limits,
    llama,
    measured,
    speed,
    vocabulary,
)
from pipeline.export.answers import Agreement
from pipeline.export.llama import Speed
from pipeline.export.speed import Timed
from tests.fixtures.exports import FREE, UNIFORM, save_built

needs_llama = pytest.mark.skipif(llama.installed() is None, reason=f"llama.cpp is not here: pip install {llama.WHEEL}")
F32 = gguf_file.Types(*(Kind.F32,) * 5)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(3, 512, (size,), generator=generator).tolist() for size in (9, 40)] for _ in range(2)]


# --- IQ4_NL ------------------------------------------------------------------------------------------------------


def read(rows):
    """What the gguf package makes of bytes in IQ4_NL."""
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), Kind.IQ4_NL))


def test_iq4nl_is_read_as_it_was_meant():
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    scales = codes.best_scales(weight.view(-1, 32), torch.ones(18, 32), iq4nl.GRID, iq4nl.FIT.factors)
    index = iq4nl.GRID.nearest(weight.view(-1, 32), scales[:, None]).to(torch.uint8)
    written = iq4nl.packed(index.view(6, 96), scales)
    assert written.shape == (6, 96 // 32 * 18)
    assert torch.equal(read(written), iq4nl.GRID.values(index, scales[:, None]).view(6, 96))
    assert torch.equal(written, iq4nl.nearest(weight))


def test_iq4nl_comes_close_to_the_best_scale_of_a_fine_grid():
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    found = (read(iq4nl.nearest(weight)) - weight).square().sum(1)
    largest = weight.abs().amax(1, keepdim=True)
    tried = []
    for scale in torch.cat([torch.linspace(-1.2, -0.6, 400), torch.linspace(0.6, 1.2, 400)]) / 127:
        steps = largest * scale
        near = iq4nl.LEVELS[(weight[:, :, None] / steps[:, :, None] - iq4nl.LEVELS).abs().argmin(2)]
        tried.append((near * steps - weight).square().sum(1))
    best = torch.stack(tried).amin(0)
    assert found.sum() <= 1.03 * best.sum()


def test_iq4nl_of_zeros_is_zero_but_for_the_least_scale():
    assert read(iq4nl.nearest(torch.zeros(1, 32))).abs().max() <= 2.0**-24


def test_iq4nl_fitted_to_inputs_changes_outputs_less_than_the_nearest():
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(rows, 96, generator=generator) for rows in (20, 7)]
    mixing = torch.eye(96) + 0.5 * torch.randn(96, 96, generator=generator) / 96**0.5
    inputs = torch.randn(400, 96, generator=generator) @ mixing + torch.randn(400, 1, generator=generator)
    for weight, fitted in zip(weights, iq4nl.calibrated(weights, inputs.T @ inputs), strict=True):
        lost = [(inputs @ (read(rows) - weight).T).square().sum() for rows in (fitted, iq4nl.nearest(weight))]
        assert lost[0] < 0.8 * lost[1]


# --- GGUF in llama.cpp -------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@needs_llama
@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "rope_parameters": LLAMA3}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {}),
    ],
)
def test_gguf_answers_like_the_built_model(tmp_path, tokenizer, rows, family, changes):
    built = save_built(tmp_path / "built", tokenizer, family, **changes)
    ours, model = answers.log_probabilities(built, rows), dense.read(tmp_path / "built")
    # In 32 bits only the order of sums, and bitsandbytes' rounding of what int8 linears receive, tell them apart. The
    # file's own 4 bits move random weights' tokens by 0.05 to 0.1 nats, either way; 8 other draws of the rows had means
    # within 0.03.
    for types, mean, apart in ((F32, 0.01, 0.03), (gguf_file.Types(), 0.1, 0.2)):
        file = tmp_path / "model.gguf"
        gguf_file.write(file, model, checkpoint.load_tokenizer(tmp_path / "built"), "tiny", types)
        with llama.running(file, 1, 64) as running:
            found = answers.compare(running.log_probabilities(rows), ours)
            text = "Give three tips for 12 healthy days, 1234!"
            answers.check_tokens(running, [text], [tokenizer.encode(text)])
        assert found.tokens > 60 and abs(found.difference) < mean and found.apart < apart


@needs_llama
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_beside_the_file_are_added(tmp_path, tokenizer, rows, family):
    built = save_built(tmp_path / "built", tokenizer, family)
    model, file, beside = dense.read(tmp_path / "built"), tmp_path / "model.gguf", tmp_path / "adapters.gguf"
    gguf_file.write(file, model, tokenizer, "tiny", F32, merge=False)
    gguf_file.write_adapters(beside, model, "tiny")
    ours = answers.log_probabilities(built, rows)
    apart = []
    for adapters in (None, beside):
        with llama.running(file, 1, 64, adapters=adapters) as running:
            apart.append(answers.compare(running.log_probabilities(rows), ours).apart)
    assert apart[1] < 0.03 < apart[0]


@needs_llama
def test_file_that_llama_cpp_cannot_load_is_an_error(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(limits.ExportError, match="does not load"), llama.running(tmp_path / "broken.gguf", 1):
        pass


def test_gguf_says_types_shapes_and_lineage(tmp_path, tokenizer):
    save_built(tmp_path / "built", tokenizer)
    model, file = dense.read(tmp_path / "built"), tmp_path / "model.gguf"
    gguf_file.write(file, model, tokenizer, "tiny", lineage={"base_model": "package:x==1"})
    read = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type for tensor in read.tensors}
    own = {"self_attn.q_proj": "attn_q", "mlp.down_proj": "ffn_down"}
    for block in range(4):
        for name, there in own.items():
            bits = model.bits[architecture.linear_name(block, name)]
            assert kinds[f"blk.{block}.{there}.weight"] == {4: Kind.IQ4_NL, 8: Kind.Q8_0}[bits]
    assert kinds["token_embd.weight"] == Kind.Q8_0 and kinds["blk.0.attn_norm.weight"] == Kind.F32
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["deci.attention.head_count"] == [shape.heads for shape in FREE]
    assert fields["deci.feed_forward_length"] == [shape.channels for shape in FREE]
    assert fields["qpruner.base_model"] == "package:x==1"


IN_32_BITS = Compute(torch.device("cpu"), torch.float32)


def text(tokens):
    """Calibration batches of so many tokens together."""
    drawn = torch.randint(3, 512, (2, tokens // 2), generator=torch.Generator().manual_seed(4))
    return [Batch(part[None], part[None], len(part)) for part in drawn]


@pytest.mark.parametrize("family, key", [("llama", "attn_output"), ("qwen3", "attn_qkv")])
def test_linears_are_rounded_to_what_the_built_model_gives_them(tmp_path, tokenizer, family, key):
    save_built(tmp_path / "built", tokenizer, family, bits=(4,) * 7)
    model, file = dense.read(tmp_path / "built"), tmp_path / "model.gguf"
    rounded = feedback.rounded(model, model.merged, text(600), IN_32_BITS)
    assert set(rounded) == set(model.bits)
    plain = model.model(IN_32_BITS)
    seen = {}
    for name in rounded:
        plain.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    with torch.no_grad():
        plain(input_ids=text(600)[0].tokens)
    gained = 0
    for name, inputs in seen.items():
        weight = model.merged(name)
        lost = [
            float((inputs[0] @ (read(rows) - weight).T).square().sum())
            for rows in (rounded[name], iq4nl.nearest(weight))
        ]
        gained += lost[0] < lost[1]
    assert gained > 0.9 * len(rounded)
    gguf_file.write(file, model, tokenizer, "tiny", rounded=rounded)
    names = ["self_attn.o_proj"] if key == "attn_output" else [f"self_attn.{part}_proj" for part in "qkv"]
    expected = torch.cat([rounded[architecture.linear_name(2, name)] for name in names])
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}[f"blk.2.{key}.weight"]
    assert written.tensor_type == Kind.IQ4_NL and torch.equal(torch.tensor(written.data), expected)


def test_rounded_rows_of_q_and_k_are_reordered_as_weights_are(tmp_path, tokenizer):
    save_built(tmp_path / "built", tokenizer, bits=(4,))
    model, file = dense.read(tmp_path / "built"), tmp_path / "model.gguf"
    rounded = {name: iq4nl.nearest(model.merged(name)) for name in model.bits}
    contents = []
    for given in (None, rounded):
        gguf_file.write(file, model, tokenizer, "tiny", rounded=given)
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]


def test_linears_wider_than_the_text_is_long_are_left_to_the_nearest(tmp_path, tokenizer):
    save_built(tmp_path / "built", tokenizer, bits=(4, 8, 4, 4, 4, 4, 4))
    model = dense.read(tmp_path / "built")
    found = feedback.rounded(model, model.merged, text(200), IN_32_BITS)  # enough for 100 inputs
    assert {architecture.linear_name(0, "mlp.up_proj"), architecture.linear_name(1, "mlp.down_proj")} <= found.keys()
    assert architecture.linear_name(0, "mlp.down_proj") not in found  # 192 inputs
    assert architecture.linear_name(0, "self_attn.k_proj") not in found  # 8 bits


def test_only_as_much_text_is_read_as_the_widest_linear_needs(tmp_path, tokenizer):
    save_built(tmp_path / "built", tokenizer)
    parts = [part for _ in range(4) for part in text(300)]  # of 150 tokens
    assert len(feedback.enough(parts, dense.read(tmp_path / "built"))) == 3  # 2 * 192 tokens
    assert feedback.enough(parts[:1], dense.read(tmp_path / "built")) == parts[:1]


def test_inputs_that_are_not_finite_are_an_error(tmp_path, tokenizer):
    save_built(tmp_path / "built", tokenizer)
    model = dense.read(tmp_path / "built")
    model.tensors["model.layers.1.input_layernorm.weight"][0] = float("nan")
    with pytest.raises(limits.ExportError, match=r"layers\.1\..* not finite"):
        feedback.rounded(model, model.merged, text(600), IN_32_BITS)


def test_linear_that_no_block_divides_has_16_bits(tmp_path, tokenizer):
    shapes = (architecture.BlockShape(2, 1, 100),) * 4
    save_built(tmp_path / "built", tokenizer, shapes=shapes)
    gguf_file.write(tmp_path / "model.gguf", dense.read(tmp_path / "built"), tokenizer, "tiny")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == Kind.BF16 and kinds["blk.0.ffn_up.weight"] != Kind.BF16


# --- folders for transformers ------------------------------------------------------------------------------------

LOADS = """
import json, sys, torch
try:
    import pipeline
    sys.exit("this project is importable")
except ImportError:
    pass
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    remote = folder.endswith("hf")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote).eval()
    with torch.no_grad():
        print(json.dumps(model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].float().tolist()))
"""


def test_folders_load_where_this_project_is_not_and_answer_the_same(tmp_path, tokenizer):
    folders, expected = [], []
    for family in FAMILIES:
        forms = {"hf": FREE} | ({"plain": UNIFORM} if family in ("llama", "qwen2", "phi3", "qwen3_moe") else {})
        for form, shapes in forms.items():
            built, folder = tmp_path / family / f"built-{form}", tmp_path / family / form
            save_built(built, tokenizer, family, shapes)
            model = checkpoint.load_final(built)
            if form == "hf":
                hf.with_code(built, folder)
            else:
                model = dense.read(built).model(Compute(torch.device("cpu"), torch.bfloat16))
                hf.plain(dense.read(built), tokenizer, folder)
            with torch.no_grad():
                expected.append(model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].float())
            folders.append(str(folder))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *folders],
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()]
    for folder, theirs, ours in zip(folders, found, expected, strict=True):
        # The same codes and modules: equal to the bit. Dense weights: summed in another order before they are rounded.
        assert torch.equal(theirs, ours) if folder.endswith("hf") else (theirs - ours).abs().max() < 0.05, folder


def test_plain_folder_asks_for_one_shape(tmp_path, tokenizer):
    save_built(tmp_path / "built", tokenizer)
    with pytest.raises(limits.ExportError, match="different shapes"):
        hf.plain(dense.read(tmp_path / "built"), tokenizer, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_heads_that_do_not_divide_the_hidden_size_go_into_mistrals_class():
    whole = tiny_config("llama", num_attention_heads=4, num_key_value_heads=4)
    config = checkpoint.pruned_config(whole, [architecture.BlockShape(3, 3, 96)] * 4)
    found = hf.plain_config(config)
    assert found.model_type == "mistral" and found.head_dim == 16 and found.num_attention_heads == 3


# --- what a format cannot hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes, told",
    [
        ("mistral", {"sliding_window": 512}, "sliding window of 512 tokens"),
        ("qwen3", {"tie_word_embeddings": False}, "head is not tied"),
        ("qwen3", {"attention_bias": True}, "has biases"),
        ("llama", {"hidden_act": "gelu"}, "function is gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
            "rope_type is yarn",
        ),
    ],
)
def test_config_that_llama_cpp_cannot_run_is_refused(family, changes, told):
    fault = limits.gguf(tiny_config(family, **changes))
    assert told in fault and fault.startswith("export.formats: gguf") and fault.endswith("take [hf]")


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_each_family_is_held_or_refused_with_the_reason(family):
    fault = limits.gguf(tiny_config(family))
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        assert fault is None
    else:
        assert fault.startswith("export.formats: gguf cannot hold this model: of llama.cpp's architectures")
        assert architecture.FAMILIES[family].unlike_gguf and fault.endswith("take [hf]")


def test_code_that_travels_knows_each_family():
    known = [(name, about.config_class, about.model_class) for name, about in architecture.FAMILIES.items()]
    # Not imported: it would register a quantizer of its own.
    parts = [part for part in ast.parse(hf.CODE.read_text()).body if isinstance(part, ast.Assign)]
    (table,) = (part.value for part in parts if getattr(part.targets[0], "id", None) == "FAMILIES")
    assert list(ast.literal_eval(table)) == known


def test_unknown_split_of_text_is_refused(tokenizer):
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["pre_tokenizer"] = {"type": "Whitespace"}
    other = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(document)))
    with pytest.raises(limits.ExportError, match="Whitespace.*Qwen2.*take export.formats"):
        vocabulary.read(other, 512)


def test_sentencepiece_scores_follow_the_merges():
    document = {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "ab": 4, "aab": 5},
            "merges": [["a", "b"], ["a", "ab"]],
        },
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
    }
    found = vocabulary.read(SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(document))), 7)
    assert found.model == "llama" and found.space_first and found.tokens[6] == "[unused 6]"
    assert found.scores[4:6] == [0.0, -1.0] and all(score == -2 for score in found.scores[:4])
    kinds = gguf.TokenType
    assert list(found.types[:3]) == [kinds.UNKNOWN, kinds.BYTE, kinds.NORMAL] and found.types[6] == kinds.UNUSED


# --- comparison, speed, card -------------------------------------------------------------------------------------


def test_comparison_by_hand():
    found = answers.compare([[-1.0, None, -2.0], [-3.0]], [[-1.5, -9.0, -2.0], [-2.0]])
    # Differences 0.5, 0 and -1 of two rows: mean -1/6; the rows' sums are off by 5/6 and -5/6.
    assert found.tokens == 3 and found.difference == pytest.approx(-1 / 6) and found.apart == pytest.approx(0.5)
    assert found.stderr == pytest.approx((2 * (5 / 6) ** 2 * 2) ** 0.5 / 3)


def test_file_beyond_the_tolerance_is_refused():
    answers.judge(Agreement(-0.02, 0.01, 0.1, 100), 0.02)
    for difference in (-0.021, float("nan")):
        with pytest.raises(limits.ExportError, match="allows 0.02. Nothing was written"):
            answers.judge(Agreement(difference, 0.01, 0.1, 100), 0.02)


def test_analytic_figures_by_hand():
    config = checkpoint.pruned_config(tiny_config(), [architecture.BlockShape(2, 1, 32)] * 4)
    block = 64 * 32 + 2 * 64 * 16 + 32 * 64 + 3 * 64 * 32
    found = speed.analytic(config)
    assert found["multiply_adds"] == 4 * block + 512 * 64
    assert found["cache_bytes"] == 4 * 2 * 16 * 2
    assert found["parameters"] == 4 * (block + 2 * 64) + 512 * 64 + 64


def test_speedup_is_the_median_of_the_rounds_own_ratios():
    slow, fast = (
        Timed([Speed(10, 1), Speed(20, 2), Speed(30, 9)], 5),
        Timed([Speed(20, 3), Speed(30, 4), Speed(90, 9)], 7),
    )
    found = measured.Measured({"parameters": 1.0}, {"parameters": 2.0}).timed({"untouched": slow, "built": fast}, 11)
    figures = found.figures()
    assert figures["generated_speedup"] == 2 and figures["prompt_speedup"] == 2
    assert figures["untouched_generated_tokens_per_second"] == 2 and figures["generated_tokens_per_second"] == 4
    assert figures["gguf_checked"] == 0 and figures["untouched_gguf_bytes"] == 11 and figures["resident_bytes"] == 7


def test_model_is_timed_in_transformers():
    found = speed.in_transformers(tiny_model(), rounds=2)
    assert len(found.rounds) == 2 and found.prompt > 0 and found.generated > 0
    figures = measured.Measured({"parameters": 1.0}, {}).timed_on_gpu({"built": found, "untouched": found}).figures()
    assert figures["gpu_prompt_tokens_per_second"] == found.prompt and "untouched_gpu_peak_bytes" in figures


def test_modelfile_takes_alpacas_prompt_where_there_is_no_chat_template():
    text = card.modelfile("m.gguf", False, "</s>")
    assert text.startswith("FROM ./m.gguf\nTEMPLATE") and "### Instruction:\n{{ .Prompt }}" in text
    assert 'PARAMETER stop "</s>"' in text
    assert "TEMPLATE" not in card.modelfile("m.gguf", True, None, "a.gguf")
    assert "ADAPTER ./a.gguf" in card.modelfile("m.gguf", True, None, "a.gguf")
