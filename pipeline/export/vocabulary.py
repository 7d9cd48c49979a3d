"""A tokenizer as GGUF metadata: tokens, merges or scores, what splits text before them, special tokens, chat template.

llama.cpp knows no ``tokenizer.json``. It has the regular expressions that split text before byte-level BPE compiled in
and takes their name; SentencePiece's BPE it computes from scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from pipeline.export.limits import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The regular expression of a tokenizer.json -> llama.cpp's name of it.
_SPLITS = {
    _WORDS + r"\p{N}" + _REST: "qwen2",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "tekken"}  # llama.cpp takes a word that is a token as it is, whatever merges say


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        pre: llama.cpp's name of what splits text before merging.
        tokens: By id; the rows of the embedding beyond the tokenizer's tokens have names of their own.
        types: Of each token.
        merges: Of byte-level BPE, best first.
        scores: Of SentencePiece; empty otherwise.
        space_first: SentencePiece puts a space before a text.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    merges: Sequence[str]
    scores: Sequence[float]
    space_first: bool


def read(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return a tokenizer as GGUF holds it.

    Args:
        tokenizer: Loaded from its folder.
        size: Rows of the embedding, at least the tokenizer's tokens.

    Raises:
        ExportError: llama.cpp has no such tokenizer.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"is of type {model.get('type')}")
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(document, size, pieces)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if pieces:
        rank = {a + b: index for index, (a, b) in reversed(list(enumerate(merges)))}
        # A token that no merge makes (a character) is never chosen for its score; those of merges fall with the rank.
        scores = [-float(rank.get(token, len(merges))) for token in tokens]
        return Vocabulary("llama", "default", tokens, types, (), scores, _space_first(document))
    pre = _pre(document.get("pre_tokenizer"))
    if bool(model.get("ignore_merges")) != (pre in _WHOLE_WORDS_FIRST):
        raise _unknown(f"splits as {pre} does and merges otherwise")
    return Vocabulary("gpt2", pre, tokens, types, [f"{a} {b}" for a, b in merges], (), False)


def write(writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add a vocabulary, the special tokens and the chat template to a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_first)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(starts_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts its first token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]


def _tokens(document: Mapping[str, Any], size: int, pieces: bool) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[unused {index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    unknown = document["model"].get("unk_token")
    for token, index in document["model"]["vocab"].items():
        tokens[index] = token
        is_byte = pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        types[index] = TokenType.BYTE if is_byte else TokenType.UNKNOWN if token == unknown else TokenType.NORMAL
    for added in document["added_tokens"]:
        index = added["id"]
        tokens[index] = added["content"]
        if types[index] is not TokenType.UNKNOWN:
            types[index] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, types


def _pre(splitter: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name of what splits text before byte-level merges."""
    parts = (splitter or {}).get("pretokenizers") or [splitter or {}]
    kinds = [part.get("type") for part in parts]
    if kinds and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space"):
        own_words = parts[-1].get("use_regex", True)  # GPT-2's regular expression
        if kinds == ["ByteLevel"] and own_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and own_words:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_words and parts[0].get("behavior") == "Isolated":
            if (name := _SPLITS.get(parts[0]["pattern"].get("Regex", ""))) is not None:
                return name
    raise _unknown(f"splits text in a way ({' + '.join(map(str, kinds))}) that has no name there")


def _space_first(document: Mapping[str, Any]) -> bool:
    """Return whether SentencePiece puts a space before a text: by its normalizer, or by what splits text."""
    parts = [document.get("normalizer") or {}, document.get("pre_tokenizer") or {}]
    parts += [inner for part in parts for inner in part.get("normalizers", []) + part.get("pretokenizers", [])]
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _unknown(why: str) -> ExportError:
    return ExportError(
        f"export.formats: gguf cannot hold this model's tokenizer: it {why}, and llama.cpp knows byte-level BPE as of "
        "GPT-2, SmolLM, Llama 3, Qwen2 and Tekken, and SentencePiece's BPE; take export.formats: [hf]"
    )
