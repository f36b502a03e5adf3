"""Prometheus metrics of the client: duration of requests, and the part that the server's handler took.

Only this module imports prometheus_client; it is imported when a client is created with `metrics`.
"""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from convscope import _exceptions
from convscope._exceptions import ConvscopeError

if TYPE_CHECKING:
    from convscope._reply import TimedReply

# Same buckets as the server's histograms.
BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 30.0),
)
CODES = frozenset({getattr(_exceptions, name).code for name in _exceptions.__all__} | {"ok", "draining", "cancelled"})
OTHER = "other"  # Any other code. Bounds the label's cardinality.


class _MetricSet:
    """The metrics of one registry, shared by all clients that use it.

    Raises:
        ValueError: The registry already contains another metric with one of their names.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "transport")
        histogram = partial(Histogram, registry=registry, buckets=BUCKETS_S)
        self.request_seconds = histogram(
            "convscope_client_request_seconds",
            "Duration of predict, predict_many and explain requests as the caller sees it, including retries.",
            (*labels, "code"),
        )
        self.server_seconds = histogram(
            "convscope_client_server_seconds",
            "Handler time of successful requests, as reported by the server.",
            labels,
        )
        self.outside_seconds = histogram(
            "convscope_client_outside_seconds",
            "Time of successful requests outside the handler: network, gateway, queue and client; last attempt only.",
            labels,
        )
        self.retries = Counter("convscope_client_retries_total", "Number of retries.", labels, registry=registry)


_metric_sets: WeakKeyDictionary[CollectorRegistry, _MetricSet] = WeakKeyDictionary()
_lock = threading.Lock()  # For `_metric_sets`.


class Metrics:
    """The metrics of one client. Thread-safe.

    Args:
        registry: The registry of the metrics; True for the default registry.
        transport: `rest` or `grpc`.

    Raises:
        TypeError: `registry` is neither True nor a CollectorRegistry.
        ValueError: The registry already contains another metric with one of their names.
    """

    def __init__(self, registry: CollectorRegistry | bool, transport: str) -> None:
        if registry is True:
            registry = REGISTRY
        if not isinstance(registry, CollectorRegistry):
            raise TypeError(f"metrics must be True, False or a CollectorRegistry, not {registry!r}")
        with _lock:
            if registry not in _metric_sets:
                _metric_sets[registry] = _MetricSet(registry)
            self._metrics = _metric_sets[registry]
        self._transport = transport

    def observe(self, model: str, seconds: float, result: TimedReply | BaseException) -> None:
        """Record a finished request: its reply, or the exception that it raised. Argument errors are not recorded."""
        if isinstance(result, asyncio.CancelledError):
            code = "cancelled"
        elif isinstance(result, BaseException) and not isinstance(result, ConvscopeError):
            return
        else:
            code = result.code
        self._labelled(self._metrics.request_seconds, model, code if code in CODES else OTHER).observe(seconds)
        if isinstance(result, BaseException) or not result.reply.HasField("timing"):
            return
        handler_s = result.reply.timing.handler_s
        self._labelled(self._metrics.server_seconds, model).observe(handler_s)
        self._labelled(self._metrics.outside_seconds, model).observe(max(result.total_s - handler_s, 0.0))

    def count_retry(self, model: str) -> None:
        """Count a retry."""
        self._labelled(self._metrics.retries, model).inc()

    def _labelled(self, metric: Any, model: str, *code: str) -> Any:
        return metric.labels(model, self._transport, *code)
