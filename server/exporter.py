"""The metrics exporter: serves the metrics of workers and server to Prometheus, at /metrics.

The launcher starts it (`server.exporter_process`) and opens its socket, so that connections are accepted from the
beginning and while the exporter restarts. It has no state: everything is read at every scrape.
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
CALLER_TIMEOUT_S = 5.0  # For a client that sends nothing, or receives nothing.
CALLER_S = 10.0  # For a whole exchange, with a client that sends or receives slowly.


def build_app(folder: Path, server: ServerMetrics) -> WSGIApplication:
    """Build the application: GET /metrics, nothing else.

    Args:
        folder: Folder of the workers' metrics.
        server: The metrics of the server.
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
    """An HTTP server on a socket that already listens, with a limited number of threads.

    Args:
        listener: The socket.
        app: The application.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, app: WSGIApplication) -> None:
        host, port = listener.getsockname()[:2]
        BaseServer.__init__(self, (host, port), Handler)
        self.socket = listener
        self.server_name, self.server_port = host, port  # Not resolved: a name service may be slow.
        self.setup_environ()
        self.set_app(app)
        self._slots = threading.BoundedSemaphore(MOST_THREADS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Respond in a thread once one is free; until then clients wait in the kernel's queue."""
        self._slots.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Respond to one client, within a time limit."""
        try:
            with cutting(request, CALLER_S):
                super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors other than clients that disconnect."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(WSGIRequestHandler):
    """Responds to one client, and logs nothing."""

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
    """Build the parser of the command line, which the launcher passes."""
    parser = argparse.ArgumentParser(prog="python -m server.exporter", description="Serve /metrics.")
    add = parser.add_argument
    add("--listener", type=int, required=True, metavar="FD", help="inherited socket that listens")
    add("--folder", type=Path, required=True, metavar="DIR", help="folder of the workers' metrics")
    add("--torchserve-port", type=int, required=True, metavar="PORT", help="TorchServe's own metrics, on 127.0.0.1")
    add("--management-socket", type=Path, required=True, metavar="FILE", help="TorchServe's management API")
    add("--drain-file", type=Path, required=True, metavar="FILE", help="exists while the server drains")
    add("--watch-file", type=Path, required=True, metavar="FILE", help="state of the models, from the launcher's watch")
    add("--models", nargs="+", required=True, metavar="NAME/VERSION", help="served, a model's default version first")
    add("--started", type=float, required=True, metavar="UNIX_TIME", help="when the server was started")
    add("--patches", nargs="*", default=(), metavar="NAME", help="patches of TorchServe that are active")
    add("--launcher", type=int, required=True, metavar="PID", help="the launcher; the exporter ends with it")
    return parser


if __name__ == "__main__":
    main()
