"""Prometheus metrics of predictions: how long callers waited, and how much of it was the service's handler.

The only module that knows prometheus_client; imported when a client is made with `metrics`.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from convscope import _exceptions
from convscope._exceptions import ConvscopeError

if TYPE_CHECKING:
    from convscope._reply import Response

# Those of the workers' histograms, so that the two can be compared: a network may take 1 ms or 10 s.
BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 30.0),
)
CODES = frozenset({getattr(_exceptions, name).code for name in _exceptions.__all__} | {"ok", "draining", "cancelled"})
OTHER = "other"  # Any other code: a server must not be able to create any number of labels.


class Collectors:
    """The metrics of one registry, for all clients that use it.

    Args:
        registry: The registry to add them to.

    Raises:
        ValueError: Something else in the registry has one of their names.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.request_seconds = _histogram(
            "convscope_client_request_seconds",
            "Duration of predictions for their callers, retries and the waits before them included.",
            ("model", "transport", "code"),
            registry,
        )
        self.server_seconds = _histogram(
            "convscope_client_server_seconds",
            "Time of answered requests in the worker's handler, from the reply.",
            ("model", "transport"),
            registry,
        )
        self.outside_seconds = _histogram(
            "convscope_client_outside_seconds",
            "Time of answered requests outside the handler: network, gateway, queue and client; of the last attempt.",
            ("model", "transport"),
            registry,
        )
        self.retries = Counter(
            "convscope_client_retries_total",
            "Requests sent again.",
            ("model", "transport"),
            registry=registry,
        )


def _histogram(name: str, meaning: str, labels: tuple[str, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(name, meaning, labels, registry=registry, buckets=BUCKETS_S)


_shared: WeakKeyDictionary[CollectorRegistry, Collectors] = WeakKeyDictionary()
_lock = threading.Lock()  # For `_shared`.


class Metrics:
    """The metrics of one client. Safe to use from several threads.

    Args:
        registry: The registry of the metrics; True for prometheus_client's own.
        transport: `rest` or `grpc`.

    Raises:
        TypeError: `registry` is neither.
        ValueError: Something else in the registry has one of the metrics' names.
    """

    def __init__(self, registry: CollectorRegistry | bool, transport: str) -> None:
        if registry is True:
            registry = REGISTRY
        if not isinstance(registry, CollectorRegistry):
            raise TypeError(f"metrics must be True, False or a CollectorRegistry, not {registry!r}")
        with _lock:
            if registry not in _shared:
                _shared[registry] = Collectors(registry)
            self._collectors = _shared[registry]
        self._transport = transport

    def observe(self, model: str, seconds: float, outcome: Response | BaseException) -> None:
        """Count a prediction that ended. Errors in its arguments, before anything was sent, are not counted.

        Args:
            model: The model's name.
            seconds: How long its caller waited.
            outcome: The response, or the exception that was raised.
        """
        if isinstance(outcome, asyncio.CancelledError):
            code = "cancelled"
        elif isinstance(outcome, BaseException) and not isinstance(outcome, ConvscopeError):
            return
        else:
            code = outcome.code
        self._child(self._collectors.request_seconds, model, code if code in CODES else OTHER).observe(seconds)
        if isinstance(outcome, BaseException) or not outcome.reply.HasField("timing"):
            return
        handler_s = outcome.reply.timing.handler_s
        self._child(self._collectors.server_seconds, model).observe(handler_s)
        self._child(self._collectors.outside_seconds, model).observe(max(outcome.total_s - handler_s, 0.0))

    def count_retry(self, model: str) -> None:
        """Count a request that is sent again.

        Args:
            model: The model's name.
        """
        self._child(self._collectors.retries, model).inc()

    def _child(self, collector: Any, model: str, *code: str) -> Any:
        return collector.labels(model, self._transport, *code)
