"""The built model in llama.cpp: how close its answers are to the built model's, and how fast beside the untouched.

    python -m benchmarks.exported answers [rows=FILE] [count=16] [FORM ...]
    python -m benchmarks.exported speed [rounds=7] [threads=N] [FORM ...]
    python -m benchmarks.exported questions

In a project's folder, after ``build``. FORM names a file: ``untouched-f16``, ``untouched-bf16``, ``untouched-q8``,
``built`` (as the stage writes it), ``nearest`` (each weight at its nearest level), ``separate`` (adapters beside),
``built-q5`` (4 bits as Q5_0), ``built-f16``; files are written to ``artifacts/benchmark`` and kept there. ``answers``:
nats of a response token beside the built model's, on the rows held out of recovery, or on ``count`` rows of another
file. ``speed``: tokens a second of prompts of 128 tokens and of 32 generated tokens, one file after the other in every
round. ``questions``: greedy answers to five, of the file and of the built model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Kind

from pipeline import checkpoint, checks
from pipeline.data import alpaca
from pipeline.export import answers, dense, gguf_file, llama, speed
from pipeline.export.gguf_file import Types
from pipeline.paths import ALPACA, BASE, FINAL
from pipeline.stages import export

PLACE = Path("artifacts/benchmark")
LENGTH = 48  # tokens of an answer
FORMS = {
    "untouched-f16": (BASE, Types(*(Kind.F16,) * 5)),
    "untouched-bf16": (BASE, gguf_file.SIXTEEN),
    "untouched-q8": (BASE, Types(*(Kind.Q8_0,) * 5)),
    "built": (FINAL, Types()),
    "nearest": (FINAL, Types()),
    "separate": (FINAL, Types()),
    "built-q5": (FINAL, Types(four=Kind.Q5_0)),
    "built-f16": (FINAL, Types(*(Kind.F16,) * 5)),
}
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a sentence about the sea.",
    "Give two tips for staying healthy.",
    "Why is the sky blue?",
)


def file_of(form: str) -> tuple[Path, Path | None]:
    """Return the GGUF file of a form and its adapters; they are written if they are not there."""
    folder, types = FORMS[form]
    file, adapters = PLACE / f"{form}.gguf", PLACE / "adapters.gguf" if form == "separate" else None
    if not file.exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        model, merge = dense.read(folder), adapters is None
        rounded = {}
        if form in ("built", "separate"):
            rounded = export.fitted(checks.load(), model, model.merged if merge else model.base)
        gguf_file.write(file, model, checkpoint.load_tokenizer(folder), form, types, merge=merge, rounded=rounded)
        if adapters:
            gguf_file.write_adapters(adapters, model, form)
    return file, adapters


def compare(forms: Sequence[str], file: Path, count: int | None) -> None:
    """Print how each form's answers compare with the built model's."""
    params, tokenizer = checks.load(), checkpoint.load_tokenizer(FINAL)
    _, held_out = alpaca.split(alpaca.read(file), count or params.data.validation_rows, params.seed)
    rows = answers.rows_of(alpaca.encode(held_out, tokenizer, params.recover.max_length))
    built = answers.log_probabilities(checkpoint.load_final(FINAL), rows)
    for form in forms:
        path, adapters = file_of(form)
        with llama.running(path, llama.threads(), params.recover.max_length, 4, adapters) as running:
            print(form, path.stat().st_size, answers.compare(running.log_probabilities(rows), built), flush=True)


def race(forms: Sequence[str], rounds: int, threads: int) -> None:
    """Print each form's speed, size and memory, and how many times as fast as the first one it is."""
    files = {form: file_of(form) for form in forms}
    vocabulary = checkpoint.load_config(BASE).vocab_size
    beside = {form: adapters for form, (_, adapters) in files.items() if adapters}
    timed = speed.interleaved({form: file for form, (file, _) in files.items()}, rounds, threads, vocabulary, beside)
    first = timed[forms[0]]
    print(f"{threads} threads, batches of {llama.UBATCH}, {rounds} rounds, xllamacpp {llama.installed()}")
    for form, found in timed.items():
        ratios = (
            speed.ratio([getattr(each, kind) for each in found.rounds], [getattr(each, kind) for each in first.rounds])
            for kind in ("prompt", "generated")
        )
        print(
            f"{form}: {files[form][0].stat().st_size / 1e6:.1f} MB, resident {found.resident_bytes / 1e6:.0f} MB, "
            f"prompt {found.prompt:.1f}, generated {found.generated:.1f} tokens/s, ratios "
            + " ".join(f"{ratio:.2f}" for ratio in ratios)
        )


def ask() -> None:
    """Print greedy answers of the built model's file and of the built model."""
    tokenizer = checkpoint.load_tokenizer(FINAL)
    prompts = {question: tokenizer.encode(alpaca.prompt(question)) for question in QUESTIONS}
    with llama.running(file_of("built")[0], llama.threads(), 256) as running:
        told = {question: running.generate(prompt, LENGTH) for question, prompt in prompts.items()}
    model = checkpoint.load_final(FINAL)
    for question, prompt in prompts.items():
        tokens = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False)
        own = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
        print(f"{question}\n  file:  {told[question].strip()!r}\n  model: {own.strip()!r}", flush=True)


def main(what: str, *given: str) -> None:
    """Run a command."""
    options = dict(each.split("=", 1) for each in given if "=" in each)
    forms = [each for each in given if "=" not in each]
    if what == "answers":
        rows = Path(options.get("rows", ALPACA))
        compare(forms or ["built", "separate"], rows, int(options["count"]) if "count" in options else None)
    elif what == "speed":
        named = forms or ["untouched-f16", "untouched-bf16", "untouched-q8", "built", "separate"]
        race(named, int(options.get("rounds", 7)), int(options.get("threads", llama.threads())))
    else:
        ask()


if __name__ == "__main__":
    main(*sys.argv[1:])
