"""Prometheus metrics of what a client's callers waited for, and of which part of it the service knows.

The only module that knows prometheus_client; imported when a client is opened with `metrics`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from convscope import _exceptions
from convscope._exceptions import ConvscopeError

if TYPE_CHECKING:
    from convscope._reply import Answer

# As in the workers' histograms, so that one can be laid over the other: a network may answer in 1 ms or in 10 s.
BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 30.0),
)
CODES = frozenset({getattr(_exceptions, name).code for name in _exceptions.__all__} | {"ok", "draining", "cancelled"})
OTHER = "other"  # A code that this client does not know: a server must not be able to make labels without end.


class Collectors:
    """The metrics of one registry, for all clients that use it.

    Args:
        registry: Where to register them.

    Raises:
        ValueError: Something else in the registry has one of their names.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.request_seconds = _histogram(
            "convscope_client_request_seconds",
            "Predictions as their callers waited for them, retries and the waits before them included.",
            ("model", "transport", "code"),
            registry,
        )
        self.server_seconds = _histogram(
            "convscope_client_server_seconds",
            "Time of answered requests in the worker's handler, as the reply tells.",
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
_sharing = threading.Lock()


class Metrics:
    """The metrics of one client. Safe to use from several threads.

    Args:
        registry: Where to count; True for prometheus_client's own.
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
        with _sharing:
            if registry not in _shared:
                _shared[registry] = Collectors(registry)
            self._collectors = _shared[registry]
        self._transport = transport

    async def watch(self, asking: Awaitable[Answer], model: str) -> Answer:
        """Await a prediction's answer, and count it.

        What was wrong before anything was sent is not counted.

        Args:
            asking: What to await.
            model: Whom it asks.

        Returns:
            The answer.
        """
        began = time.perf_counter()
        code: str | None = None
        try:
            answer = await asking
            code = answer.code
        except ConvscopeError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = "cancelled"
            raise
        finally:
            if code is not None:
                known = code if code in CODES else OTHER
                self._child(self._collectors.request_seconds, model, known).observe(time.perf_counter() - began)
        if answer.reply.HasField("timing"):
            handler_s = answer.reply.timing.handler_s
            self._child(self._collectors.server_seconds, model).observe(handler_s)
            self._child(self._collectors.outside_seconds, model).observe(max(answer.total_s - handler_s, 0.0))
        return answer

    def count_retry(self, model: str) -> None:
        """Count a request that is sent again.

        Args:
            model: Whom it asks.
        """
        self._child(self._collectors.retries, model).inc()

    def _child(self, collector: Any, model: str, *code: str) -> Any:
        return collector.labels(model, self._transport, *code)
