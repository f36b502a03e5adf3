"""`GET /ready`: whether this replica is to be given requests, at once, from what the launcher and its watch know.

200, or 503 with the reason. The gateway asks every 0.3 s and the image's health check now and then; who asks never
waits for a model, TorchServe or the disk. It is in the launcher and not in the metrics exporter, which may die at any
time: whoever asks finds this as long as there is a launcher.

    {"ready": false, "why": "dead", "models": {"cifar/1.0": "dead", "digits/1.0": "ready"}, "rejected": {}}

`why` is `starting`, `draining`, `java`, or the state of a model (`server.watch`). `rejected` says which archives of the
store are not served, and why: the replica is ready without them.
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

Verdict = tuple[int, dict[str, Any]]  # An HTTP status, and what to say with it.


class Health:
    """What the replica is; the launcher writes the attributes as it goes on.

    Attributes:
        rejected: Archives that are not served, by name, and why.
        watch: Knows the models; None until all have answered.
        drain_file: Exists while the server drains; None before the private directory is made.
    """

    def __init__(self) -> None:
        self.rejected: dict[str, str] = {}
        self.watch: Watch | None = None
        self.drain_file: Path | None = None

    def __call__(self) -> Verdict:
        """Say whether the replica is ready, and why not."""
        states = self.watch.states() if self.watch else {}
        if self.drain_file is not None and self.drain_file.exists():
            why: str | None = "draining"
        else:
            why = self.watch.judge(states) if self.watch else "starting"
        said = {"models": states, "rejected": self.rejected}
        return (200, {"ready": True, **said}) if why is None else (503, {"ready": False, "why": why, **said})


class HealthServer(ThreadingHTTPServer):
    """Answers `GET /ready`, and nothing else, from a thread of its own.

    Args:
        listener: A socket that listens.
        answer: What to answer.
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
