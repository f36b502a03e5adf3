"""Telemetry: what operators see of requests, as metrics, spans and in the log, and never at the cost of a request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.api.job import Job
from handlers.ops import log
from handlers.outputs.response import Identity
from handlers.settings import Settings

if TYPE_CHECKING:
    from handlers.ops.metrics import Metrics
    from handlers.ops.tracing import Spans

logger = logging.getLogger(__name__)


class Telemetry:
    """Keeps metrics, makes spans and logs failures. The log says once if metrics or spans cannot be recorded.

    Args:
        metrics: None to keep none.
        samples: Logs successful requests at intervals; None to log none.
        spans: Makes spans; None to make none.
    """

    def __init__(
        self, metrics: Metrics | None = None, samples: log.Samples | None = None, spans: Spans | None = None
    ) -> None:
        self._metrics = metrics
        self._samples = samples or log.Samples(0)
        self._spans = spans
        self._failed = set[str]()

    @classmethod
    def of(
        cls,
        identity: Identity,
        layers: Sequence[str],
        classes: Sequence[str],
        settings: Settings,
    ) -> Telemetry:
        """Keep metrics if there is a directory for them and prometheus_client is installed, and likewise spans.

        Args:
            identity: The server's identity.
            layers: Public names of the published layers.
            classes: Labels by index.
            settings: The worker's settings.
        """
        metrics = None
        if settings.metrics_dir is not None:
            try:
                from handlers.ops.metrics import Metrics  # Needs prometheus_client, which a stock TorchServe may lack.

                metrics = Metrics(identity, layers, classes, settings.metrics_dir)
            except Exception:
                logger.warning("no metrics are kept, as they could not be set up", exc_info=True)
        spans = _open_spans(identity, settings.drain_file) if settings.sends_spans else None
        return cls(metrics, log.Samples(settings.log_requests_s), spans)

    @property
    def makes_spans(self) -> bool:
        """Whether jobs must record when their stages began and ended."""
        return self._spans is not None

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
        """Count the requests of a batch, all of which have a response; log failures, and a sample of the others."""
        self._attempt("record", jobs, handler_s)
        if self._spans is not None:
            self._guard("spans", self._spans.record, jobs)  # Before the log, which has the ids of traces.
        self._samples.write(jobs, handler_s)
        for job in jobs:
            log.write_failure(job)

    def _attempt(self, method: str, *arguments: Any) -> None:
        if self._metrics is not None:
            self._guard("metrics", getattr(self._metrics, method), *arguments)

    def _guard(self, what: str, record: Callable[..., None], *arguments: Any) -> None:
        try:
            record(*arguments)
        except Exception:
            if what not in self._failed:
                logger.warning("%s could not be recorded and will be incomplete", what, exc_info=True)
            self._failed.add(what)


def _open_spans(identity: Identity, drain_file: Path | None) -> Spans | None:
    try:
        from handlers.ops.tracing import Spans

        return Spans(identity, drain_file)
    except ImportError as error:
        missing = "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http are not both installed"
        logger.warning("no spans are sent, though OTEL_EXPORTER_OTLP_ENDPOINT is set: %s (%s)", missing, error)
    except ValueError as error:
        logger.warning("no spans are sent: %s", error)
    except Exception:
        logger.warning("no spans are sent, as tracing could not be set up", exc_info=True)
    return None
