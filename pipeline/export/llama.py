"""llama.cpp, from a prebuilt wheel: what a GGUF file answers, how fast, and in how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from pipeline.export.limits import ExportError

WHEEL = "xllamacpp"
UBATCH = 512  # tokens of a prompt that llama.cpp computes at once, its default
_PATIENCE = 600  # seconds for an answer
Row = tuple[Sequence[int], Sequence[int]]  # tokens of a prompt and of its response
_FORCING = 1e4  # added to the logit of a token that must come


def installed() -> str | None:
    """Return the version of the wheel; None where it is not installed."""
    try:
        return version(WHEEL)
    except PackageNotFoundError:
        return None


def threads() -> int:
    """Return the threads that llama.cpp computes on: as many as torch, which heeds OMP_NUM_THREADS."""
    return torch.get_num_threads()


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one prompt and its answer, as llama.cpp times them."""

    prompt: float
    generated: float


class Llama:
    """A GGUF file that llama.cpp has loaded, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], slots: int, said: IO[str]):
        self._process, self._slots, self._said = process, slots, said
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise ExportError(f"llama.cpp does not load the file:\n{self._last_words()}")
        ready = json.loads(line)
        self._address: str = ready["address"]
        self._before: int = ready["resident_before"]

    def _ask(self, path: str, **asked: object) -> Any:
        body = json.dumps(asked).encode()
        request = urllib.request.Request(f"{self._address}/{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ExportError(f"llama.cpp refuses: {error.read().decode()[:500]}") from None
        except OSError as error:
            raise ExportError(f"llama.cpp ended or does not answer ({error}):\n{self._last_words()}") from None

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Return a text's tokens, with those that the tokenizer puts before it or without."""
        return self._ask("tokenize", content=text, add_special=special)["tokens"]

    def generate(self, prompt: Sequence[int], length: int) -> str:
        """Return what follows a prompt, the most likely token each time, up to the end of the text."""
        answer = self._ask("completion", prompt=list(prompt), n_predict=length, temperature=0, cache_prompt=False)
        return answer["content"]

    def log_probabilities(self, rows: Sequence[Row]) -> list[list[float | None]]:
        """Return the log-probability of each token of each row's response, given what stands before it, in nats.

        None for a token that ends within a character of several bytes: llama.cpp's server holds back what it has of it.

        Args:
            rows: (tokens of the prompt, tokens of the response).
        """
        with ThreadPoolExecutor(self._slots) as pool:
            shares = list(pool.map(lambda slot: self._share(rows[slot :: self._slots], slot), range(self._slots)))
        return [shares[index % self._slots][index // self._slots] for index in range(len(rows))]

    def _share(self, rows: Sequence[Row], slot: int) -> list[list[float | None]]:
        """Return as ``log_probabilities`` does, one row after the other; the slot keeps what it has computed of one."""
        return [
            [self._forced([*prompt, *response[:n]], response[n], slot) for n in range(len(response))]
            for prompt, response in rows
        ]

    def _forced(self, before: Sequence[int], token: int, slot: int) -> float | None:
        """Return the log-probability of one token: one that must come is told with what it has without being forced."""
        forced = {"logit_bias": [[token, _FORCING]], "temperature": 0, "n_predict": 1, "n_probs": 1}
        answer = self._ask("completion", prompt=before, id_slot=slot, cache_prompt=True, **forced)
        told = answer.get("completion_probabilities")
        if not told:
            return None
        if told[0]["id"] != token:
            raise ExportError(f"llama.cpp told the probability of token {told[0]['id']}, asked for that of {token}")
        return float(told[0]["logprob"])

    def speed(self, prompt: Sequence[int], length: int) -> Speed:
        """Time a prompt that is not yet known and ``length`` tokens after it."""
        timed = self._ask(
            "completion",
            prompt=list(prompt),
            n_predict=length,
            cache_prompt=False,
            ignore_eos=True,
            samplers=["top_k"],
            top_k=1,
        )["timings"]
        return Speed(timed["prompt_per_second"], timed["predicted_per_second"])

    def _last_words(self) -> str:
        self._process.kill()
        self._process.wait()
        self._said.seek(0)
        return self._said.read()[-2000:]

    def resident_bytes(self) -> int:
        """Return the memory that the process holds beyond what it held before the file was loaded."""
        return psutil.Process(self._process.pid).memory_info().rss - self._before


def _environment() -> dict[str, str]:
    """Return an environment in which this package is found from any folder."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextmanager
def running(
    file: Path, threads: int, context: int = 1024, slots: int = 1, adapters: Path | None = None
) -> Iterator[Llama]:
    """Give llama.cpp with a GGUF file loaded; it ends with the block.

    Args:
        file: The GGUF file.
        threads: Threads that it computes on.
        context: Tokens that one prompt and its answer may have.
        slots: Prompts that are answered at once.
        adapters: A GGUF file of LoRA adapters to add.

    Raises:
        ExportError: It does not load, or ends.
    """
    command = [sys.executable, "-m", "pipeline.export.worker", str(file), str(threads), str(context), str(slots)]
    command += [str(adapters)] if adapters else []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=_environment()
        )
        try:
            yield Llama(process, slots, said)
        finally:
            process.kill()
            process.communicate()
