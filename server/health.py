"""`GET /ready`: whether this replica can take requests, from the state that the launcher and its watch keep.

The status is 200, or 503 with the reason. The gateway asks every 0.3 s, and so does the health check of the image. The
response never waits for a model, for TorchServe or for the disk. It is served by the launcher and not by the metrics
exporter, which may die at any time.

    {"ready": false, "why": "dead", "models": {"cifar/1.0": "dead", "digits/1.0": "ready"}, "rejected": {}}

`why` is `starting`, `draining`, `java`, or the state of a model (`server.watch`). `rejected` names the archives of the
store that are not served, each with the reason: the replica is ready without them.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from server.watch import Watch

CALLER_TIMEOUT_S = 30.0

Verdict = tuple[int, dict[str, Any]]  # HTTP status and body.


class Health:
    """The state of the replica; the launcher sets the attributes.

    Attributes:
        rejected: By name of the archives that are not served, the reason.
        watch: The watch of the models; None until all have responded.
        drain_file: A file that exists while the server drains; None until the private directory is created.
    """

    def __init__(self) -> None:
        self.rejected: dict[str, str] = {}
        self.watch: Watch | None = None
        self.drain_file: Path | None = None

    def __call__(self) -> Verdict:
        """Return whether the replica is ready, or why it is not."""
        states = self.watch.states() if self.watch else {}
        if self.drain_file is not None and self.drain_file.exists():
            why: str | None = "draining"
        else:
            why = self.watch.judge(states) if self.watch else "starting"
        said = {"models": states, "rejected": self.rejected}
        return (200, {"ready": True, **said}) if why is None else (503, {"ready": False, "why": why, **said})


class HealthServer(ThreadingHTTPServer):
    """Serves `GET /ready`, and nothing else, in a thread of its own.

    Args:
        listener: A socket that listens.
        answer: Returns the response.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, answer: Callable[[], Verdict]) -> None:
        super().__init__(listener.getsockname(), _build_handler(answer), bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        threading.Thread(target=self.serve_forever, daemon=True).start()


def _build_handler(answer: Callable[[], Verdict]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # The gateway keeps its connection.
        timeout = CALLER_TIMEOUT_S
        wbufsize = -1  # Head and body in one packet.

        def do_GET(self) -> None:
            status, said = answer() if self.path == "/ready" else (404, {"why": "only /ready is here"})
            body = json.dumps(said).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Log nothing."""

    return Handler
