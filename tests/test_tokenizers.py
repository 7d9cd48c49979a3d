"""Tokenizers as repositories ship them: special tokens stand where the pipeline puts them, and nowhere else."""

import json
import shutil

import pytest
import sentencepiece
import torch
from conftest import ROOT, tiny_model, write_jsonl
from tokenizers.processors import TemplateProcessing

from pipeline import checkpoint
from pipeline.data import alpaca, models
from pipeline.data.fetch import BASE, FetchError
from pipeline.trial import evaluate

START, END = ("<s>", 0), ("</s>", 1)
TEXT = "Question: is ice cold?\nAnswer:"


@pytest.fixture
def with_template(tokenizer, tmp_path):
    """Save a tokenizer with a post-processor of these parts around each text; return its folder."""

    def save(*parts):
        folder = tmp_path / "tokenizer"
        tokenizer.save_pretrained(folder)
        values = json.loads((folder / "tokenizer.json").read_text())
        processor = TemplateProcessing(single=list(parts), special_tokens=[START, END])
        values["post_processor"] = json.loads(processor.__getstate__())
        (folder / "tokenizer.json").write_text(json.dumps(values))
        return folder

    return save


@pytest.mark.parametrize(
    ("parts", "before"),
    [
        (("$A", "</s>"), []),
        (("<s>", "$A", "</s>"), [0]),
        (("<s>", "$A"), [0]),
        (("$A",), []),
        (("<s>", "$A", "<s>"), [0]),
    ],
)
def test_nothing_is_added_after_a_text_and_what_comes_before_stays(with_template, tokenizer, parts, before, tmp_path):
    loaded = checkpoint.load_tokenizer(with_template(*parts))
    plain = tokenizer.encode(TEXT, add_special_tokens=False)
    assert loaded.encode(TEXT) == before + plain
    assert loaded.encode(TEXT, add_special_tokens=False) == plain
    loaded.save_pretrained(tmp_path / "again")
    assert checkpoint.load_tokenizer(tmp_path / "again").encode(TEXT) == before + plain


def test_setting_that_ends_texts_is_overruled(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | {"add_eos_token": True}))
    assert checkpoint.load_tokenizer(tmp_path).encode(TEXT)[-1] != tokenizer.eos_token_id


def test_prompts_and_choices_are_those_of_a_plain_tokenizer(with_template, tokenizer):
    loaded = checkpoint.load_tokenizer(with_template("$A", "</s>"))
    row = {"instruction": "Name a color.", "input": "", "output": "Blue."}
    assert alpaca.encode([row], loaded, 500) == alpaca.encode([row], tokenizer, 500)
    pairs = [
        evaluate.SharedPrefixLM(tiny_model(), asked, 256)._encode_pair(TEXT, answer)
        for answer in (" yes", " no")
        for asked in (loaded, tokenizer)
    ]
    assert pairs[0] == pairs[1] and pairs[2] == pairs[3] and pairs[0] != pairs[2]


def test_model_whose_tokenizer_ends_texts_is_fetched(with_template, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copy(with_template("$A", "</s>") / "tokenizer.json", folder)
    models.fetch_model(f"path:{folder}")
    assert checkpoint.load_tokenizer(BASE).encode(TEXT)[-1] != 1


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A tokenizer.model as LLaMA's, of 512 pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    texts = [row["output"].replace("\n", " ") for row in alpaca.read(ROOT / "data/sample/alpaca.jsonl")]
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def with_pieces(model_folder, pieces, folder):
    """Give a model the tokenizer of Vicuna's and LLaMA's repositories: tokenizer.model alone."""
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    shutil.copy(pieces, folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_model_with_tokenizer_model_alone_is_fetched(sentencepiece_model, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = with_pieces(model_folder, sentencepiece_model, tmp_path / "model")
    models.fetch_model(f"path:{folder}")
    assert (BASE / "tokenizer.model").exists()
    tokenizer = checkpoint.load_tokenizer(BASE)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokens = tokenizer.encode("Water boils at sea level.", add_special_tokens=False)
    assert tokens == reference.encode("Water boils at sea level.")
    assert tokenizer.encode("Water") == [tokenizer.bos_token_id, *reference.encode("Water")]
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Name a color.", "input": "", "output": "Blue."}] * 2)
    (example,) = alpaca.rows(tmp_path / "rows.jsonl", tokenizer, 1, 1, 500, 0)
    with torch.no_grad():
        assert checkpoint.load_model(BASE)(torch.tensor([example.tokens])).logits.isfinite().all()


def test_damaged_tokenizer_model_is_refused(sentencepiece_model, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = with_pieces(model_folder, sentencepiece_model, tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes()[:1000])
    with pytest.raises(FetchError, match="its tokenizer"):
        models.fetch_model(f"path:{folder}")
    assert not BASE.exists()
