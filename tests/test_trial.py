"""A trial depends on its params alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from pipeline import architecture, checkpoint, trial


@pytest.fixture
def context(default):
    model = tiny_model(dtype=torch.bfloat16)
    config = checkpoint.pruned_config(model.config, architecture.shapes(model.config))
    units = architecture.units(config, "block")
    bank = SimpleNamespace(settings=default.quantize)
    cpu = torch.device("cpu")
    return trial.Context(config, model.state_dict(), bank, None, units, {}, [], [], default, cpu)


def drawn(context):
    state = trial.assemble(context, [16] * len(context.units)).state_dict()
    return {name: weight for name, weight in state.items() if "lora_A" in name}


def test_adapters_of_16_bits_are_drawn_by_the_params_seed_alone(context):
    torch.manual_seed(1)
    first = drawn(context)
    before = torch.get_rng_state()
    second = drawn(context)
    assert torch.equal(torch.get_rng_state(), before)
    assert first and all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert len({float(weight.float().sum()) for weight in first.values()}) == len(first)
    other = replace(context, params=context.params.model_copy(update={"seed": context.params.seed + 1}))
    assert not any(torch.equal(weight, first[name]) for name, weight in drawn(other).items())
