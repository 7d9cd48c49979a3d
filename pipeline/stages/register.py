"""Stage ``register``: the built checkpoint into the model registry, with its figures and, if it is better, the alias.

Reads ``artifacts/final``, ``artifacts/export`` and the figures of ``build``, ``evaluate`` and ``export``. Writes
``reports/register.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from pipeline import GIB, bits, console, storage, tracking
from pipeline.params import Params, digest
from pipeline.paths import EXPORT, FINAL, REPORTS
from pipeline.results import labels
from pipeline.stages.serving import Settings
from pipeline.stages.shell import made
from pipeline.tracking import Packed, Registration, Run, Standing

_NEEDED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")  # to serve the model
_EXAMPLE = "What is the capital of France?"


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    storage.verify(FINAL, "build")
    built, judged = made("build"), made("evaluate")
    lineage = storage.read_json(FINAL / "lineage.json", "build")
    exported = made("export")
    figures = {f"build_{key}": value for key, value in built.items()} | judged
    figures |= {f"export_{key}": value for key, value in exported.items()}
    figures["size_mb"] = sum(path.stat().st_size for path in FINAL.rglob("*") if path.is_file()) / 1e6
    standing = _standing(params, built, judged, lineage)
    facts = _facts(built, exported, figures["size_mb"], lineage)
    section = params.register_
    asked = Registration(
        name=section.name,
        alias=section.alias,
        promote=section.promote,
        standing=standing,
        description=_description(section.name, section.alias, standing, judged, facts),
        metrics=figures,
        tags=lineage | facts,
    )
    root = tracking.root()
    pinned = [line for line in (root / "requirements.txt").read_text().splitlines() if line.split("==")[0] in _NEEDED]
    packed = Packed(
        model_code=root / "pipeline" / "stages" / "served.py",
        checkpoint=FINAL.absolute(),
        code=[root / "pipeline"],
        requirements=pinned,
        params=asdict(Settings()),
        example=[_EXAMPLE],
        others={"gguf": EXPORT / "gguf"} if (EXPORT / "gguf").exists() else {},
    )
    run.metrics(figures)
    registered = tracking.register_model(run, asked, packed)
    run.tags({"model": registered.uri, "alias": section.alias if registered.promoted else ""})
    kept = {"model": registered.uri, "alias": section.alias if registered.promoted else None}
    storage.write_text(REPORTS / "register.json", json.dumps(kept | {"reason": registered.reason}, indent=1))
    named = f"as models:/{section.name}@{section.alias}" if registered.promoted else f"without alias {section.alias}"
    console.note(f"registered {registered.uri} {named}: {registered.reason}")


def _standing(
    params: Params, built: Mapping[str, float], judged: Mapping[str, float], lineage: Mapping[str, str]
) -> Standing:
    """Return the model's score by the search's objective: on unseen items, or on the held-out rows that build saw."""
    objective = params.search.objective
    items = digest(
        [lineage["alpaca_md5"], lineage["benchmarks_md5"], lineage["base_model"]],
        [params.evaluate.model_dump(mode="json"), params.data.validation_rows, params.recover.max_length, params.seed],
    )
    return Standing(objective, float(judged[objective] if objective in judged else built[objective]), items)


def _facts(
    built: Mapping[str, float], exported: Mapping[str, float], size_mb: float, lineage: Mapping[str, str]
) -> dict[str, str]:
    """Return what tells versions apart, in words."""
    text = lineage.get("bits")
    memory = {"training": "peak_memory_bytes", "inference": "inference_memory_bytes"}
    return {
        **({"pruned": labels.ratio(float(lineage["ratio"])), "bits_summary": bits.summary(text)} if text else {}),
        **{f"{name}_memory": f"{built[key] / GIB:.3f} GiB" for name, key in memory.items() if key in built},
        "size": f"{size_mb:.0f} MB",
        **({"gguf_size": f"{exported['gguf_bytes'] / 1e6:.0f} MB"} if "gguf_bytes" in exported else {}),
        **({"speed": _speed(exported)} if "generated_speedup" in exported else {}),
    }


def _speed(exported: Mapping[str, float]) -> str:
    return (
        f"{exported['generated_tokens_per_second']:.0f} tokens/s in llama.cpp on {exported['threads']:.0f} threads, "
        f"{exported['generated_speedup']:.2f} times the untouched model's at 16 bits"
    )


def _description(
    name: str, alias: str, standing: Standing, judged: Mapping[str, float], facts: Mapping[str, str]
) -> str:
    """Return what the version is, how good, how large and how to run it, in Markdown."""
    listed = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items())
    accuracy = f"{100 * judged['accuracy']:.1f} ± {100 * judged['accuracy_stderr']:.1f} %"
    return f"""A causal language model, pruned, quantized to 4 and 8 bits and recovered with LoRA (QPruner).

- accuracy: {accuracy} on {judged["items"]:.0f} items
- {standing.objective}: {standing.score:.4f}
{listed}

```python
import mlflow

mlflow.set_tracking_uri("...")  # the store that this page is in: sqlite:////path/to/mlflow.db or http://server:5000
model = mlflow.pyfunc.load_model("models:/{name}@{alias}")
print(model.predict(["{_EXAMPLE}"], params={{"max_new_tokens": 64}}))
```
"""
