"""The process in which a built checkpoint is loaded afresh: ``python -m pipeline.trial.probe``.

It writes what ``build.probe`` gives of the checkpoint, which the building process compares with its own.
"""

from __future__ import annotations

import sys

from pipeline import runtime


def main(source: str, target: str, device: str, dtype: str) -> None:
    """Load a checkpoint and write its logits.

    Args:
        source: The checkpoint.
        target: A safetensors file.
        device: As ``device`` of the params.
        dtype: As ``dtype`` of the params.
    """
    runtime.prepare()  # before torch is imported
    from safetensors.torch import save_file

    from pipeline import checkpoint
    from pipeline.device import choose
    from pipeline.trial.build import probe

    compute = choose(device, dtype)
    built = checkpoint.load_final(source, compute.device, compute.dtype)
    save_file({"logits": probe(built, checkpoint.load_tokenizer(source))}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
