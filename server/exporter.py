"""The one address Prometheus asks: the workers' metrics and the server's, at /metrics.

The launcher starts it (`server.exporter_process`).
It listens on a socket that the launcher opened, so that its address is there from the first moment and whenever the
exporter is started again. It writes nothing and keeps nothing: what it answers is read anew at every scrape.
"""

from __future__ import annotations

import argparse
import socket
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from server.children import die_with
from server.fetching import cutting
from server.server_metrics import ServerMetrics
from server.worker_metrics import WorkerFiles

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

MOST_THREADS = 8
CALLER_TIMEOUT_S = 5.0  # For a caller that says nothing, or takes nothing.
CALLER_S = 10.0  # For one that says or takes something, a byte now and then.


def build_app(folder: Path, server: ServerMetrics) -> WSGIApplication:
    """Build the application: GET /metrics, nothing else.

    Args:
        folder: Where the workers write their metrics.
        server: What the server knows itself.
    """
    registry = CollectorRegistry()
    registry.register(WorkerFiles(folder))
    registry.register(server)
    metrics: WSGIApplication = make_wsgi_app(registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics":
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"only /metrics is here\n"]
        return metrics(environ, start_response)

    return app


class Server(ThreadingMixIn, WSGIServer):
    """An HTTP server on a socket that listens already, with a bounded number of threads.

    Args:
        listener: The socket.
        app: What answers.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, app: WSGIApplication) -> None:
        host, port = listener.getsockname()[:2]
        BaseServer.__init__(self, (host, port), Handler)
        self.socket = listener
        self.server_name, self.server_port = host, port  # Not looked up: a name service may be slow.
        self.setup_environ()
        self.set_app(app)
        self._slots = threading.BoundedSemaphore(MOST_THREADS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread once one is free; until then callers wait in the kernel's queue."""
        self._slots.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one caller, who does not keep the thread for long."""
        try:
            with cutting(request, CALLER_S):
                super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about callers that hang up; tell about anything else."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(WSGIRequestHandler):
    """Answers one caller without a word."""

    timeout = CALLER_TIMEOUT_S

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve metrics until killed."""
    given = build_parser().parse_args(arguments)
    die_with(given.launcher)
    models = [(name, version) for name, _, version in (model.partition("/") for model in given.models)]
    server = ServerMetrics(
        models,
        given.torchserve_port,
        given.management_socket,
        given.drain_file,
        given.watch_file,
        given.started,
        given.patches,
    )
    Server(socket.socket(fileno=given.listener), build_app(given.folder, server)).serve_forever()


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line, which the launcher writes."""
    parser = argparse.ArgumentParser(prog="python -m server.exporter", description="Serve /metrics.")
    add = parser.add_argument
    add("--listener", type=int, required=True, metavar="FD", help="inherited socket that listens")
    add("--folder", type=Path, required=True, metavar="DIR", help="where the workers write their metrics")
    add("--torchserve-port", type=int, required=True, metavar="PORT", help="TorchServe's own metrics, on 127.0.0.1")
    add("--management-socket", type=Path, required=True, metavar="FILE", help="TorchServe's management API")
    add("--drain-file", type=Path, required=True, metavar="FILE", help="there while the server drains")
    add("--watch-file", type=Path, required=True, metavar="FILE", help="what the launcher's watch knows of the models")
    add("--models", nargs="+", required=True, metavar="NAME/VERSION", help="served, a model's default version first")
    add("--started", type=float, required=True, metavar="UNIX_TIME", help="when the server was started")
    add("--patches", nargs="*", default=(), metavar="NAME", help="patches of TorchServe that are active")
    add("--launcher", type=int, required=True, metavar="PID", help="with whom it ends")
    return parser


if __name__ == "__main__":
    main()
