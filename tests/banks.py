"""Tiny pruned models and their layer banks."""

from types import SimpleNamespace

import torch
from conftest import batches, tiny_model

from pipeline.compress import prune, quantize
from pipeline.trial import assemble


def settings(**changes):
    plain = {"four_bit": "nf4", "double_quant": False, "init": "loftq", "iterations": 1, "r": 4, "lora_alpha": 8}
    return quantize.Settings(**(plain | changes))


def pruned(family="llama", dtype=torch.bfloat16):
    """Config and tensors of a model whose four blocks all differ in shape."""
    keep = [{"attention": torch.arange(i % 2, 2), "mlp": torch.arange(90 - 7 * i)} for i in range(4)]
    return prune.remove(tiny_model(family, dtype=dtype), keep)


def make_bank(folder, config, state, seed=0, **changes):
    quantize.run(state, quantize.names_of(config), settings(**changes), seed, folder)
    return quantize.Bank(folder)


def real_model(config, state, bank, widths):
    """The model of bitsandbytes' modules, as a trial builds it."""
    context = SimpleNamespace(config=config, state=state, bank=bank, device=torch.device("cpu"))
    return assemble.mixed_model(context, widths)


def mixed_bits(config):
    """Linears at 4, 8 and 16 bits in turn."""
    return {name: (4, 8, 16)[i % 3] for i, name in enumerate(quantize.names_of(config))}


def logits(model):
    with torch.no_grad():
        return model(input_ids=batches(1)[0].tokens).logits
