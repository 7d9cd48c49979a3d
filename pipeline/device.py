"""Where models run: on a GPU if there is one and the params allow it, else on the CPU."""

from __future__ import annotations

import torch

from pipeline.params import Params


def device_of(params: Params) -> torch.device:
    """Return the device that the params ask for.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is asked for, but PyTorch sees no GPU; set device to auto or cpu")
    return torch.device("cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu")
