"""Small processes that write metrics on command as workers do, in the files of a slot."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = """
import sys
from prometheus_client import Counter, Gauge, Histogram, values

slot = sys.argv[1]
values.ValueClass = values.MultiProcessValue(lambda: slot)
labels = dict(model="m", version="1")
requests = Counter("convscope_requests", "Requests.", list(labels))
seconds = Histogram("convscope_handler_seconds", "Seconds.", list(labels), buckets=[0.1, 1])
busy = Gauge("convscope_in_flight", "Busy.", list(labels), multiprocess_mode="livesum")
load = Gauge("convscope_load_seconds", "Loading.", list(labels), multiprocess_mode="max")
busy.labels(**labels).set(0)
load.labels(**labels).set(float(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    order, value = line.split()
    if order == "count":
        requests.labels(**labels).inc(float(value))
    elif order == "observe":
        seconds.labels(**labels).observe(float(value))
    elif order == "busy":
        busy.labels(**labels).inc(float(value))
    print("done", flush=True)
"""


class Writer:
    """One such process."""

    def __init__(self, folder: Path, slot: str, load_s: float = 1.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SOURCE, slot, str(load_s)],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def tell(self, order: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        self._expect("done")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()

    def _expect(self, word: str) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline() == f"{word}\n"


@contextlib.contextmanager
def writing(folder: Path, slot: str, load_s: float = 1.0) -> Iterator[Writer]:
    writer = Writer(folder, slot, load_s)
    try:
        yield writer
    finally:
        writer.close()
