"""The steps from a dense model to a trial's, one after the other, for the families that differ most from Llama."""

import math

import pytest
import torch
from banks import settings as bank_settings
from conftest import batches, tiny_model

from pipeline import architecture, checkpoint
from pipeline.compress import bank_writer, importance, layer_bank, linear_grams, prune
from pipeline.compress.structures import Settings, Span

# The default's: by the surgeon, refitted, with noise.
PRUNING = Settings(
    ratio=0.2, importance="surgeon", level="parameter", aggregate="sum", scope="global", shapes="free",
    structures=("attention", "mlp"), multiple_of=8, attention_blocks=Span(), mlp_blocks=Span(), noise=0.1, steps=1,
    compensate=True,
)  # fmt: skip


def divergence(model, expected, tokens):
    """Of a model's predictions from those of another, in nats a token."""
    with torch.no_grad():
        found = model(input_ids=tokens).logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("family", ["smollm3", "olmo2", "gemma3_text", "gemma2", "phi3"])
def test_a_model_is_pruned_quantized_and_measured(family, tmp_path):
    text, model = batches(4, rows=4, length=16), tiny_model(family)
    pruned = prune.run(model, text, PRUNING, 0)
    assert pruned.ratio == pytest.approx(0.2, abs=0.03)
    smaller = checkpoint.from_state(pruned.config, pruned.state)
    with torch.no_grad():
        expected = smaller(input_ids=text[0].tokens).logits.log_softmax(-1)
    apart = {}
    for method, init in (("nearest", "loftq"), ("calibrated", "weighted")):
        folder = tmp_path / method
        folder.mkdir()
        grams = linear_grams.collect(smaller, text)
        groups = layer_bank.groups_of(pruned.config)
        chosen = bank_settings(method=method, init=init)
        tokens = linear_grams.count_tokens(text)
        assert not bank_writer.write(smaller.state_dict(), groups, chosen, 0, folder, grams=grams, tokens=tokens)
        bank = layer_bank.Bank(folder)
        widths = dict.fromkeys(layer_bank.names_of(pruned.config), 4)
        state = layer_bank.simulated(smaller.state_dict(), bank, widths)
        for name in widths:  # as a trial begins
            adapter = bank.adapter(name, 4)
            state[f"{name}.weight"] = state[f"{name}.weight"] + bank.scale * adapter.b @ adapter.a
        apart[method] = divergence(checkpoint.from_state(pruned.config, state), expected, text[0].tokens)
    assert 0 < apart["calibrated"] < apart["nearest"] < 1
    units = architecture.units(pruned.config, "group")
    found = importance.run(smaller, text, units, importance.Settings(clusters=4, outcomes=4), bank, 0)
    assert len(found.units) == 16 and found.divergence > 0
    assert all(math.isfinite(value) for value in found.sensitivity) and any(found.sensitivity)
