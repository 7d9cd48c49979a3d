"""What the command line makes of a stage's failure."""

import pytest
import torch

from pipeline import __main__ as command
from pipeline import stages


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["2 GiB", "micro_batch_size", "plan"]),
        (ValueError("prune.ratio: too much"), ["prune.ratio: too much"]),
    ],
)
def test_expected_failure_is_one_message_and_no_traceback(error, said, monkeypatch, capsys):
    def fails(_):
        raise error

    monkeypatch.setitem(stages.STAGES, "prune", fails)
    assert command._stage("prune", None) == 1
    told = capsys.readouterr().err
    assert told.startswith("error in stage prune: ") and "Traceback" not in told
    assert all(part in told for part in said)
    assert ("micro_batch_size" in told) == isinstance(error, torch.OutOfMemoryError)


def test_any_other_failure_shows_where(monkeypatch):
    def fails(_):
        raise KeyError("a bug")

    monkeypatch.setitem(stages.STAGES, "prune", fails)
    with pytest.raises(KeyError):
        command._stage("prune", None)
