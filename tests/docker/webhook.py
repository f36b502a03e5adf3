"""A receiver of Alertmanager's notifications, on this machine, that containers can reach."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Notification:
    """One alert of a notification.

    Attributes:
        at: Unix time at which it came.
        status: `firing` or `resolved`.
        labels: The alert's.
    """

    at: float
    status: str
    labels: dict[str, str]

    @property
    def alert(self) -> str:
        """Name of the alert."""
        return self.labels["alertname"]


class Webhook:
    """Takes notifications until it is closed; `notifications` has them in order of arrival."""

    def __init__(self) -> None:
        self.notifications: list[Notification] = []
        notifications = self.notifications

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in body["alerts"]:
                    notifications.append(Notification(time.time(), alert["status"], alert["labels"]))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
