"""Telemetry: what operators see of requests, as metrics and in the log, and never at the cost of a request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.api.job import Job
from handlers.ops import log
from handlers.outputs.response import Identity

if TYPE_CHECKING:
    from handlers.ops.metrics import Metrics

logger = logging.getLogger(__name__)


class Telemetry:
    """Keeps metrics and logs failures. The log says once if metrics cannot be recorded.

    Args:
        metrics: None to keep none.
        samples: Logs answered requests now and then; None to log none.
    """

    def __init__(self, metrics: Metrics | None = None, samples: log.Samples | None = None) -> None:
        self._metrics = metrics
        self._samples = samples or log.Samples(0)
        self._has_failed = False

    @classmethod
    def of(
        cls,
        identity: Identity,
        layers: Sequence[str],
        classes: Sequence[str],
        directory: Path | None,
        log_requests_s: float = 0.0,
    ) -> Telemetry:
        """Keep metrics if there is a directory for them and prometheus_client is installed.

        Args:
            identity: What serves the requests.
            layers: Public names of the published ones.
            classes: Labels by index.
            directory: Of prometheus_client's multiprocess mode; None for no metrics.
            log_requests_s: Least seconds between two answered requests in the log; 0 for none.
        """
        samples = log.Samples(log_requests_s)
        if directory is None:
            return cls(samples=samples)
        try:
            from handlers.ops.metrics import Metrics  # Needs prometheus_client, which a stock TorchServe may not have.

            return cls(Metrics(identity, layers, classes, directory), samples)
        except Exception:
            logger.warning("no metrics are kept, as they could not be set up", exc_info=True)
            return cls(samples=samples)

    def loaded(self, seconds: float) -> None:
        """Record that the archive is loaded, and how long that took."""
        self._attempt("loaded", seconds)

    def patched(self, patches: dict[str, bool]) -> None:
        """Record which patches of TorchServe's worker are active."""
        self._attempt("patched", patches)

    def in_flight(self, requests: int) -> None:
        """Record how many requests this worker holds now."""
        self._attempt("in_flight", requests)

    def record(self, jobs: Sequence[Job], handler_s: float) -> None:
        """Count the requests of a batch, all of which have a response; log failures, and one other now and then."""
        self._attempt("record", jobs, handler_s)
        self._samples.write(jobs, handler_s)
        for job in jobs:
            log.write_failure(job)

    def _attempt(self, method: str, *arguments: Any) -> None:
        if self._metrics is None:
            return
        try:
            record: Callable[..., None] = getattr(self._metrics, method)
            record(*arguments)
        except Exception:
            if not self._has_failed:
                logger.warning("metrics miss what could not be recorded, now and perhaps later", exc_info=True)
            self._has_failed = True
