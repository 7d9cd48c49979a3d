"""Do the exported folders load where this project is not, and answer the same?

    python -m benchmarks.elsewhere [env=FOLDER] [index=ADDRESS] [BUILT ...]

Makes a virtual environment with torch, transformers, bitsandbytes and peft alone, in the versions of requirements.txt,
and loads there what the stage ``export`` writes of each BUILT folder (such as ``artifacts/final``): ``hf`` with its own
code, and ``plain`` as a class of transformers' own where all blocks have one shape. Without BUILT: tiny models of every
family, of free and of one shape. ``env`` keeps the environment for the next time; ``index`` is a package index to take
torch from, such as that of its CPU builds.

A line for each folder: the class that loaded, and the greatest difference of its logits on 64 tokens, and of the
logits themselves from zero: ``hf`` beside the built model's, ``plain`` beside the built model's weights made dense.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pipeline import architecture, checkpoint
from pipeline.device import Compute
from pipeline.export import dense, hf, limits

NEEDED = ("torch", "transformers", "bitsandbytes", "peft")
TOKENS, SEED = 64, 0
THERE = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM
if importlib.util.find_spec("pipeline"):
    sys.exit("this project is importable")
folder, tokens, answers = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=folder.endswith("hf")).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(tokens)).logits.float(), answers)
print(f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}")
"""


def environment(folder: Path, index: str | None) -> Path:
    """Return the interpreter of an environment that has what is needed and nothing else; made if it is not there."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    pins = [line for line in Path("requirements.txt").read_text().splitlines() if line.partition("==")[0] in NEEDED]
    venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    if index:
        subprocess.run([*install, "--index-url", index, *(pin for pin in pins if pin.startswith("torch="))], check=True)
    subprocess.run([*install, *pins], check=True)
    return python


def tiny(folder: Path) -> Iterator[Path]:
    """Yield built folders of tiny random models: every family, free shapes and one shape."""
    from tests.fixtures import exports, models

    tokenizer = models.trained_tokenizer()
    for family in models.FAMILIES:
        for name, shapes in (("free", exports.FREE), ("uniform", exports.UNIFORM)):
            exports.save_built(folder / f"{family}-{name}", tokenizer, family, shapes)
            yield folder / f"{family}-{name}"


def expected(built: Path, form: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return what a form of a built model should answer."""
    if form == "hf":
        model = checkpoint.load_final(built)
    else:
        model = dense.read(built).model(Compute(torch.device("cpu"), checkpoint.STORED))
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def compare(built: Path, python: Path, scratch: Path) -> None:
    """Print a line for each form of a built model."""
    model, folder = dense.read(built), Path(tempfile.mkdtemp(dir=scratch))
    hf.with_code(built, folder / "hf")
    forms = ["hf"]
    if limits.one_shape(architecture.shapes(model.config)):
        hf.plain(model, checkpoint.load_tokenizer(built), folder / "plain")
        forms.append("plain")
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    torch.save(tokens, folder / "tokens.pt")
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    alone = {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    for form in forms:
        command = [python, "-c", THERE, folder / form, folder / "tokens.pt", folder / "answers.pt"]
        done = subprocess.run(command, cwd=scratch, env=known | alone, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{built.name}, {form}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        theirs, ours = torch.load(folder / "answers.pt"), expected(built, form, tokens)
        print(
            f"{built.name}, {form}: {done.stdout.strip()}, logits differ by at most {(theirs - ours).abs().max():.3g} "
            f"(largest {ours.abs().max():.3g})",
            flush=True,
        )


def main(words: Sequence[str]) -> None:
    """Compare all forms of all folders."""
    given = dict(word.split("=", 1) for word in words if word.startswith(("env=", "index=")))
    folders = [Path(word).resolve() for word in words if not word.startswith(("env=", "index="))]
    with tempfile.TemporaryDirectory() as kept:
        scratch = Path(kept)
        python = environment(Path(given.get("env", scratch / "env")).resolve(), given.get("index"))
        for built in folders or tiny(scratch / "built"):
            compare(built, python, scratch)


if __name__ == "__main__":
    main(sys.argv[1:])
