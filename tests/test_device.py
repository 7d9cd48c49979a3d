"""Where models run: a GPU that is asked for and not there is refused before anything loads."""

import pytest
import torch

from pipeline import device
from pipeline.errors import UserError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_missing_gpu_is_refused_with_the_key_and_the_remedy(no_gpu):
    with pytest.raises(UserError, match=r"^device: cuda .* sees no GPU; set device to auto or cpu$"):
        device.choose("cuda", "auto")


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_without_a_gpu_the_cpu_computes(no_gpu, asked):
    assert device.choose(asked, "float32") == device.Compute(torch.device("cpu"), torch.float32)
