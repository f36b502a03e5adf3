"""Memory, file descriptors and threads of the service's processes during the campaign; and a chart of them."""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Sample:
    """One look at one process.

    Attributes:
        seconds: Since the campaign's start.
        requests: Sent until then.
        role: `launcher`, `java`, `exporter`, or `worker` and a number in the order of their ids.
        pid: Its id.
        memory_mib: Memory that is its own (USS), in MiB.
        descriptors: Open files and sockets.
        threads: Its threads.
    """

    seconds: float
    requests: int
    role: str
    pid: int
    memory_mib: float
    descriptors: int
    threads: int


class Watch:
    """Looks at a launcher and its descendants.

    Args:
        launcher: The launcher's process id.
    """

    def __init__(self, launcher: int) -> None:
        self._launcher = psutil.Process(launcher)
        self._started = time.monotonic()
        self.samples: list[Sample] = []

    def look(self, requests: int) -> None:
        """Take a sample of every process."""
        now = time.monotonic() - self._started
        for role, process in self.processes().items():
            try:
                with process.oneshot():
                    sample = Sample(
                        now,
                        requests,
                        role,
                        process.pid,
                        process.memory_full_info().uss / MEBIBYTE,
                        process.num_fds(),
                        process.num_threads(),
                    )
            except psutil.Error:
                continue
            self.samples.append(sample)

    def processes(self) -> dict[str, psutil.Process]:
        """Return the processes by role."""
        found = {"launcher": self._launcher}
        workers: list[psutil.Process] = []
        for process in self._launcher.children(recursive=True):
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "ModelServer" in command:
                found["java"] = process
            elif "server.exporter" in command:
                found["exporter"] = process
            elif "model_service_worker" in command:
                workers.append(process)
        workers.sort(key=lambda process: process.pid)
        return found | {f"worker {number}": process for number, process in enumerate(workers, 1)}

    def worker_ids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [process.pid for role, process in self.processes().items() if role.startswith("worker")]

    def by_role(self) -> dict[str, list[Sample]]:
        """Return the samples of each role, in order."""
        found: dict[str, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            found[sample.role].append(sample)
        return dict(found)

    def growth(self) -> dict[str, tuple[float, float, float, float]]:
        """Return for each role the means of memory (MiB) and descriptors in the second and the last quarter.

        The first quarter is left out: caches fill and Java compiles.
        """
        found = {}
        for role, samples in self.by_role().items():
            quarter = max(1, len(samples) // 4)
            early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
            found[role] = (
                float(np.mean([sample.memory_mib for sample in early])),
                float(np.mean([sample.memory_mib for sample in late])),
                float(np.mean([sample.descriptors for sample in early])),
                float(np.mean([sample.descriptors for sample in late])),
            )
        return found

    def write(self, path: Path) -> None:
        """Write all samples as CSV."""
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(Sample.__dataclass_fields__)
            for sample in self.samples:
                row = (sample.role, sample.pid, f"{sample.memory_mib:.1f}", sample.descriptors, sample.threads)
                table.writerow((f"{sample.seconds:.1f}", sample.requests, *row))

    def draw(self, path: Path, title: str) -> None:
        """Draw memory and descriptors of each process over time."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained")
        for role, samples in self.by_role().items():
            minutes = [sample.seconds / 60 for sample in samples]
            above.plot(minutes, [sample.memory_mib for sample in samples], label=role, linewidth=1.2)
            below.plot(minutes, [sample.descriptors for sample in samples], label=role, linewidth=1.2)
        above.set(ylabel="own memory (USS), MiB", title=title, ylim=(0, None))
        below.set(ylabel="open files and sockets", xlabel="minutes", ylim=(0, None))
        for axes in (above, below):
            axes.grid(alpha=0.3)
        lines, roles = above.get_legend_handles_labels()
        figure.legend(lines, roles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
