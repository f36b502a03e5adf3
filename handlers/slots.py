"""Slots: the files in which one worker, and after its death the next in its place, keeps its metrics.

TorchServe starts a worker with `--sock-name <folder>/.ts.sock.<port>` (`--port <port>` without unix sockets), and the
one that takes a dead worker's place with the same. Named after that port, the files are found again by the successor,
so counters never fall and files do not pile up. It knows prometheus_client's files and nothing of what is measured.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict, mmap_key

_KINDS = ("counter", "histogram", "gauge_livesum", "gauge_max")


def slot_name(arguments: Sequence[str]) -> str:
    """Return what tells this worker from those that run beside it: its port, or else its process.

    Args:
        arguments: The worker's command line.
    """
    for option, value in itertools.pairwise(arguments):
        port = value.rpartition(".")[2]
        if option in ("--sock-name", "--port") and port.isascii() and port.isdigit():
            return f"slot{port}"
    return str(os.getpid())


@contextlib.contextmanager
def opened(directory: Path, slot: str, size: int) -> Iterator[None]:
    """Let metrics whose series are made inside write to this slot's files.

    Room is taken on the disk beforehand: these files are mapped into memory, and where a full disk cannot back a page
    that is written to, the kernel kills the process. A file that cannot be read through is begun anew.

    Args:
        directory: What `PROMETHEUS_MULTIPROC_DIR` names.
        slot: From `slot_name`.
        size: Bytes to reserve for each file of counters and histograms.

    Raises:
        OSError: The directory is missing, read-only or full.
    """
    for kind in _KINDS:
        path = directory / f"{kind}_{slot}.db"
        _discard_damaged(path)
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, 2**16 if kind.startswith("gauge") else size)
    stock = values.ValueClass
    values.ValueClass = _value_class(directory, slot)
    try:
        yield
    finally:
        values.ValueClass = stock


def _value_class(directory: Path, slot: str) -> type[Any]:
    """Make what prometheus_client keeps a number in, for this slot's files.

    Like the library's `MultiProcessValue` but for its lock and its check for a fork, which take half of the time that
    recording takes: a worker answers on one thread and does not fork.
    """
    files: dict[str, Any] = {}

    class SlotValue:
        _multiprocess = True

        def __init__(
            self,
            typ: str,
            metric_name: str,
            name: str,
            labelnames: Sequence[str],
            labelvalues: Sequence[str],
            help_text: str,
            multiprocess_mode: str = "",
            **_: Any,
        ) -> None:
            kind = f"{typ}_{multiprocess_mode}" if typ == "gauge" else typ
            if kind not in files:
                files[kind] = MmapedDict(str(directory / f"{kind}_{slot}.db"))  # type: ignore[no-untyped-call]
                atexit.register(files[kind].close)
            self._key = mmap_key(metric_name, name, list(labelnames), list(labelvalues), help_text)
            self._value: float = files[kind].read_value(self._key)[0]
            self._write = files[kind].write_value

        def inc(self, amount: float) -> None:
            self._value += amount
            self._write(self._key, self._value, 0.0)

        def set(self, value: float, timestamp: float | None = None) -> None:
            self._value = value
            self._write(self._key, value, timestamp or 0.0)

        def get(self) -> float:
            return self._value

    return SlotValue


def _discard_damaged(path: Path) -> None:
    try:
        for key, *_ in MmapedDict.read_all_values_from_file(str(path)):  # type: ignore[no-untyped-call]
            _, _, labels, _ = json.loads(key)
            labels.items()
    except FileNotFoundError:
        pass
    except Exception:  # Whatever a damaged file may bring about.
        path.unlink()
