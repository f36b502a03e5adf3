"""A receiver of Alertmanager's notifications, beside a stack: what was sent to the webhook, and when it arrived."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

IMAGE = "convscope/probe:0.1.0"  # It has Python.
NAME, PORT = "receiver", 8085
RECEIVER_URL = f"http://{NAME}:{PORT}/"  # For CONVSCOPE_ALERT_WEBHOOK.
SERVER = """
import http.server, json, threading, time
lock = threading.Lock()  # Two notifications may come at once, each in a thread of its own.
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with lock:
            print(json.dumps({"time": time.time(), "path": self.path, **body}), flush=True)
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("", %d), Receiver).serve_forever()
"""


@dataclass(frozen=True)
class Notification:
    """One POST.

    Attributes:
        time_s: When it came, unix time.
        path: To which path: `/` for pages and tickets, `/watchdog` for the dead man's switch.
        status: `firing` or `resolved`.
        alerts: The labels of its alerts that have this status.
    """

    time_s: float
    path: str
    status: str
    alerts: tuple[dict[str, str], ...]

    def names(self, severity: str = "page") -> set[str]:
        """Return the names of its alerts of a severity."""
        return {alert["alertname"] for alert in self.alerts if alert.get("severity") == severity}


class Receiver:
    """A container on the stack's network `outward`; use it in a `with` while the stack is up.

    Args:
        project: Name of the compose project.
    """

    def __init__(self, project: str) -> None:
        self._network, self._container = f"{project}_outward", f"{project}-{NAME}"

    def __enter__(self) -> Receiver:
        command = [
            "run",
            "-d",
            "--name",
            self._container,
            "--network",
            self._network,
            "--network-alias",
            NAME,
            "--no-healthcheck",
        ]
        _docker(*command, "--entrypoint", "python", IMAGE, "-u", "-c", SERVER % PORT)
        return self

    def __exit__(self, *_: object) -> None:
        _docker("rm", "-f", self._container)

    @property
    def notifications(self) -> list[Notification]:
        """What has come so far, the oldest first."""
        return [_read(json.loads(line)) for line in _docker("logs", self._container).splitlines()]

    def first(self, alert: str, status: str, since_s: float) -> Notification | None:
        """Return the first notification after a moment (unix time) that an alert has a status."""
        for notification in self.notifications:
            names = {labels["alertname"] for labels in notification.alerts}
            if notification.time_s >= since_s and notification.status == status and alert in names:
                return notification
        return None


def _read(body: dict[str, Any]) -> Notification:
    alerts = tuple(alert["labels"] for alert in body["alerts"] if alert["status"] == body["status"])
    return Notification(body["time"], body["path"], body["status"], alerts)


def _docker(*arguments: str) -> str:
    answer = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout
