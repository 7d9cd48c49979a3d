"""The process that llama.cpp runs in: ``python -m pipeline.export.worker``; it ends when its standard input does.

llama.cpp ends the process where it meets what it does not expect; so it has one of its own.
"""

from __future__ import annotations

import json
import sys

import psutil


def main(file: str, threads: str, context: str, slots: str, adapters: str = "") -> None:
    """Serve a GGUF file on a free port, and print the address as a line of JSON.

    Args:
        file: The GGUF file.
        threads: Threads of llama.cpp.
        context: Tokens that one prompt and its answer may have.
        slots: Prompts that are answered at once.
        adapters: A GGUF file of LoRA adapters to add; empty: none.
    """
    import xllamacpp

    before = psutil.Process().memory_info().rss
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = int(context) * int(slots), int(slots)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_gpu_layers = 0
    params.cache_ram_mib = 0  # no prompt is kept for later
    params.fit_params = params.ui = params.warmup = False
    params.verbosity = 0
    if adapters:
        adapter = xllamacpp.CommonAdapterLoraInfo(adapters, 1.0)
        params.lora_adapters = [adapter]
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address, "resident_before": before}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
