"""Memory and load of the GPUs, asked of the driver by the package `nvidia-ml-py`, if that is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily


@dataclass
class Gpu:
    """One GPU now; None for what its driver does not tell.

    Attributes:
        index: Its number, as `nvidia-smi` counts.
        used_bytes: Memory in use, by whomever.
        total_bytes: Memory there is.
        utilization: Share of the last sampling period (1/6 to 1 s) in which a kernel ran, 0..1.
    """

    index: int
    used_bytes: int | None = None
    total_bytes: int | None = None
    utilization: float | None = None


class Gpus:
    """The GPUs of this machine; none without driver or package."""

    def __init__(self) -> None:
        self._driver = _load_driver()

    def read(self) -> list[Gpu]:
        """Ask the driver about every GPU."""
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
                # Last: a GPU cut into instances does not tell.
                gpu.utilization = driver.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return gpus


def gpu_families(gpus: Iterable[Gpu]) -> list[Metric]:
    """Return the metrics of GPUs; those without a value are left out."""
    used = GaugeMetricFamily("convscope_gpu_memory_used_bytes", "GPU memory in use, by whomever.", labels=["gpu"])
    total = GaugeMetricFamily("convscope_gpu_memory_total_bytes", "GPU memory there is.", labels=["gpu"])
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
    """Return NVML's Python module, ready for questions, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # Not installed, no driver, or one that does not fit.
        return None
    return pynvml
