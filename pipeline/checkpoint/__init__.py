"""Pruned and mixed-bit models that save and load through ``from_pretrained``.

Two things that transformers does not have are added and registered when this package is imported:

* ``pruned_llama`` and its siblings, whose blocks have a shape each (``pruned.py``) and whose experts are linears
  (``experts.py``);
* the quantization method ``mixed_bits``, which gives each linear its own bit-width out of 4, 8 and 16 (``mixed.py``).
"""

from pipeline.checkpoint import mixed, pruned
from pipeline.checkpoint.loading import (
    ADAPTER,
    load_base,
    load_config,
    load_final,
    load_model,
    load_state,
    load_tokenizer,
    quiet,
)
from pipeline.checkpoint.mixed import MixedBitsConfig, MixedBitsQuantizer, use_plain_cpu_layout
from pipeline.checkpoint.pruned import (
    PRUNED,
    STORED,
    buildable,
    compute_in,
    from_state,
    pruned_config,
    stored,
)

__all__ = [
    "ADAPTER",
    "PRUNED",
    "STORED",
    "MixedBitsConfig",
    "MixedBitsQuantizer",
    "buildable",
    "compute_in",
    "from_state",
    "load_base",
    "load_config",
    "load_final",
    "load_model",
    "load_state",
    "load_tokenizer",
    "pruned_config",
    "quiet",
    "register_types",
    "stored",
    "use_plain_cpu_layout",
]


def register_types() -> None:
    """Make the pruned model types and the mixed-bit method known to transformers; safe to call again."""
    pruned.register()
    mixed.register()


register_types()
