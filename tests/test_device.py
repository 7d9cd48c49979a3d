"""The compute type follows from device and processor, in one place."""

import pytest
import torch

from pipeline import checks, device
from pipeline.device import Compute
from pipeline.errors import UserError
from pipeline.params import ParamsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def processor(monkeypatch):
    """Make a machine: what it is, what its processor can, whether it has a GPU."""

    def make(machine="x86_64", capability="AVX512", avx512_bf16=False, amx=False, gpu=False, gpu_bf16=True):
        monkeypatch.setattr(device.platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_bf16)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

    return make


@pytest.mark.parametrize(
    "machine, dtype",
    [
        ({"capability": "AVX2"}, torch.float32),
        ({"capability": "AVX2", "amx": True}, torch.float32),  # ATEN_CPU_CAPABILITY=avx2 on a newer one
        ({"capability": "AVX512"}, torch.float32),
        ({"capability": "AVX512", "avx512_bf16": True}, torch.bfloat16),
        ({"capability": "AVX512", "amx": True}, torch.bfloat16),
        ({"machine": "aarch64", "capability": "SVE256", "avx512_bf16": True}, torch.float32),
    ],
)
def test_processor_without_bf16_instructions_computes_in_fp32(processor, machine, dtype):
    processor(**machine)
    assert device.choose("auto", "auto") == Compute(CPU, dtype)


def test_variable_that_hides_instructions_counts(processor, monkeypatch):
    processor(avx512_bf16=True, amx=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert device.choose("cpu", "auto").dtype == torch.float32


@pytest.mark.parametrize("bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_gpu_is_taken_where_there_is_one(processor, bf16, dtype):
    processor(capability="AVX2", gpu=True, gpu_bf16=bf16)
    assert device.choose("auto", "auto") == device.choose("cuda", "auto") == Compute(CUDA, dtype)
    assert device.choose("cpu", "auto") == Compute(CPU, torch.float32)


@pytest.mark.parametrize("name, dtype", [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_type_that_is_named_is_taken(processor, name, dtype):
    processor(avx512_bf16=name == "float32")
    assert device.choose("cpu", name) == Compute(CPU, dtype)


def test_missing_gpu_is_refused_and_listed_with_the_other_faults(processor, raw_params):
    processor()
    with pytest.raises(UserError, match="device: cuda is asked for, but PyTorch sees no GPU; set device"):
        device.choose("cuda", "auto")
    raw_params["device"], raw_params["seed"] = "cuda", "forty"
    with pytest.raises(ParamsError) as caught:
        checks.parse(raw_params)
    assert "2 faults" in str(caught.value) and "\n  device: cuda is asked for" in str(caught.value)


def test_choice_is_shown_in_two_words():
    assert str(Compute(CPU, torch.bfloat16)) == "cpu, bfloat16"
