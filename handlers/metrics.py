"""Metrics: what a worker counts and times for every request that it answers.

Every series there can be is made when the worker starts. So labels are bounded whatever callers send, a series counts
from zero before its first event, and while requests wait nothing is looked up by name or allocated on the disk. Only
`telemetry` imports this module, since prometheus_client need not be installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from handlers import vision
from handlers.errors import CODES, RequestError
from handlers.media import FORMATS
from handlers.reply import Identity
from handlers.slots import Slot, slot_name
from handlers.trace import OK, STAGES, TRANSPORTS, Trace

MOST_CLASSES = 1000  # With a series of their own.
OTHER = "other"  # The class label of the rest.

_LONGEST_LABEL = 100  # Characters of a class's label text.
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
        who = {"model": identity.model, "version": identity.version}
        slot = Slot(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]), slot_name(sys.argv), who)
        self._count_requests(slot)
        self._time_requests(slot)
        self._watch_model(slot, layers, classes)
        self._tell_worker(slot, identity)
        slot.open()
        # What every request of a transport and a format is counted in, found with one look.
        self._ways = {
            (transport, media_type): (
                {code: self._requests[transport, kind, code] for code in _CODES},
                self._handler[transport,],
                {stage: self._stages[transport, stage] for stage in STAGES},
                self._reply_bytes[transport, kind],
                self._request_pictures[transport,],
            )
            for transport in TRANSPORTS
            for media_type, kind in FORMATS.items()
        }
        self.in_flight(0)  # A predecessor that was killed left its last figure.

    def _count_requests(self, slot: Slot) -> None:
        transport, kind, code = {"transport": TRANSPORTS}, {"format": tuple(FORMATS.values())}, {"code": _CODES}
        text = "Prediction requests answered."
        self._requests = slot.counters("convscope_requests_total", text, transport | kind | code)
        text = "Model cards answered: readiness probes."
        self._cards = slot.counters("convscope_cards_total", text, transport | code)
        text = "Pictures answered, each by its own result."
        self._pictures = slot.counters("convscope_pictures_total", text, transport | code)
        text = "Pictures of a prediction request."
        self._request_pictures = slot.histograms("convscope_request_pictures", text, transport, _PICTURES)
        text = "Length of the reply to a prediction request."
        self._reply_bytes = slot.histograms("convscope_reply_bytes", text, transport | kind, _BYTES)

    def _time_requests(self, slot: Slot) -> None:
        transport = {"transport": TRANSPORTS}
        text = "From receiving a prediction request's batch to its replies."
        self._handler = slot.histograms("convscope_handler_seconds", text, transport, _SECONDS)
        text = "A prediction request's time in each stage it got through."
        self._stages = slot.histograms("convscope_stage_seconds", text, transport | {"stage": STAGES}, _SECONDS)

    def _watch_model(self, slot: Slot, layers: Sequence[str], classes: Sequence[str]) -> None:
        text = "Prediction requests for the layer's map."
        self._layers = slot.counters("convscope_layer_requests_total", text, {"layer": layers})
        labels = [label[:_LONGEST_LABEL] for label in classes[:MOST_CLASSES]]
        labels += [OTHER] * (len(classes) - len(labels))
        text = "Pictures answered, by their most probable class."
        counts = slot.counters("convscope_predicted_class_total", text, {"class": tuple(dict.fromkeys(labels))})
        self._classes = [counts[label,] for label in labels]
        if classes:
            text = "Probability of a picture's most probable class."
            self._confidence = slot.histograms("convscope_confidence", text, {}, _SHARES)[()]

    def _tell_worker(self, slot: Slot, identity: Identity) -> None:
        text = "Requests of any kind handed over together."
        self._batch_requests = slot.histograms("convscope_batch_requests", text, {}, _BATCHES)[()]
        text = "Requests in the handlers now."
        self._in_flight = slot.gauges("convscope_in_flight", text, {}, "livesum")[()]
        text = "What loading the archive took."
        self._load_seconds = slot.gauges("convscope_load_seconds", text, {}, "max")[()]
        text = "Workers that have loaded the archive."
        self._worker_starts = slot.counters("convscope_worker_starts_total", text, {})[()]
        computes = {"engine": [identity.engine], "device": [identity.device]}
        versions = {"torch": [torch.__version__], "torchvision": [vision.__version__]}
        [self._info] = slot.gauges(
            "convscope_model_info", "What answers; always 1.", computes | versions, "max"
        ).values()

    def loaded(self, seconds: float) -> None:
        """Note that this worker has loaded its archive, and how long that took."""
        self._load_seconds.set(seconds)
        self._worker_starts.add()
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
            if trace.is_card:
                self._cards[trace.transport, trace.code].add()
                continue
            requests, handler, stages, reply_bytes, pictures = self._ways[trace.transport, trace.media_type]
            requests[trace.code].add()
            handler.observe(handler_s)
            for stage, seconds in trace.seconds.items():
                stages[stage].observe(seconds)
            reply_bytes.observe(trace.reply_bytes)
            if trace.pictures:
                pictures.observe(trace.pictures)
            for layer in trace.layers:
                self._layers[layer,].add()
            self._record_results(trace)

    def _record_results(self, trace: Trace) -> None:
        answered = 0
        for result in trace.results:
            if isinstance(result, RequestError):
                self._pictures[trace.transport, result.code].add()
                continue
            answered += 1
            if result.top:
                first = result.top[0]
                self._classes[first.index].add()
                self._confidence.observe(first.probability)
        if answered:
            self._pictures[trace.transport, OK].add(answered)
