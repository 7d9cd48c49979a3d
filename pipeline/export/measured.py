"""What was measured of an exported model: as metrics, as the card's figures, and as its table of costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.export import llama, speed
from pipeline.export.answers import Agreement
from pipeline.export.card import Form
from pipeline.export.speed import GENERATED, PROMPT, Timed

_MB = 1e6


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        built: What follows from the built model's shapes, as ``speed.analytic`` gives it.
        untouched: The same of the untouched model.
        agreement: How the GGUF file answers; None: it was not checked.
        speeds: Of ``untouched`` (16 bits) and ``built``; None: they were not timed.
        untouched_bytes: Of the untouched model as a GGUF file of 16 bits.
        on_gpu: Speeds of the same two in transformers on a GPU; None: there is none, or they were not timed.
    """

    built: Mapping[str, float]
    untouched: Mapping[str, float]
    agreement: Agreement | None = None
    speeds: Mapping[str, Timed] | None = None
    untouched_bytes: int = 0
    on_gpu: Mapping[str, Timed] | None = None

    def checked(self, agreement: Agreement) -> Measured:
        """Return this with how the file answers."""
        return replace(self, agreement=agreement)

    def timed(self, speeds: Mapping[str, Timed], untouched_bytes: int) -> Measured:
        """Return this with the speeds."""
        return replace(self, speeds=speeds, untouched_bytes=untouched_bytes)

    def timed_on_gpu(self, speeds: Mapping[str, Timed]) -> Measured:
        """Return this with the speeds on a GPU."""
        return replace(self, on_gpu=speeds)

    def figures(self) -> dict[str, float]:
        """Return all of it as metrics. ``gguf_checked`` is 0 where llama.cpp was not there to check the file."""
        found = dict(self.built) | {f"untouched_{key}": value for key, value in self.untouched.items()}
        found["gguf_checked"] = float(self.agreement is not None)
        if self.agreement:
            found |= {
                "gguf_difference": self.agreement.difference,
                "gguf_difference_stderr": self.agreement.stderr,
                "gguf_apart": self.agreement.apart,
                "gguf_tokens": self.agreement.tokens,
            }
        if self.speeds:
            for name, timed in self.speeds.items():
                prefix = "" if name == "built" else f"{name}_"
                found |= {
                    f"{prefix}prompt_tokens_per_second": timed.prompt,
                    f"{prefix}generated_tokens_per_second": timed.generated,
                    f"{prefix}resident_bytes": timed.resident_bytes,
                }
            found |= {"untouched_gguf_bytes": self.untouched_bytes, "threads": llama.threads(), "batch": llama.UBATCH}
            for kind in ("prompt", "generated"):
                found[f"{kind}_speedup"] = self._speedup(kind)
        for name, timed in (self.on_gpu or {}).items():
            prefix = "gpu_" if name == "built" else f"{name}_gpu_"
            found |= {
                f"{prefix}prompt_tokens_per_second": timed.prompt,
                f"{prefix}generated_tokens_per_second": timed.generated,
                f"{prefix}peak_bytes": timed.resident_bytes,
            }
        return found

    def _speedup(self, kind: str) -> float:
        assert self.speeds
        one, other = ([getattr(each, kind) for each in self.speeds[name].rounds] for name in ("built", "untouched"))
        return speed.ratio(one, other)


def sizes(folder: Path) -> dict[str, float]:
    """Return the bytes of each form in a folder, by ``<form>_bytes``."""
    return {f"{form.name}_bytes": _size(form) for form in sorted(folder.iterdir()) if form.is_dir()}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "Modelfile")


def forms(name: str, folder: Path, found: Measured) -> list[Form]:
    """Return the forms in a folder, for the card."""
    made = []
    if (folder / "gguf").exists():
        beside = f" --lora gguf/{name}-adapters.gguf" if (folder / "gguf" / f"{name}-adapters.gguf").exists() else ""
        made.append(
            Form(
                "GGUF, for llama.cpp and what is built on it",
                "One file with tokenizer, chat template and a type for each tensor: 4 bits are IQ4_NL, 8 bits Q8_0. "
                "NF4's levels are not IQ4_NL's, so weights are rounded once more. `llama-cli -m` chats. For Ollama, "
                "`Modelfile` lies beside.",
                f'llama-completion -m gguf/{name}.gguf{beside} -no-cnv -n 32 -p "The capital of France is"\n'
                f"cd gguf && ollama create {name} && ollama run {name}",
                "sh",
                _size(folder / "gguf"),
                {"answers": _answers(found.agreement)},
            )
        )
    if (folder / "hf").exists():
        made.append(
            Form(
                "hf, for transformers, bitsandbytes and peft",
                "The built model to the bit: bitsandbytes' codes and the LoRA adapters, with the code that loads them.",
                "from transformers import AutoModelForCausalLM\n"
                'model = AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)',
                "python",
                _size(folder / "hf"),
            )
        )
    if (folder / "plain").exists():
        made.append(
            Form(
                "plain, for transformers, vLLM and others",
                "Dense 16-bit weights with the adapters added, under a class of transformers' own: all blocks have one "
                "shape.",
                'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("plain")',
                "python",
                _size(folder / "plain"),
            )
        )
    return made


def _answers(agreement: Agreement | None) -> str:
    if agreement is None:
        return f"not checked: llama.cpp was not there (pip install {llama.WHEEL})"
    word = "worse" if agreement.difference < 0 else "better"
    return (
        f"{abs(agreement.difference):.4f} ± {agreement.stderr:.4f} nats a response token {word} than the built model, "
        f"on {agreement.tokens} tokens of held-out rows ({agreement.apart:.4f} apart in the mean)"
    )


def costs(found: Measured) -> dict[str, dict[str, str]]:
    """Return the table of what running costs: row -> model -> text."""
    analytic = {
        "parameters": "parameters, million",
        "multiply_adds": "multiply-adds a token, million",
    }
    rows = {
        label: {"untouched": f"{found.untouched[key] / 1e6:.1f}", "built": f"{found.built[key] / 1e6:.1f}"}
        for key, label in analytic.items()
    }
    rows["keys and values a token, kB"] = {
        "untouched": f"{found.untouched['cache_bytes'] / 1e3:.1f}",
        "built": f"{found.built['cache_bytes'] / 1e3:.1f}",
    }
    if found.speeds:
        setting = f"{llama.threads()} threads, batches of {llama.UBATCH}"
        untouched, built = found.speeds["untouched"], found.speeds["built"]
        rows[f"prompt of {PROMPT} tokens, tokens/s ({setting})"] = {
            "untouched": f"{untouched.prompt:.0f}",
            "built": f"{built.prompt:.0f}",
        }
        rows[f"{GENERATED} generated tokens, tokens/s ({setting})"] = {
            "untouched": f"{untouched.generated:.1f}",
            "built": f"{built.generated:.1f}",
        }
        rows["resident memory, MB"] = {
            "untouched": f"{untouched.resident_bytes / _MB:.0f}",
            "built": f"{built.resident_bytes / _MB:.0f}",
        }
    return rows
