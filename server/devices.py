"""The GPUs that TorchServe will use, and the cores available to this process.

GPUs are counted with `nvidia-smi`, as TorchServe does: it does not use a GPU that `nvidia-smi` does not list.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from server.failures import Failure


def count_gpus(device: str, environment: Mapping[str, str] | None = None) -> int:
    """Count the GPUs to serve on.

    Args:
        device: `auto` (all there are), `cpu` (none) or `cuda` (at least one).
        environment: Variables to look in (`CUDA_VISIBLE_DEVICES`); None for the process's own.

    Raises:
        Failure: `device` is `cuda` and there is no GPU, or TorchServe cannot read `CUDA_VISIBLE_DEVICES`.
    """
    if device == "cpu":
        return 0
    listed = found = list_gpus()
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if listed and visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        if not all(name.isdecimal() for name in names):
            raise Failure(
                f"CUDA_VISIBLE_DEVICES is {visible}: TorchServe reads plain numbers only, for instance "
                "CUDA_VISIBLE_DEVICES=0; set it so, or serve with --device cpu"
            )
        listed = listed[: len(names)]
    if device == "cuda" and not listed:
        why = "CUDA_VISIBLE_DEVICES hides them all" if found else "nvidia-smi finds none"
        raise Failure(
            f"--device cuda, but there is no GPU to serve on ({why}): install the driver, or use --device cpu"
        )
    return len(listed)


def list_gpus() -> list[str]:
    """List the GPUs that nvidia-smi finds; empty if there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


def count_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the cores that this process may use: its affinity, limited by the quota of a container.

    Args:
        quota: File of the control group: `<microseconds>|max <period>`.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        share, period = quota.read_text().split()
        return max(1, min(cores, math.ceil(int(share) / int(period))))
    except (OSError, ValueError):  # There are no control groups, or there is no quota ("max").
        return cores
