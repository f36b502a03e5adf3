"""A collector of OpenTelemetry's: takes spans as OTLP over HTTP, in protobuf, and keeps them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.harness import poll

SERVER = 2  # SpanKind of opentelemetry.proto.


@dataclass(frozen=True)
class Span:
    """A span that came in; times in nanoseconds since 1970, ids in hexadecimal digits."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    began: int
    ended: int
    state: str
    is_error: bool
    message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """What has come in.

    Attributes:
        endpoint: For OTEL_EXPORTER_OTLP_ENDPOINT.
        spans: In the order in which they came.
    """

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.spans: list[Span] = []

    def take(self, body: bytes) -> None:
        """Keep the spans of a message."""
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _attributes(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [
                    Span(
                        *(span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.kind),
                        *(span.start_time_unix_nano, span.end_time_unix_nano, span.trace_state),
                        *(span.status.code == span.status.STATUS_CODE_ERROR, span.status.message),
                        *(_attributes(span.attributes), resource),
                    )
                    for span in scope.spans
                ]

    def of(self, trace: str) -> list[Span]:
        """Return the spans of a trace that are there."""
        return [span for span in list(self.spans) if span.trace == trace]

    def await_request(self, trace: str) -> tuple[Span, dict[str, Span]]:
        """Wait for a request's span in a trace; return it, and the spans inside it by name."""
        [request] = poll(lambda: [span for span in self.of(trace) if span.kind == SERVER])
        return request, {span.name: span for span in self.of(trace) if span.parent == request.id}


@contextmanager
def collecting(host: str = "127.0.0.1") -> Iterator[Collector]:
    """Listen on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.read_body()
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            collector.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def read_body(self) -> bytes:
            if "content-length" in self.headers:
                return self.rfile.read(int(self.headers["content-length"]))
            body = b""  # Envoy sends chunks.
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            return body

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer((host, 0), Handler) as server:
        collector = Collector(server.server_port)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield collector
        server.shutdown()


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
