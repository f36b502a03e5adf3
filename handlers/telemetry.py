"""Telemetry: what the service tells those who operate it, metrics and log, and never at the cost of a request."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from handlers import journal
from handlers.reply import Identity
from handlers.trace import Trace

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """What keeps metrics; `handlers.metrics.Metrics` says what its methods mean."""

    def loaded(self, seconds: float) -> None: ...  # noqa: D102
    def in_flight(self, requests: int) -> None: ...  # noqa: D102
    def record(self, traces: Sequence[Trace], handler_s: float) -> None: ...  # noqa: D102


class Silence:
    """Keeps no metrics."""

    def loaded(self, seconds: float) -> None:
        """Do nothing."""

    def in_flight(self, requests: int) -> None:
        """Do nothing."""

    def record(self, traces: Sequence[Trace], handler_s: float) -> None:
        """Do nothing."""


class Telemetry:
    """The way to metrics and log. What a recorder fails to count is missing there; the log says so once.

    Args:
        recorder: Keeps the metrics.
        samples: Log answered requests now and then.
    """

    def __init__(self, recorder: Recorder | None = None, samples: journal.Samples | None = None) -> None:
        self._recorder: Recorder = recorder or Silence()
        self._samples = samples or journal.Samples(0)
        self._has_failed = False

    @classmethod
    def of(cls, identity: Identity, layers: Sequence[str], classes: Sequence[str]) -> Telemetry:
        """Keep metrics if `PROMETHEUS_MULTIPROC_DIR` is set and prometheus_client installed, else none.

        `CONVSCOPE_LOG_REQUESTS_S` says how many seconds lie between two answered requests in the log; 0 for none.

        Args:
            identity: Who answers.
            layers: The published ones.
            classes: Labels by index.
        """
        samples = journal.Samples(float(os.environ.get("CONVSCOPE_LOG_REQUESTS_S") or 0))
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            return cls(samples=samples)
        try:
            from handlers.metrics import Metrics  # Needs prometheus_client, which a stock TorchServe may not have.

            return cls(Metrics(identity, layers, classes), samples)
        except Exception:
            logger.warning("no metrics are kept, as they could not be set up", exc_info=True)
            return cls(samples=samples)

    def loaded(self, seconds: float) -> None:
        """Note that the archive is loaded, and how long that took."""
        self._attempt(self._recorder.loaded, seconds)

    def in_flight(self, requests: int) -> None:
        """Say how many requests this worker holds now."""
        self._attempt(self._recorder.in_flight, requests)

    def record(self, traces: Sequence[Trace], handler_s: float) -> None:
        """Count the requests of a batch, all answered; log those that failed, and one of the others now and then."""
        self._attempt(self._recorder.record, traces, handler_s)
        self._samples.write(traces, handler_s)
        for trace in traces:
            journal.write_failure(trace)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception:
            if not self._has_failed:
                logger.warning("metrics miss what could not be recorded, now and perhaps later", exc_info=True)
            self._has_failed = True


class Nobody(Telemetry):
    """Keeps no metrics and writes no log: for requests that no caller made."""

    def record(self, traces: Sequence[Trace], handler_s: float) -> None:
        """Do nothing."""
