"""The machine a run was made on, in words fit for a report: what it has, not what it is called."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torchvision

from training.errors import TrainingError


def choose_device(name: str) -> torch.device:
    """Return the device named `name`; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        TrainingError: The device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise TrainingError(f"there is no device {name!r} here; try --device cpu") from err
    return device


def describe(device: torch.device) -> str:
    """Return processor, cores and threads, and the GPU if it is the device."""
    cpu = f"{os.cpu_count()} CPU cores ({_processor()}), {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def _processor() -> str:
    """Return the processor's name, from a file on Linux, elsewhere from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
