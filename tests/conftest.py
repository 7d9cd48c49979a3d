"""Tiny random models and a tokenizer trained on the sample rows: no network, seeded."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pipeline import runtime

runtime.prepare()  # before torch is imported

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline import checks, documents, fits
from pipeline.data import alpaca

ROOT = Path(__file__).parent.parent
VOCABULARY = 512
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def tiny_config(family: str = "llama", **changes):
    """A four-block model with grouped-query attention: 4 query heads, 2 key/value heads."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "mistral":
        sizes["sliding_window"] = None
    return _CONFIGS[family](**(sizes | changes))


def tiny_model(family: str = "llama", dtype=torch.float32, seed: int = 0, **changes):
    """A random model whose blocks matter: weights are larger than at initialization."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.08)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    rows = alpaca.read(ROOT / "data/sample/alpaca.jsonl")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator((row["output"] for row in rows), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=1024
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A saved tiny Llama in bf16 with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WHOLE = {"first": 0, "last": -1}
PLAIN_PRUNING = {"importance": "taylor1", "text": "rows", "samples": 32, "noise": 0, "max_length": 128} | {
    "compensate": False,
    "multiple_of": 1,
    "attention_blocks": dict(WHOLE),
    "mlp_blocks": dict(WHOLE),  # not the same object, which YAML would write as an alias
}


@pytest.fixture
def raw_params(monkeypatch):
    """The default params as a plain dictionary, free to change, with pruning that fits a model of four blocks.

    A unit is a block, so that bit strings can be read. On the CPU, also where there is a GPU (which test_cuda.py is
    for); whatever was fetched is not there.
    """
    os.chdir(ROOT)
    monkeypatch.setattr(fits, "BASE", Path("nothing/fetched"))
    raw = documents.read(ROOT / "params.yaml")
    raw["prune"] |= PLAIN_PRUNING
    raw["search"]["granularity"] = "block"
    raw["device"] = "cpu"
    return raw


@pytest.fixture
def default(raw_params):
    return checks.parse(raw_params)


def batches(count: int = 3, rows: int = 2, length: int = 12, seed: int = 0):
    """Random token batches with every position but the first labelled."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
        labels = tokens.clone()
        labels[:, 0] = alpaca.IGNORED
        found.append(alpaca.Batch(tokens, labels))
    return found


def write_jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
