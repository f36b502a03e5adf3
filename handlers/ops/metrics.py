"""Metrics: what a worker counts and times for every request, kept with prometheus_client in its multiprocess mode.

Every series that can occur is created when the worker starts. So labels are bounded whatever callers send, a series
counts from zero before its first event, and nothing is allocated on the disk while requests wait. Only `telemetry`
imports this module, since prometheus_client need not be installed.

A worker's files are named after its slot instead of its process. TorchServe starts a worker with `--sock-name
<folder>/.ts.sock.<port>` (`--port <port>` without unix sockets), and the successor of a dead worker with the same. So
the successor goes on in the same files: counters never fall, and files do not pile up.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.values import MultiProcessValue

from handlers.api.errors import CODES, RequestError
from handlers.api.job import OK, STAGES, TRANSPORTS, Job
from handlers.api.media import FORMATS
from handlers.outputs.response import Identity
from handlers.torchserve.patches import PATCHES

MOST_CLASSES = 1000  # Classes with a series of their own.
OTHER = "other"  # The label of all other classes.

_LONGEST_LABEL = 100  # Characters of a class's label.
_CODES = (OK, *CODES)
# From a millisecond for a small network to tens of seconds for a large one on a CPU.
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 30),
)
_BATCHES = tuple(2.0**power for power in range(8))  # 1 ... 128
_PICTURES = tuple(2.0**power for power in range(9))  # 1 ... 256
_BYTES = tuple(4.0**power for power in range(4, 15))  # 256 B ... 256 MiB
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_SERIES_BYTES = 64  # Most bytes of a series in a file, without its name, labels and help.


def _version(package: str) -> str:
    """Return the version of a package, without importing it; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class _Metric:
    """A metric and every value that its labels can have; `buckets` makes it a histogram, `mode` a gauge."""

    name: str
    help: str
    labels: Mapping[str, Iterable[str]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    mode: str = ""

    @property
    def file(self) -> str:
        """prometheus_client's kind of file for this metric."""
        return "histogram" if self.buckets else f"gauge_{self.mode}" if self.mode else "counter"

    def combinations(self) -> list[tuple[str, ...]]:
        return list(itertools.product(*self.labels.values()))

    def size(self, common: Mapping[str, str]) -> int:
        """Return the most bytes that its series take."""
        series = (len(self.buckets) + 2) if self.buckets else 1
        return sum(
            series
            * (
                len(
                    json.dumps(
                        [self.name, self.name, {**common, **dict(zip(self.labels, some, strict=True))}, self.help]
                    )
                )
                + _SERIES_BYTES
            )
            for some in self.combinations()
        )


class Metrics:
    """The series of one loaded archive.

    Args:
        identity: The server's identity.
        layers: Public names of the published layers.
        classes: Labels by index.
        directory: The directory named by `PROMETHEUS_MULTIPROC_DIR`.

    Raises:
        OSError: The directory is missing, read-only or full.
    """

    def __init__(self, identity: Identity, layers: Sequence[str], classes: Sequence[str], directory: Path) -> None:
        labels = [label[:_LONGEST_LABEL] for label in classes[:MOST_CLASSES]]
        labels += [OTHER] * (len(classes) - len(labels))
        transport, kind, code = {"transport": TRANSPORTS}, {"format": tuple(FORMATS.values())}, {"code": _CODES}
        computes = {"engine": [identity.engine], "device": [identity.device]}
        versions = {name: [_version(name)] for name in ("torch", "torchvision")}
        metrics = {
            "requests": _Metric("convscope_requests_total", "Prediction requests answered.", transport | kind | code),
            "cards": _Metric(
                "convscope_cards_total", "Model cards and filters returned; mostly readiness probes.", transport | code
            ),
            "pictures": _Metric(
                "convscope_pictures_total", "Pictures answered, each by its own result.", transport | code
            ),
            "request_pictures": _Metric(
                "convscope_request_pictures", "Pictures of a prediction request.", transport, _PICTURES
            ),
            "reply_bytes": _Metric(
                "convscope_reply_bytes", "Length of the reply to a prediction request.", transport | kind, _BYTES
            ),
            "handler": _Metric(
                "convscope_handler_seconds",
                "From receiving a prediction request's batch to its replies.",
                transport,
                _SECONDS,
            ),
            "stages": _Metric(
                "convscope_stage_seconds",
                "A prediction request's time in each stage it got through.",
                transport | {"stage": STAGES},
                _SECONDS,
            ),
            "layers": _Metric(
                "convscope_layer_requests_total", "Prediction requests for the layer's map.", {"layer": layers}
            ),
            "classes": _Metric(
                "convscope_predicted_class_total",
                "Pictures answered, by their most probable class.",
                {"class": tuple(dict.fromkeys(labels))},
            ),
            "confidence": _Metric(
                "convscope_confidence", "Probability of a picture's most probable class.", {}, _SHARES
            ),
            "batch_requests": _Metric(
                "convscope_batch_requests", "Requests of any kind handed over together.", {}, _BATCHES
            ),
            "in_flight": _Metric("convscope_in_flight", "Requests in the handlers now.", mode="livesum"),
            "load_seconds": _Metric("convscope_load_seconds", "What loading the archive took.", mode="max"),
            "worker_starts": _Metric("convscope_worker_starts_total", "Workers that have loaded the archive."),
            "info": _Metric("convscope_model_info", "What answers; always 1.", computes | versions, mode="max"),
            "patches": _Metric(
                "convscope_patch_active",
                "Whether a patch of TorchServe's worker is active.",
                {"patch": PATCHES},
                mode="max",
            ),
        }
        if not classes:
            del metrics["confidence"]
        common = {"model": identity.model, "version": identity.version}
        slot = slot_name(sys.argv)
        _reserve(directory, slot, metrics.values(), common)
        values.ValueClass = MultiProcessValue(process_identifier=lambda: slot)  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        self._series = {name: _create(metric, common, registry) for name, metric in metrics.items()}
        self._class_counts = [self._series["classes"][label,] for label in labels]
        self.in_flight(0)  # A predecessor that was killed left its last value.

    def loaded(self, seconds: float) -> None:
        """Record that this worker has loaded its archive, and how long that took."""
        self._series["load_seconds"][()].set(seconds)
        self._series["worker_starts"][()].inc()
        for info in self._series["info"].values():
            info.set(1)

    def patched(self, patches: Mapping[str, bool]) -> None:
        """Record which patches of TorchServe's worker are active."""
        for name, is_active in patches.items():
            self._series["patches"][name,].set(int(is_active))

    def in_flight(self, requests: int) -> None:
        """Record how many requests this worker holds now."""
        self._series["in_flight"][()].set(requests)

    def record(self, jobs: Sequence[Job], handler_s: float) -> None:
        """Count one batch.

        Args:
            jobs: The batch's jobs, all with a response.
            handler_s: From receiving the batch to its responses being ready.
        """
        series = self._series
        series["batch_requests"][()].observe(len(jobs))
        for job in jobs:
            transport, response = job.transport, job.response
            if job.predicts_nothing or response is None:
                series["cards"][transport, job.code].inc()
                continue
            kind = FORMATS[response.media_type]
            series["requests"][transport, kind, job.code].inc()
            series["handler"][transport,].observe(handler_s)
            for stage, seconds in job.seconds.items():
                series["stages"][transport, stage].observe(seconds)
            series["reply_bytes"][transport, kind].observe(response.size)
            if job.pictures:
                series["request_pictures"][transport,].observe(len(job.pictures))
            for layer in job.layers:
                series["layers"][layer,].inc()
            self._record_results(job)

    def _record_results(self, job: Job) -> None:
        pictures: dict[str, int] = defaultdict(int)
        for result in job.results:
            if isinstance(result, RequestError):
                pictures[result.code] += 1
            elif result is not None:
                pictures[OK] += 1
                if result.top and self._class_counts:  # Numbers that are not scores have no classes.
                    self._class_counts[result.top[0].index].inc()
                    self._series["confidence"][()].observe(result.top[0].probability)
        for code, count in pictures.items():
            self._series["pictures"][job.transport, code].inc(count)


def slot_name(arguments: Sequence[str]) -> str:
    """Return what distinguishes this worker from its neighbours: its port, or else its process.

    Args:
        arguments: The worker's command line.
    """
    for option, value in itertools.pairwise(arguments):
        port = value.rpartition(".")[2]
        if option in ("--sock-name", "--port") and port.isascii() and port.isdigit():
            return f"slot{port}"
    return str(os.getpid())


def _create(metric: _Metric, common: Mapping[str, str], registry: CollectorRegistry) -> dict[tuple[str, ...], Any]:
    """Create a metric with all of its series, by the values of their labels."""
    names = [*common, *metric.labels]
    made: Counter | Gauge | Histogram
    if metric.buckets:
        made = Histogram(metric.name, metric.help, names, buckets=metric.buckets, registry=registry)
    elif metric.mode:
        made = Gauge(metric.name, metric.help, names, multiprocess_mode=metric.mode, registry=registry)  # type: ignore[arg-type]
    else:
        made = Counter(metric.name, metric.help, names, registry=registry)
    return {some: made.labels(*common.values(), *some) for some in metric.combinations()}


def _reserve(directory: Path, slot: str, metrics: Iterable[_Metric], common: Mapping[str, str]) -> None:
    """Make each file as long as its series need, with all of it on the disk; a damaged file is recreated.

    The files are mapped into memory. If a full disk cannot back a page that is written to, the kernel kills the
    process, so the room is taken before.
    """
    sizes: dict[str, int] = defaultdict(int)
    for metric in metrics:
        sizes[metric.file] += metric.size(common)
    for kind, size in sizes.items():
        path = directory / f"{kind}_{slot}.db"
        if path.exists() and not _is_readable(path):
            path.unlink()
        with path.open("ab") as file:
            file.write(bytes(max(0, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE - file.tell())))


def _is_readable(path: Path) -> bool:
    """Return whether the collector can read a file: one unreadable file would keep it from reading any."""
    try:
        MultiProcessCollector.merge([str(path)], accumulate=False)  # type: ignore[no-untyped-call]
    except Exception:  # A damaged file can raise nearly anything.
        return False
    return path.stat().st_size % mmap.PAGESIZE == 0
