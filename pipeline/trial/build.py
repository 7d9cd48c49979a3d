"""Stage ``build``: the chosen bit vector becomes the final checkpoint, verified after a reload in a fresh process.

Reads ``reports/pareto.json``, ``artifacts/pruned``, ``artifacts/bank`` and the data. Writes ``artifacts/final``:
bitsandbytes' own codes as safetensors, ``adapter/``, the tokenizer and a model card; and ``reports/build.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import GIB, checkpoint
from pipeline import bits as text_of
from pipeline.device import Compute
from pipeline.errors import UserError
from pipeline.trial.adapters import lora_config
from pipeline.trial.assemble import mixed_model, trained_state
from pipeline.trial.context import Context
from pipeline.trial.result import Result

PROBES = ("The capital of France is", "Water boils when it is", "To plant a tree, first")


class BuildError(UserError):
    """The built checkpoint is not what was built, or cannot be chosen; what to do."""


def choose(wanted: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Return (vector as text, run id) of what to build.

    Args:
        wanted: ``best``, a trial's run id, or a vector's text.
        rows: The rows of ``reports/pareto.json``, members of the front first.

    Raises:
        BuildError: There is no such trial.
    """
    members = [row for row in rows if row["front"]]
    if wanted == "best":
        if not members:
            raise BuildError("the front is empty: no trial has finished; run: mlflow run . -e search")
        row = max(members, key=lambda member: (member["expected"], -member["memory_bytes"]))  # as ``pareto.best``
        return _vector(row), row["run_id"]
    for row in rows:
        if wanted in (row["run_id"], _vector(row)):
            return _vector(row), row["run_id"]
    if text_of.split(wanted):
        return wanted, None
    raise BuildError(f"build.choose: no finished trial of this study has the run id {wanted}; see reports/pareto.csv")


def _vector(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:g}:{row['bits']}"


def save(context: Context, bits: Sequence[int], trained: PeftModel, folder: Path) -> PeftModel:
    """Save the trained model with bitsandbytes' modules; return it, as it will be after loading."""
    widths = context.widths(bits)
    if context.settings.recover.train == "full":
        context = replace(context, state=context.state | trained_state(trained, widths))
    real = mixed_model(replace(context, state=checkpoint.stored(context.state)), widths)
    real.save_pretrained(folder)  # before PEFT renames its linears
    checkpoint.compute_in(real, context.compute.dtype)
    adapted = get_peft_model(real, lora_config(context.config, context.bank.settings, context.settings.recover.dropout))
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(trained, save_embedding_layers=False))
    # The embeddings are the base's; left to itself, PEFT asks a hub whether they are.
    adapted.save_pretrained(str(folder / checkpoint.ADAPTER), save_embedding_layers=False)
    (folder / checkpoint.ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is one level up
    context.tokenizer.save_pretrained(folder)
    return adapted.eval()


@torch.inference_mode()
def probe(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the logits after each of ``PROBES``, [probes, vocabulary], fp32."""
    rows = []
    for text in PROBES:
        tokens = torch.tensor([tokenizer.encode(text)], device=model.device)
        rows.append(model(input_ids=tokens).logits[0, -1].float().cpu())
    return torch.stack(rows)


def probe_in_fresh_process(folder: Path, compute: Compute) -> torch.Tensor:
    """Return what ``probe`` gives in a new Python process that loads the checkpoint from disk.

    Raises:
        BuildError: The checkpoint does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        command = [
            sys.executable,
            "-m",
            "pipeline.trial.probe",
            str(folder),
            str(out),
            compute.device.type,
            str(compute.dtype).removeprefix("torch."),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            raise BuildError(f"{folder} does not load in a fresh process:\n{done.stderr[-2000:]}")
        return load_file(out)["logits"]


def card(name: str, result: Result, granularity: str, lineage: Mapping[str, str]) -> str:
    """Return the model card."""
    tasks = "\n".join(
        f"| {task} | {100 * value:.1f} ± {100 * error:.1f} |" for task, (value, error) in result.tasks.items()
    )
    origin = "\n".join(f"- {key}: `{value}`" for key, value in lineage.items())
    return f"""---
library_name: transformers
tags: [pruned, mixed-precision, bitsandbytes, lora]
---
# {name}

A causal language model compressed with QPruner (arXiv 2412.11629): structured pruning,
{granularity}-wise quantization, LoRA recovery on Alpaca.

- pruned: {100 * result.ratio:g} % of the parameters
- bits, block 0 first: `{result.bits}`
- peak memory of recovery: {(result.peak_memory_bytes or 0) / GIB:.3f} GiB ({result.memory_source})
- inference: {result.inference_memory_bytes / GIB:.3f} GiB ({result.memory_source})
- mean zero-shot accuracy: {100 * result.accuracy:.1f} ± {100 * result.accuracy_stderr:.1f} % on {result.items} items

| benchmark | accuracy, % |
|---|---|
{tasks}

## Load

```python
from pipeline import checkpoint

model = checkpoint.load_final("artifacts/final")
tokenizer = checkpoint.load_tokenizer("artifacts/final")
```

From the registry, with this project installed nowhere: `mlflow.pyfunc.load_model("models:/<name>@<alias>")`.

## Origin

{origin}
"""


def verified(context: Context, bits: Sequence[int], trained: PeftModel, folder: Path) -> dict[str, float]:
    """Save into ``folder`` and compare: what was built, what a fresh process loads, what the trial computed.

    Raises:
        BuildError: The fresh process computes something else than what was saved.
    """
    built = save(context, bits, trained, folder)
    saved = probe(built, context.tokenizer)
    fresh = probe_in_fresh_process(folder, context.compute)
    difference = (saved - fresh).abs().max().item()
    if difference != 0:
        raise BuildError(
            f"the reloaded checkpoint of bits {text_of.write(bits)} differs from the built one by {difference:.3g} in "
            "its logits; nothing was written. Check that bitsandbytes and transformers are at the pinned versions"
        )
    simulated = probe(trained, context.tokenizer)
    agree = (saved.argmax(1) == simulated.argmax(1)).float().mean().item()
    return {
        "reload_difference": difference,
        "trial_difference": (saved - simulated).abs().max().item(),
        "trial_agreement": agree,
    }


def lineage_json(values: Mapping[str, str]) -> str:
    """Return lineage as JSON."""
    return json.dumps(dict(values), indent=1)
