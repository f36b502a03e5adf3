"""CPU time and memory of a process and its descendants, and the CPU time that others used."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "torch", "torchvision", "torchserve", "numpy", "pillow", "protobuf", "onnxruntime", "opencv-python-headless",
    "fastapi", "uvicorn", "litserve", "mosec", "bentoml", "ray", "kserve",
)  # fmt: skip


def cpu_s(pid: int) -> dict[str, float]:
    """Return processor seconds of a process and its descendants so far, by program: `java`, `mosec`, else `python`."""
    used: dict[str, float] = {}
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            times, name = process.cpu_times(), process.name()
            kind = name if name in ("java", "mosec") else "python"
            used[kind] = used.get(kind, 0.0) + times.user + times.system
    return used


def memory_mib(pid: int) -> list[dict[str, Any]]:
    """Return unique and proportional memory, in MiB, of each process of a tree."""
    found = []
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            memory, command = process.memory_full_info(), " ".join(process.cmdline())
            name = "worker" if "model_service_worker" in command else process.name()
            found.append({"name": name, "uss": memory.uss / 2**20, "pss": memory.pss / 2**20})
    return found


class Interval:
    """Share of all processors that others used since its creation: other guests (steal) and other processes here."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def end(self, ours_s: float) -> tuple[float, float]:
        """Return the shares of steal and of other processes.

        Args:
            ours_s: Processor seconds that the measurement itself used meanwhile.
        """
        after = psutil.cpu_times()
        spent = {name: getattr(after, name) - getattr(self._before, name) for name in after._fields}
        total = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
        busy = total - spent["idle"] - spent.get("iowait", 0.0) - spent.get("steal", 0.0)
        return spent.get("steal", 0.0) / total, max(0.0, busy - ours_s) / total


def circumstances() -> dict[str, Any]:
    """Return the circumstances of a measurement: versions and the machine."""
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory_gib = psutil.virtual_memory().total / 2**30
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "machine": f"{os.cpu_count()} cores, {model or platform.machine()}, {memory_gib:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": versions,
    }


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
