"""The metrics exporter: serves the metrics of workers and server to Prometheus, at /metrics.

The launcher starts it as a child (`Exporter`) and opens its socket, so that connections are accepted from the beginning
and while the exporter restarts. It has no state: everything is read at every scrape.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from server import children
from server.configuration import METRICS_VARIABLES, PrivateDirectory
from server.fetching import cutting
from server.models import Archive
from server.reporting import Reporter
from server.server_metrics import ServerMetrics
from server.worker_metrics import WorkerFiles

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

MOST_THREADS = 8
CALLER_TIMEOUT_S = 5.0  # For a client that sends nothing, or receives nothing.
CALLER_S = 10.0  # For a whole exchange, with a client that sends or receives slowly.
BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
HEALTHY_S = 60.0  # After it has run for so long, the back-off is reset.
STOP_S = 2.0
ROOT = Path(__file__).resolve().parent.parent


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
    parser = argparse.ArgumentParser(prog="python -m server.exporter", description="Started by python -m server.")
    add = parser.add_argument
    add("--listener", type=int, required=True, metavar="FD", help="inherited socket that listens")
    add("--directory", type=Path, required=True, metavar="DIR", help="the private directory")
    add("--torchserve-port", type=int, required=True, metavar="PORT", help="TorchServe's own metrics, on 127.0.0.1")
    add("--models", nargs="+", required=True, metavar="NAME/VERSION", help="served, a model's default version first")
    add("--started", type=float, required=True, metavar="UNIX_TIME", help="when the server was started")
    add("--patches", nargs="*", default=(), metavar="NAME", help="patches of TorchServe that are active")
    add("--launcher", type=int, required=True, metavar="PID", help="the launcher; the exporter ends with it")
    given = parser.parse_args(arguments)
    children.die_with(given.launcher)
    models = [(name, version) for name, _, version in (model.partition("/") for model in given.models)]
    directory = PrivateDirectory(given.directory)
    server = ServerMetrics(models, given.torchserve_port, directory, given.started, given.patches)
    Server(socket.socket(fileno=given.listener), build_app(directory.metrics, server)).serve_forever()


class Exporter:
    """Runs the exporter as a child of the launcher, and restarts it when it dies.

    Args:
        listener: The socket on which it serves metrics.
        torchserve_port: Port of TorchServe's own metrics, on 127.0.0.1.
        directory: The private directory.
        archives: The archives served, the newest version of a model first.
        started: When the server was started, unix time.
        patches: Names of the patches of TorchServe that are active.
        environment: Environment to start from.
        reporter: Reports its death.
    """

    def __init__(
        self,
        listener: socket.socket,
        torchserve_port: int,
        directory: PrivateDirectory,
        archives: Sequence[Archive],
        started: float,
        patches: Sequence[str],
        environment: Mapping[str, str],
        reporter: Reporter,
    ) -> None:
        self._listener = listener
        self._log = directory.exporter_log
        self._reporter = reporter
        # With these set, prometheus_client would write files of its own among the workers'.
        self._environment = {key: value for key, value in environment.items() if key not in METRICS_VARIABLES}
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        self._command = [
            *(sys.executable, "-m", "server.exporter"),
            *("--listener", str(listener.fileno())),
            *("--directory", str(directory.path)),
            *("--torchserve-port", str(torchserve_port)),
            *("--models", *(archive.full_name for archive in archives)),
            *("--started", f"{started:.3f}"),
            *("--patches", *patches),
            *("--launcher", str(os.getpid())),
        ]
        self._back_off_s = BACK_OFF_S
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = self._due = time.monotonic()
        self._start()

    def check(self) -> None:
        """Restart it if it has ended, after a pause that grows with each death."""
        if self._process is None:
            if time.monotonic() >= self._due:
                self._start()
            return
        if (status := self._process.poll()) is not None:
            self._process = None
            self._put_off(children.describe_ending(status))

    def stop(self) -> None:
        """Stop it, and close its socket."""
        self._listener.close()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        try:
            self._process = children.start(
                self._command, environment=self._environment, log=self._log, descriptors=[self._listener.fileno()]
            )
        except OSError as error:  # No memory, no more processes: serving goes on.
            self._put_off(str(error))

    def _put_off(self, why: str) -> None:
        """Schedule the next start; report the first death since it ran for long."""
        now = time.monotonic()
        if now - self._started_at > HEALTHY_S:
            self._back_off_s = BACK_OFF_S
        if self._back_off_s == BACK_OFF_S:
            self._reporter.say(
                f"the metrics exporter ended ({why}) and is started again; see {self._log}", level="warning"
            )
        self._due = now + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)


if __name__ == "__main__":
    main()
