"""What the dense model predicts for the rows that trials train on: computed once, kept, and read by all trials.

The loss of a state x against a predicted distribution p is log sum exp Wx - x' W'p, W the head. So of p it takes W'p
alone, a vector of the hidden size, exact for any vocabulary. It needs a head that recovery does not change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline import checkpoint, console, storage
from pipeline.compress.modules import head_of, last_states, mean_embedding
from pipeline.console import progress
from pipeline.data.alpaca import IGNORED, Example, batch
from pipeline.device import Compute

Targets = Mapping[Example, torch.Tensor]  # of a row: W'p at each token that is predicted, [tokens, hidden]
_ROWS = 8  # of a pass
_KEPT = 32  # rows whose answers stand in one file
_FILE = "answers.safetensors"


@dataclass
class Teacher:
    """The dense model, asked when a row is needed that was not asked for before.

    Attributes:
        base: Its folder.
        kept: Where answers are kept, in a folder for each few rows.
        padding: Token id of padded positions.
        compute: Where it runs and in which type.
    """

    base: Path
    kept: Path
    padding: int
    compute: Compute
    _known: dict[bool, dict[Example, torch.Tensor]] = field(default_factory=dict, repr=False)

    def targets(self, rows: Sequence[Example], whole: bool = False) -> Targets:
        """Return what it predicts for rows, from memory, from a file, or computed now.

        Args:
            rows: Rows.
            whole: At all their tokens but the first; else at those of the responses.

        Raises:
            CheckpointError: The dense model is missing or was changed.
        """
        rows, known = list(dict.fromkeys(rows)), self._known.setdefault(whole, {})
        if all(row in known for row in rows):
            return known
        base, model = storage.verify(self.base, "fetch"), None
        # In parts, so that a longer recovery of the same rows asks for the further ones alone.
        parts = [rows[start : start + _KEPT] for start in range(0, len(rows), _KEPT)]
        for part in progress(parts, "the dense model's answers"):
            defined = [base, str(self.compute.dtype), whole, [(row.tokens, row.response, *row.gaps) for row in part]]
            folder = self.kept / hashlib.sha256(json.dumps(defined).encode()).hexdigest()[:12]
            answers = _read(folder, part)
            if answers is None:
                model = model or checkpoint.load_base(self.base, self.compute.device, self.compute.dtype)
                answers = ask(model, part, self.padding, whole)
                with storage.writing(folder) as unfinished:
                    save_file({str(number): answers[row] for number, row in enumerate(part)}, unfinished / _FILE)
            known |= answers
        return known


def _read(folder: Path, rows: Sequence[Example]) -> Targets | None:
    """Return kept answers; None if there are none, or damaged ones, which is said."""
    if not folder.exists():
        return None
    try:
        storage.verify(folder, "search")
    except storage.CheckpointError:
        console.note(f"{folder} is damaged; the dense model is asked again")
        return None
    tensors = load_file(folder / _FILE)
    return {row: tensors[str(number)] for number, row in enumerate(rows)}


@torch.no_grad()
def ask(
    model: torch.nn.Module, rows: Sequence[Example], padding: int, whole: bool = False
) -> dict[Example, torch.Tensor]:
    """Return W'p at each predicted token of rows, [tokens, hidden] each, in the model's type and the CPU's memory.

    Args:
        model: The dense model.
        rows: Rows; those of like length share a pass.
        padding: Token id of padded positions.
        whole: At all their tokens but the first; else at those of the responses.
    """
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    device = head_of(model).weight.device
    answers: dict[Example, torch.Tensor] = {}
    for start in range(0, len(ordered), _ROWS):
        part = ordered[start : start + _ROWS]
        here = batch(part, padding, whole).to(device)
        states = last_states(model, here.tokens)[:, :-1]
        for row, state, labels in zip(part, states, here.labels[:, 1:], strict=True):
            answers[row] = mean_embedding(model, state[labels != IGNORED]).to(state.dtype).cpu()
    return answers
