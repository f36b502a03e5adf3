"""The workers' metrics: the files that they write with `prometheus_client`, merged at every scrape.

A restarted worker continues in the files of its predecessor, so counters and histograms include all workers that there
were. A gauge counts only while a process has its file open: the last value of a killed worker is not shown, and its
successor sets the gauge when it opens the file.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from server.children import PROCESSES
from server.reporting import write


class WorkerFiles(Collector):
    """Merges the files of a folder.

    Args:
        folder: PROMETHEUS_MULTIPROC_DIR of the workers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._told = False

    def collect(self) -> Iterable[Metric]:
        """Merge the files; one that cannot be read is left out."""
        opened = find_open_files(self._folder)
        files = [
            str(path)
            for path in sorted(self._folder.glob("*.db"))
            if path in opened or not path.name.startswith("gauge_")
        ]
        try:
            return _merge(files)
        except Exception as error:  # A new file is empty for a moment, and a full disk damages files.
            if not self._told:
                write(f"a file of {self._folder} cannot be read: {error!r}", sys.stderr)
            self._told = True
        try:
            return _merge([file for file in files if _is_whole(file)])
        except Exception:
            return []


def find_open_files(folder: Path) -> set[Path]:
    """Return the files of a folder, an absolute path without links, that other processes of this user have open."""
    inside = f"{folder}/"
    opened = set()
    for process in PROCESSES.glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        descriptors: list[os.DirEntry[str]] = []
        with contextlib.suppress(OSError):  # Another user's, or it has ended.
            descriptors.extend(os.scandir(process / "fd"))
        for descriptor in descriptors:
            with contextlib.suppress(OSError):  # Closed meanwhile.
                target = os.readlink(descriptor.path)  # noqa: PTH115  (a Path for each takes five times as long)
                if target.startswith(inside):
                    opened.add(Path(target))
    return opened


def _merge(files: Sequence[str]) -> list[Metric]:
    return list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]


def _is_whole(file: str) -> bool:
    try:
        _merge([file])
    except Exception:
        return False
    return True
