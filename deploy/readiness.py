"""A replica's first process: the launcher, and beside it, in a thread, the answer to whether this replica is ready.

    python -m deploy.readiness --model-store /models --host 0.0.0.0     # the launcher's own arguments

`GET /ready` on port 8083 has every model served answer its card, which takes a real forward pass: 200 if they all did
and the launcher's watch (server/watch.py) is not restarting one of them. Nobody has to name a model: TorchServe is
asked for them, over the management socket that only this user can open.
The gateway asks it once a second and the image's health check now and then. It is here and not in the metrics exporter,
which may die at any time: whoever asks finds this as long as there is a launcher.
"""

from __future__ import annotations

import http.client
import json
import runpy
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PORT = 8083
REST_PORT = 8080
CARD_TIMEOUT_S = 4.0  # Less than the gateway waits, so that it hears which model is silent.
LIST_TIMEOUT_S = 1.0
FRESH_S = 0.5  # The gateway asks once for each transport; one look at the models does for both.
CALLER_TIMEOUT_S = 30.0
MOST_QUESTIONS = 16  # At the same time.

Verdict = tuple[int, dict[str, Any]]  # An HTTP status, and what to say with it.


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=LIST_TIMEOUT_S)
        self._path = str(path)

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIST_TIMEOUT_S)
        self.sock.connect(self._path)


def look(folder: Path, rest_port: int, timeout_s: float = CARD_TIMEOUT_S) -> Verdict:
    """Ask every model served for its card, all at once.

    Args:
        folder: Where the launcher makes its private directory.
        rest_port: TorchServe's, on 127.0.0.1.
        timeout_s: For the cards.
    """
    sockets = list(folder.glob("convscope-*/management.sock"))
    if sockets and (restarts := find_restarts(sockets[0].with_name("watch.json"))):
        return 503, {"ready": False, "restarting": restarts}
    try:
        status, body = _get(_SocketConnection(sockets[0]), "/models?limit=1000") if sockets else (503, b"")
        names = [model["modelName"] for model in json.loads(body)["models"]] if status == 200 else []
    except TimeoutError:
        return 504, {"ready": False, "why": "TorchServe does not say what it serves"}
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        names = []
    if not names:
        return 503, {"ready": False, "why": "no model is loaded yet"}
    with ThreadPoolExecutor(min(len(names), MOST_QUESTIONS)) as pool:
        statuses = list(pool.map(partial(_card_status, rest_port, timeout_s), names))
    return judge(dict(zip(names, statuses, strict=True)))


def find_restarts(file: Path) -> dict[str, str]:
    """Return the models that the launcher's watch is restarting, `name/version` to reason; empty if it says nothing."""
    try:
        models = json.loads(file.read_text())["models"]
        return {name: known["restarting"] for name, known in models.items() if known["restarting"]}
    except (OSError, ValueError):
        return {}


def judge(cards: Mapping[str, int | None]) -> Verdict:
    """Make one answer of the cards' statuses; None stands for a card that did not come in time.

    503 is for a server that says so itself: it starts, drains, or has no worker. A model that is silent while another
    answers is busy, and no reason to take all the others away; if all are silent that is 504.
    """
    said = {"models": dict(cards)}
    wrong = [status for status in cards.values() if status not in (200, None)]
    if wrong:
        return 503 if 503 in wrong else 500, {"ready": False, **said}
    if 200 not in cards.values():
        return 504, {"ready": False, **said}
    return 200, {"ready": True, **said}


def _card_status(port: int, timeout_s: float, name: str) -> int | None:
    try:
        return _get(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s), f"/predictions/{name}")[0]
    except TimeoutError:
        return None
    except (OSError, http.client.HTTPException):
        return 503


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[int, bytes]:
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Latest:
    """The answer to all who ask at about the same time: one looks, the others wait for what it finds.

    Args:
        look: What finds it.
        fresh_s: How long it holds.
    """

    def __init__(self, look: Callable[[], Verdict], fresh_s: float = FRESH_S) -> None:
        self._look = look
        self._fresh_s = fresh_s
        self._lock = threading.Lock()
        self._found: Verdict | None = None
        self._until = 0.0

    def __call__(self) -> Verdict:
        """Return it."""
        with self._lock:
            if self._found is None or time.monotonic() > self._until:
                self._found = self._look()
                self._until = time.monotonic() + self._fresh_s
            return self._found


def build_server(address: tuple[str, int], answer: Callable[[], Verdict]) -> ThreadingHTTPServer:
    """Build the server of `GET /ready`, and of nothing else; it listens at once."""

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

    return ThreadingHTTPServer(address, Handler)


def main() -> None:
    """Answer until the launcher, run here with this process's arguments, ends."""
    server = build_server(("0.0.0.0", PORT), Latest(partial(look, Path(tempfile.gettempdir()), REST_PORT)))  # noqa: S104
    threading.Thread(target=server.serve_forever, daemon=True).start()
    runpy.run_module("server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
