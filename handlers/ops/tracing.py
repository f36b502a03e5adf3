"""Spans: one per request and one per stage, sent to a collector by OpenTelemetry.

They are made when a batch has its responses, of the times that metrics and `timing` have too. A thread of
OpenTelemetry's sends them; what a slow collector does not take in time is dropped, and the log says so. The standard
variables apply: OTEL_EXPORTER_OTLP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*.

Only `telemetry` imports this module, and only where spans are asked for: OpenTelemetry need not be installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep, time_ns

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from handlers.api.errors import RequestError
from handlers.api.job import Job
from handlers.outputs.response import Identity

PROTOCOL = "http/protobuf"
_LOOK_S = 0.2  # Seconds between two checks for the drain file.
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Spans:
    """Makes and sends the spans of a worker's requests.

    Args:
        identity: The server's identity.
        drain_file: While this file exists, spans are sent at once: TorchServe kills its workers when it stops.

    Raises:
        ValueError: The variables ask for a protocol other than `PROTOCOL`.
    """

    def __init__(self, identity: Identity, drain_file: Path | None = None) -> None:
        protocol = next(filter(None, map(os.environ.get, _PROTOCOL_VARIABLES)), PROTOCOL)
        if protocol != PROTOCOL:
            raise ValueError(f"they can be sent by {PROTOCOL} alone, not by the protocol that the variables ask for")
        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "convscope"}))
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        if drain_file is not None:
            Thread(target=_flush, args=(provider, drain_file), name="spans", daemon=True).start()
        self._tracer = provider.get_tracer("convscope")
        self._extract = TraceContextTextMapPropagator().extract
        self._model = identity.model
        self._common = {
            "convscope.model": identity.model,
            "convscope.version": identity.version,
            "convscope.engine": identity.engine,
            "convscope.device": identity.device,
        }
        library = logging.getLogger("opentelemetry")
        library.handlers, library.propagate = [*logging.getLogger("handlers").handlers], False
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)  # Its warnings quote what callers send.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)  # It warns before each of its retries.

    def record(self, jobs: Sequence[Job]) -> None:
        """Make the spans of a batch, all of whose jobs have a response, and tell each job the id of its trace.

        A model card or filters that no caller traces are left out: they are asked for all the time, as readiness.
        """
        now, now_ns = perf_counter(), time_ns()
        for job in jobs:
            if job.traceparent or not job.predicts_nothing:
                self._record(job, len(jobs), now, now_ns)

    def _record(self, job: Job, batch_requests: int, now: float, now_ns: int) -> None:
        def at(moment: float) -> int:
            return now_ns - round((now - moment) * 1e9)

        kind = "describe" if job.predicts_nothing else "explain" if job.options.explain else "predict"
        span = self._tracer.start_span(
            f"{kind} {self._model}",
            self._extract({"traceparent": job.traceparent, "tracestate": job.tracestate}),
            SpanKind.SERVER,
            self._common | {"convscope.transport": job.transport, "convscope.request_id": job.request_id},
            start_time=at(job.began),
        )
        if not span.is_recording():
            return
        job.trace_id = format_trace_id(span.get_span_context().trace_id)
        span.set_attribute("convscope.pictures", len(job.pictures))
        span.set_attribute("convscope.picture_errors", sum(isinstance(one, RequestError) for one in job.results))
        span.set_attribute("convscope.batch_requests", batch_requests)
        if job.response is not None:
            span.set_attribute("convscope.reply_bytes", job.response.size)
        if job.error is not None:
            span.set_attribute("error.type", job.error.code)
            span.set_status(Status(StatusCode.ERROR, job.error.message))
        inside = set_span_in_context(span)
        for name, pieces in groupby(job.intervals or (), key=itemgetter(0)):
            first, *rest = pieces
            last = rest[-1] if rest else first
            self._tracer.start_span(name, inside, start_time=at(first[1])).end(at(last[2]))
        span.end(now_ns)


def _flush(provider: TracerProvider, drain_file: Path) -> None:
    """Send waiting spans whenever the server drains."""
    while True:
        sleep(_LOOK_S)
        if drain_file.exists():
            provider.force_flush()
