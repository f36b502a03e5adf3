"""Slots: the files in which one worker, and after its death the next in its place, keeps its metrics.

TorchServe starts a worker with `--sock-name <folder>/.ts.sock.<port>` (`--port <port>` without unix sockets), and the
one that takes a dead worker's place with the same. Named after that port, the files are found again by the successor,
so counters never fall and files do not pile up.

The files are those of prometheus_client's multiprocess mode, made by its own code and read by its
`MultiProcessCollector`. Numbers are written straight into the mapped file: the library's metric objects take a lock and
look for a fork at every step, which made recording several times as slow, and a worker answers on one thread.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

Labels = Mapping[str, Iterable[str]]
"""Names of labels → the values that each can have."""

_SERIES_BYTES = 32  # Of a series in a file, at most, beside its key.


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


class Number:
    """One number in a slot's file.

    Args:
        key: Its series, as prometheus_client writes it.
    """

    __slots__ = ("cells", "index", "key")

    def __init__(self, key: str) -> None:
        self.key = key

    def bind(self, cells: memoryview[float], index: int) -> None:
        """Say where it is kept: a mapped file as doubles, and which of them."""
        self.cells = cells
        self.index = index

    def add(self, amount: float = 1) -> None:
        """Add to it."""
        self.cells[self.index] += amount

    def set(self, value: float) -> None:
        """Replace it."""
        self.cells[self.index] = value


class Distribution:
    """A histogram. It knows the places of its numbers: with calls of theirs, a value took a quarter longer.

    Args:
        total: Sum of what was observed.
        bounds: Upper bounds of all buckets but the last, rising.
        buckets: How many were observed up to each bound and above the one before; the last is beyond all bounds.
    """

    __slots__ = ("_bounds", "_buckets", "_cells", "_places", "_sum", "_total")

    def __init__(self, total: Number, bounds: tuple[float, ...], buckets: tuple[Number, ...]) -> None:
        self._total, self._bounds, self._buckets = total, bounds, buckets

    def bind(self) -> None:
        """Learn where its numbers are kept, all in one file, once they know."""
        self._cells, self._sum = self._total.cells, self._total.index
        self._places = tuple(bucket.index for bucket in self._buckets)

    def observe(self, amount: float) -> None:
        """Count one value."""
        cells = self._cells
        cells[self._sum] += amount
        cells[self._places[bisect_left(self._bounds, amount)]] += 1


class Slot:
    """A slot's files: first name the series in them, then open it.

    Args:
        directory: What `PROMETHEUS_MULTIPROC_DIR` names.
        name: From `slot_name`.
        labels: Of every series.
    """

    def __init__(self, directory: Path, name: str, labels: Mapping[str, str]) -> None:
        self._directory = directory
        self._name = name
        self._labels = labels
        self._numbers: dict[str, list[Number]] = defaultdict(list)  # Kind of file → what is kept in it.
        self._distributions: list[Distribution] = []

    def counters(self, name: str, text: str, labels: Labels) -> dict[tuple[str, ...], Number]:
        """Return numbers that only grow, one for each combination of labels; `name` ends in `_total`."""
        metric = name.removesuffix("_total")
        return {some: self._number("counter", metric, name, text, own) for some, own in self._combine(labels)}

    def gauges(self, name: str, text: str, labels: Labels, mode: str) -> dict[tuple[str, ...], Number]:
        """Return numbers that come and go; `mode` is how those of all workers are joined, `livesum` or `max`."""
        return {some: self._number(f"gauge_{mode}", name, name, text, own) for some, own in self._combine(labels)}

    def histograms(
        self, name: str, text: str, labels: Labels, bounds: tuple[float, ...]
    ) -> dict[tuple[str, ...], Distribution]:
        """Return distributions over buckets with these upper bounds."""
        ends = [floatToGoString(bound) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]
        found = {}
        for some, own in self._combine(labels):
            total = self._number("histogram", name, f"{name}_sum", text, own)
            buckets = tuple(self._number("histogram", name, f"{name}_bucket", text, {**own, "le": end}) for end in ends)
            found[some] = Distribution(total, bounds, buckets)
        self._distributions += found.values()
        return found

    def open(self) -> None:
        """Make or take over the files. A file that cannot be read through is begun anew.

        Raises:
            OSError: The directory is missing, read-only or full.
        """
        for kind, numbers in self._numbers.items():
            path = self._directory / f"{kind}_{self._name}.db"
            _discard_damaged(path)
            _take_room(path, sum(len(number.key.encode()) + _SERIES_BYTES for number in numbers))
            file = MmapedDict(str(path))  # type: ignore[no-untyped-call]
            for number in numbers:
                file.read_value(number.key)  # type: ignore[no-untyped-call]  # Makes it where it is missing.
            file.close()  # type: ignore[no-untyped-call]
            places = {key: place for key, _, _, place in _read(path)}
            with path.open("r+b") as stream:
                cells = memoryview(mmap.mmap(stream.fileno(), 0)).cast("d")
            for number in numbers:
                number.bind(cells, places[number.key] // cells.itemsize)
        for distribution in self._distributions:
            distribution.bind()

    def _combine(self, labels: Labels) -> Iterator[tuple[tuple[str, ...], dict[str, str]]]:
        for some in itertools.product(*labels.values()):
            yield some, {**self._labels, **dict(zip(labels, some, strict=True))}

    def _number(self, kind: str, metric: str, name: str, text: str, labels: Mapping[str, str]) -> Number:
        number = Number(mmap_key(metric, name, list(labels), list(labels.values()), text))
        self._numbers[kind].append(number)
        return number


def _take_room(path: Path, size: int) -> None:
    """Make the file at least that long, with all of it on the disk.

    It is going to be mapped into memory, and where a full disk cannot back a page that is written to, the kernel kills
    the process.
    """
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    with path.open("ab") as file:
        file.write(bytes(max(0, size - file.tell())))


def _read(path: Path) -> Iterable[tuple[str, float, float, int]]:
    """Return a file's series: key, value, time stamp, and where the value stands."""
    series: Iterable[tuple[str, float, float, int]] = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
    return series


def _discard_damaged(path: Path) -> None:
    try:
        for key, _, _, place in _read(path):
            _, _, labels, _ = json.loads(key)
            if place % 8 or not isinstance(labels, dict):
                raise ValueError(key)
        if path.stat().st_size % mmap.PAGESIZE:
            raise ValueError(path)
    except FileNotFoundError:
        pass
    except Exception:  # Whatever a damaged file may bring about.
        path.unlink()
