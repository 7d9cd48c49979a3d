"""Tiny pruned models and their layer banks."""

from types import SimpleNamespace

import torch
from conftest import batches, tiny_model

from pipeline.compress import bank_writer, layer_bank, prune, quantize
from pipeline.trial import assemble


def settings(**changes):
    plain = {
        "method": "nearest",
        "four_bit": "nf4",
        "double_quant": False,
        "init": "loftq",
        "iterations": 1,
        "r": 4,
        "lora_alpha": 8,
    }
    return quantize.Settings(**(plain | changes))


def pruned(family="llama", dtype=torch.bfloat16):
    """Config and tensors of a model whose four blocks all differ in shape."""
    keep = [{"attention": torch.arange(i % 2, 2), "mlp": torch.arange(90 - 7 * i)} for i in range(4)]
    return prune.remove(tiny_model(family, dtype=dtype), keep)


def make_bank(folder, config, state, seed=0, **changes):
    bank_writer.write(state, layer_bank.groups_of(config), settings(**changes), seed, folder)
    return layer_bank.Bank(folder)


def codes_of(model, chosen):
    """What a bank of a model's present weights holds, without adapters."""
    state = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return SimpleNamespace(codes=lambda name, bits: quantize.quantize(state[f"{name}.weight"], bits, chosen))


def real_model(config, state, bank, widths):
    """The model of bitsandbytes' modules, as a trial builds it."""
    context = SimpleNamespace(config=config, state=state, bank=bank, device=torch.device("cpu"))
    return assemble.mixed_model(context, widths)


def mixed_bits(config):
    """Linears at 4, 8 and 16 bits in turn."""
    return {name: (4, 8, 16)[i % 3] for i, name in enumerate(layer_bank.names_of(config))}


def logits(model):
    with torch.no_grad():
        return model(input_ids=batches(1)[0].tokens).logits
