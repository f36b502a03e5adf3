"""Metrics: what a worker counts and times for every request that it answers.

Every series there can be is made when the worker starts. So labels are bounded whatever callers send, a series counts
from zero before its first event, and while requests wait nothing is looked up by name or allocated on the disk. Only
`telemetry` imports this module, since prometheus_client need not be installed.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from prometheus_client import Counter, Gauge, Histogram

from handlers.errors import CODES, Draining, Internal, RequestError
from handlers.media import FORMATS
from handlers.reply import Identity
from handlers.slots import opened, slot_name
from handlers.trace import OK, STAGES, TRANSPORTS, Trace

MOST_CLASSES = 1000  # With a series of their own.
OTHER = "other"  # The class label of the rest.

_LONGEST_LABEL = 100  # Characters of a class's label text.
_SERIES_BYTES = 2**20  # Room for all series but those of classes and layers.
_LABEL_BYTES = 2**11  # Room for one of those.

_WHO = ("model", "version")  # Labels of every metric.
_ALL_CODES = (OK, *CODES)
_CARD_CODES = (OK, Draining.code, Internal.code)
# Milliseconds for a small network, tens of seconds for a large one on a CPU.
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 30),
)
_BATCHES = tuple(2**power for power in range(8))  # 1 ... 128
_PICTURES = tuple(2**power for power in range(9))  # 1 ... 256
_BYTES = tuple(4**power for power in range(4, 15))  # 256 B ... 256 MiB
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)


class Metrics:
    """The series of one loaded archive.

    Args:
        identity: Who answers.
        layers: The published ones.
        classes: Labels by index.

    Raises:
        OSError: The folder named by `PROMETHEUS_MULTIPROC_DIR` is missing, read-only or full.
    """

    def __init__(self, identity: Identity, layers: Sequence[str], classes: Sequence[str]) -> None:
        directory = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        room = _SERIES_BYTES + _LABEL_BYTES * (len(layers) + min(len(classes), MOST_CLASSES + 1))
        with opened(directory, slot_name(sys.argv), room):
            families = _families(directory)

            def series(name: str, *labels: str) -> Any:
                return families[name].labels(identity.model, identity.version, *labels)

            self._make(series, layers, classes)
            self._info = series("info", identity.engine, identity.device, torch.__version__, torchvision.__version__)
        self.in_flight(0)  # A predecessor that was killed left its last figure.

    def _make(self, series: Callable[..., Any], layers: Sequence[str], classes: Sequence[str]) -> None:
        formats = tuple(FORMATS.values())
        asked = product(TRANSPORTS, formats, _ALL_CODES)
        self._requests = {labels: series("requests", *labels) for labels in asked}
        self._cards = {labels: series("cards", *labels) for labels in product(TRANSPORTS, _CARD_CODES)}
        self._pictures = {labels: series("pictures", *labels) for labels in product(TRANSPORTS, _ALL_CODES)}
        self._handler = {transport: series("handler", transport) for transport in TRANSPORTS}
        self._stages = {labels: series("stages", *labels) for labels in product(TRANSPORTS, STAGES)}
        self._request_pictures = {transport: series("request_pictures", transport) for transport in TRANSPORTS}
        self._reply_bytes = {labels: series("reply_bytes", *labels) for labels in product(TRANSPORTS, formats)}
        self._layers = {layer: series("layers", layer) for layer in layers}
        texts = [text[:_LONGEST_LABEL] if index < MOST_CLASSES else OTHER for index, text in enumerate(classes)]
        self._classes = [series("classes", text) for text in texts]
        self._confidence = series("confidence") if classes else None
        self._batch_requests = series("batch")
        self._in_flight = series("in_flight")
        self._load_seconds = series("load")
        self._worker_starts = series("starts")

    def loaded(self, seconds: float) -> None:
        """Note that this worker has loaded its archive, and how long that took."""
        self._load_seconds.set(seconds)
        self._worker_starts.inc()
        self._info.set(1)

    def in_flight(self, requests: int) -> None:
        """Say how many requests this worker holds now."""
        self._in_flight.set(requests)

    def record(self, traces: Sequence[Trace], handler_s: float) -> None:
        """Count one batch.

        Args:
            traces: Of its requests, all of them answered.
            handler_s: From receiving the batch to its replies being ready.
        """
        self._batch_requests.observe(len(traces))
        for trace in traces:
            transport, kind = trace.transport, FORMATS[trace.media_type]
            if trace.is_card:
                self._cards[transport, trace.code].inc()
                continue
            self._requests[transport, kind, trace.code].inc()
            self._handler[transport].observe(handler_s)
            for stage, seconds in trace.seconds.items():
                self._stages[transport, stage].observe(seconds)
            self._reply_bytes[transport, kind].observe(trace.reply_bytes)
            if trace.pictures:
                self._request_pictures[transport].observe(trace.pictures)
            for layer in trace.layers:
                self._layers[layer].inc()
            self._record_results(trace)

    def _record_results(self, trace: Trace) -> None:
        answered = 0
        for result in trace.results:
            if isinstance(result, RequestError):
                self._pictures[trace.transport, result.code].inc()
                continue
            answered += 1
            if result.top and self._confidence is not None:
                self._classes[result.top[0].index].inc()
                self._confidence.observe(result.top[0].probability)
        if answered:
            self._pictures[trace.transport, OK].inc(answered)


@functools.cache
def _families(directory: Path) -> dict[str, Any]:
    """Make the metrics, once a process however many archives it loads: two objects of one series would not add up."""
    return {
        "requests": _counter("requests_total", "Prediction requests answered.", "transport", "format", "code"),
        "cards": _counter("cards_total", "Model cards answered: readiness probes.", "transport", "code"),
        "pictures": _counter("pictures_total", "Pictures answered, each by its own result.", "transport", "code"),
        "handler": _histogram(
            "handler_seconds", "From receiving a prediction request's batch to its replies.", _SECONDS, "transport"
        ),
        "stages": _histogram(
            "stage_seconds", "A prediction request's time in each stage it got through.", _SECONDS, "transport", "stage"
        ),
        "batch": _histogram("batch_requests", "Requests of any kind handed over together.", _BATCHES),
        "request_pictures": _histogram("request_pictures", "Pictures of a prediction request.", _PICTURES, "transport"),
        "reply_bytes": _histogram(
            "reply_bytes", "Length of the reply to a prediction request.", _BYTES, "transport", "format"
        ),
        "in_flight": _gauge("in_flight", "Requests in the handlers now.", "livesum"),
        "layers": _counter("layer_requests_total", "Prediction requests for the layer's map.", "layer"),
        "classes": _counter("predicted_class_total", "Pictures answered, by their most probable class.", "class"),
        "confidence": _histogram("confidence", "Probability of a picture's most probable class.", _SHARES),
        "load": _gauge("load_seconds", "What loading the archive took.", "max"),
        "starts": _counter("worker_starts_total", "Workers that have loaded the archive."),
        "info": _gauge("model_info", "What answers; always 1.", "max", "engine", "device", "torch", "torchvision"),
    }


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"convscope_{name}", text, (*_WHO, *labels), registry=None)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    return Histogram(f"convscope_{name}", text, (*_WHO, *labels), registry=None, buckets=buckets)


def _gauge(name: str, text: str, mode: Literal["livesum", "max"], *labels: str) -> Gauge:
    return Gauge(f"convscope_{name}", text, (*_WHO, *labels), registry=None, multiprocess_mode=mode)
