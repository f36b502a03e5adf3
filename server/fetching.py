"""HTTP requests to a server that may hang or send garbage: a response within limits of time and size, or an error."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator

MOST_BYTES = 16 * 1024 * 1024


def fetch(
    connection: http.client.HTTPConnection, path: str, timeout_s: float, *, method: str = "GET"
) -> tuple[int, bytes]:
    """Send one request, and close the connection.

    Args:
        connection: A connection that is not connected yet.
        path: Path of the request.
        timeout_s: Seconds until the complete response must be there; a socket's own timeout restarts with every byte.
        method: HTTP method.

    Returns:
        Status and body, at most 16 MiB.

    Raises:
        OSError: There is no connection, no complete response in time, or no HTTP response.
    """
    with contextlib.closing(connection):
        connection.timeout = timeout_s
        connection.connect()
        with cutting(connection.sock, timeout_s) as late:
            try:
                connection.request(method, path)
                response = connection.getresponse()
                body = response.read(MOST_BYTES)
                whole = not response.length  # None where the length is not announced.
            except http.client.HTTPException as error:
                raise OSError(f"{path}: no HTTP answer ({type(error).__name__})") from error
    if late.is_set():
        raise TimeoutError(f"{path}: no whole answer in {timeout_s:g} s")
    if not whole or len(body) == MOST_BYTES:
        raise OSError(f"{path}: the answer is cut short, or too long")
    return response.status, body


@contextlib.contextmanager
def cutting(connection: socket.socket, after_s: float) -> Iterator[threading.Event]:
    """Shut a connection down if the block takes longer than `after_s` seconds; yields an event that is set then."""
    late = threading.Event()
    watch = threading.Timer(after_s, _cut, (connection, late))
    watch.daemon = True
    watch.start()
    try:
        yield late
    finally:
        watch.cancel()


def _cut(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
