"""The container's health: exit status 0 once every model served has answered its card, which takes a real forward pass.

TorchServe itself is asked which models those are, over the management socket that only this user can open.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT_S = 8.0  # Less than the HEALTHCHECK's own.


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = str(path)

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def _get(connection: http.client.HTTPConnection, path: str) -> Any:
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"{path} answered {response.status}: {body[:200].decode('utf-8', 'replace')}")
    return json.loads(body)


def main() -> int:
    """Ask every model once."""
    sockets = list(Path(tempfile.gettempdir()).glob("convscope-*/management.sock"))
    try:
        if not sockets:
            raise OSError("the server is starting")
        models = [model["modelName"] for model in _get(_SocketConnection(sockets[0]), "/models?limit=1000")["models"]]
        if not models:
            raise OSError("no model is loaded yet")
        for name in models:
            _get(http.client.HTTPConnection("127.0.0.1", 8080, timeout=TIMEOUT_S), f"/predictions/{name}")
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
