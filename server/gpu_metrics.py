"""Memory and load of the GPUs, read from the driver with the package `nvidia-ml-py`, if it is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily


@dataclass
class Gpu:
    """The state of a GPU; None for values that its driver does not report.

    Attributes:
        index: Its number, as in `nvidia-smi`.
        used_bytes: Memory in use by all processes.
        total_bytes: Memory in all.
        utilization: Share of the last sampling period (1/6 to 1 s) in which a kernel ran, 0..1.
    """

    index: int
    used_bytes: int | None = None
    total_bytes: int | None = None
    utilization: float | None = None


class Gpus:
    """The GPUs of this machine; none without the driver or the package."""

    def __init__(self) -> None:
        self._driver = _load_driver()

    def read(self) -> list[Gpu]:
        """Read the state of every GPU."""
        driver = self._driver
        if driver is None:
            return []
        gpus = []
        for index in range(driver.nvmlDeviceGetCount()):
            gpu = Gpu(index)
            gpus.append(gpu)
            with contextlib.suppress(driver.NVMLError):
                handle = driver.nvmlDeviceGetHandleByIndex(index)
                memory = driver.nvmlDeviceGetMemoryInfo(handle)
                gpu.used_bytes, gpu.total_bytes = memory.used, memory.total
                # Last, since a GPU that is divided into instances does not report it.
                gpu.utilization = driver.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return gpus


def gpu_families(gpus: Iterable[Gpu]) -> list[Metric]:
    """Return the metrics of GPUs, without those that have no value."""
    used = GaugeMetricFamily("convscope_gpu_memory_used_bytes", "GPU memory in use, by all processes.", labels=["gpu"])
    total = GaugeMetricFamily("convscope_gpu_memory_total_bytes", "GPU memory in all.", labels=["gpu"])
    load = GaugeMetricFamily(
        "convscope_gpu_utilization_ratio",
        "Share of the driver's last sampling period in which something ran on the GPU, 0 to 1.",
        labels=["gpu"],
    )
    for gpu in gpus:
        for family, value in ((used, gpu.used_bytes), (total, gpu.total_bytes), (load, gpu.utilization)):
            if value is not None:
                family.add_metric([str(gpu.index)], value)
    return [family for family in (used, total, load) if family.samples]


def _load_driver() -> Any:
    """Return NVML's Python module, initialised, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # The package or the driver is missing, or they do not match.
        return None
    return pynvml
