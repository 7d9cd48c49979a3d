"""A built model as folders that transformers loads where this project is not: with its code, or as a class of its own.

``with_code`` keeps codes and adapters to the bit, and needs ``trust_remote_code=True``. ``plain`` is for a model whose
blocks have one shape: dense 16-bit weights under a class that transformers, vLLM and others know.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from pipeline import architecture, checkpoint, storage
from pipeline.export import limits
from pipeline.export.dense import Dense

CODE = Path(__file__).parent / "remote" / "modeling_pruned.py"
_OURS = {storage.CHECKSUMS, "README.md", "lineage.json"}  # of a built checkpoint, not of the model


def with_code(built: Path, folder: Path) -> None:
    """Write a built checkpoint with the code that loads it.

    Args:
        built: The checkpoint.
        folder: Where it goes; made here.
    """
    shutil.copytree(built, folder, ignore=lambda _, names: _OURS & set(names), dirs_exist_ok=True)
    shutil.copy(CODE, folder)
    config = storage.read_json(built / "config.json", "build", {"architectures": list})
    model_class = config["architectures"][0]
    names = {"AutoConfig": model_class.replace("ForCausalLM", "Config"), "AutoModelForCausalLM": model_class}
    config["auto_map"] = {auto: f"{CODE.stem}.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def plain(dense: Dense, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model of one shape as a class that transformers has, adapters added, in bf16.

    Args:
        dense: The model.
        tokenizer: Its tokenizer.
        folder: Where it goes; made here.

    Raises:
        ExportError: The blocks differ, or no class holds the heads.
    """
    config = plain_config(dense.config)
    state = dict(dense.tensors)
    state |= {f"{name}.weight": dense.merged(name) for name in architecture.linears(dense.config)}
    state = {name: value.to(checkpoint.STORED).contiguous() for name, value in state.items()}
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_config(config: Any) -> PretrainedConfig:
    """Return the config of transformers' own class for a model whose blocks have one shape.

    Raises:
        ExportError: The blocks differ, or no class holds the heads.
    """
    shapes, family = architecture.shapes(config), architecture.family(config)
    twin = architecture.description(config).twin
    if not limits.one_shape(shapes):
        raise limits.ExportError("the blocks have different shapes, which no class of transformers' own holds")
    fields = config.to_dict()
    for name in ("model_type", "architectures", "block_shapes", "quantization_config", "auto_map"):
        fields.pop(name, None)
    fields |= {
        "num_attention_heads": shapes[0].heads,
        "num_key_value_heads": shapes[0].kv_heads,
        architecture.channels_field(config): shapes[0].channels,
        "head_dim": architecture.head_dim(config),
        "dtype": str(checkpoint.STORED).removeprefix("torch."),
    }
    if twin and config.hidden_size % shapes[0].heads:  # which the family's own class refuses
        if any(architecture.has_bias(config, linear) for linear in architecture.description(config).linears):
            raise limits.ExportError(
                f"its head count does not divide the hidden size, and {twin}'s class, which takes that, has no biases"
            )
        family = twin
        fields["sliding_window"] = None
    try:
        result = AutoConfig.for_model(family, **fields)
    except (ValueError, StrictDataclassError) as error:
        raise limits.ExportError(f"transformers' class of {family} does not hold the heads: {error}") from None
    result.architectures = [architecture.FAMILIES[family].model_class]
    return result
