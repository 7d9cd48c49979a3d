"""Stage ``export``: the built model in the forms that other programs run, checked and timed there.

Reads ``artifacts/final``, ``artifacts/base`` (timed beside it) and ``data/alpaca.jsonl``. Writes ``artifacts/export``
and ``reports/export.json``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import architecture, checkpoint, console, device, storage
from pipeline.data import alpaca
from pipeline.export import answers, card, dense, feedback, gguf_file, hf, limits, llama, measured, speed
from pipeline.export.answers import Agreement
from pipeline.export.dense import Dense, Load
from pipeline.export.measured import Measured
from pipeline.params import Params
from pipeline.paths import ALPACA, BASE, EXPORT, FINAL
from pipeline.stages import quantize
from pipeline.stages.shell import keep_figures
from pipeline.tracking import Run

if TYPE_CHECKING:
    import torch


def run(params: Params, run: Run) -> None:
    """Run the stage."""
    storage.verify(FINAL, "build")
    built, section = dense.read(FINAL), params.export
    if "gguf" in section.formats and (fault := limits.gguf(built.config)):
        raise limits.ExportError(fault)
    found = Measured(speed.analytic(built.config), speed.analytic(checkpoint.load_config(BASE)))
    with storage.writing(EXPORT) as folder:
        if "gguf" in section.formats:
            found = _gguf(params, built, folder, found)
        found = _on_gpu(params, found)
        if "hf" in section.formats:
            _hf(built, folder)
        name = params.register_.name
        lineage = storage.read_json(FINAL / "lineage.json", "build")
        text = card.card(name, measured.forms(name, folder, found), measured.costs(found), lineage)
        (folder / "README.md").write_text(text, encoding="utf-8")
        figures = found.figures() | measured.sizes(folder)
    run.artifact(EXPORT / "README.md")
    keep_figures(run, "export", figures)


def _gguf(params: Params, built: Dense, folder: Path, found: Measured) -> Measured:
    """Write the GGUF file and what belongs to it, check its answers and time it; return what was measured."""
    section, name, tokenizer = params.export, params.register_.name, checkpoint.load_tokenizer(FINAL)
    merge = section.adapters == "merged" or not built.adapters
    file, adapters = folder / "gguf" / f"{name}.gguf", None
    file.parent.mkdir()
    lineage = storage.read_json(FINAL / "lineage.json", "build")
    rounded = fitted(params, built, built.merged if merge else built.base)
    gguf_file.write(file, built, tokenizer, name, lineage=lineage, merge=merge, rounded=rounded)
    if not merge:
        adapters = file.with_name(f"{name}-adapters.gguf")
        gguf_file.write_adapters(adapters, built, name)
    ollama = card.modelfile(
        file.name, bool(tokenizer.chat_template), tokenizer.eos_token, adapters.name if adapters else None
    )
    (file.parent / "Modelfile").write_text(ollama, encoding="utf-8")
    if not llama.installed():
        console.note(
            f"export: {name}.gguf is written and not checked, as llama.cpp is not here; install it and export again: "
            f"pip install {llama.WHEEL}"
        )
        return found
    agreement = _checked(params, file, adapters)
    answers.judge(agreement, section.tolerance)
    found = found.checked(agreement)
    if not section.rounds:
        return found
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # the untouched model is there to be timed
        other = Path(scratch) / "untouched.gguf"
        gguf_file.write(other, dense.read(BASE), checkpoint.load_tokenizer(BASE), "untouched", gguf_file.SIXTEEN)
        timed = speed.interleaved(
            {"untouched": other, "built": file},
            section.rounds,
            llama.threads(),
            built.config.vocab_size,
            {"built": adapters} if adapters else None,
        )
        return found.timed(timed, other.stat().st_size)


def fitted(params: Params, built: Dense, weight: Load) -> dict[str, torch.Tensor]:
    """Return the 4-bit linears in llama.cpp's type, fitted to what they receive where the bank's codes were."""
    if params.quantize.method != "calibrated":
        return {}
    text = feedback.enough(quantize.calibration_set(params, FINAL), built)
    return feedback.rounded(built, weight, text, device.choose(params.device, params.dtype))


def _on_gpu(params: Params, found: Measured) -> Measured:
    """Time both models in transformers and bitsandbytes where there is a GPU."""
    compute, rounds = device.choose(params.device, params.dtype), params.export.rounds
    if compute.device.type != "cuda" or not rounds:
        return found
    speeds = {"built": speed.in_transformers(checkpoint.load_final(FINAL, compute.device, compute.dtype), rounds)}
    speeds["untouched"] = speed.in_transformers(checkpoint.load_base(BASE, compute.device, compute.dtype), rounds)
    return found.timed_on_gpu(speeds)


def _checked(params: Params, file: Path, adapters: Path | None) -> Agreement:
    """Return how a file's log-probabilities of the held-out responses compare with the built model's."""
    tokenizer = checkpoint.load_tokenizer(FINAL)
    _, held_out = alpaca.split(alpaca.read(ALPACA), params.data.validation_rows, params.seed)
    rows = answers.rows_of(alpaca.encode(held_out, tokenizer, params.recover.max_length))
    texts, tokens = zip(*(alpaca.asked(row, tokenizer) for row in held_out), strict=True)
    with llama.running(file, llama.threads(), params.recover.max_length, slots=4, adapters=adapters) as running:
        answers.check_tokens(running, texts, tokens, special="messages" not in held_out[0])
        theirs = running.log_probabilities(rows)
    compute = device.choose(params.device, params.dtype)
    return answers.compare(
        theirs, answers.log_probabilities(checkpoint.load_final(FINAL, compute.device, compute.dtype), rows)
    )


def _hf(built: Dense, folder: Path) -> None:
    """Write the folders for transformers."""
    hf.with_code(FINAL, folder / "hf")
    if limits.one_shape(architecture.shapes(built.config)):
        hf.plain(built, checkpoint.load_tokenizer(FINAL), folder / "plain")
