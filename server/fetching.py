"""Asking an HTTP server that may hang, drip or talk nonsense: an answer within a time and a size, or an error."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading

MOST_BYTES = 16 * 1024 * 1024


def fetch(
    connection: http.client.HTTPConnection, path: str, timeout_s: float, *, method: str = "GET"
) -> tuple[int, bytes]:
    """Ask once and close the connection.

    Args:
        connection: Not yet connected.
        path: What to ask for.
        timeout_s: Longest time until the whole answer is there, in seconds; a socket's own timeout starts anew with
            every byte.
        method: HTTP method.

    Returns:
        Status and body, at most 16 MiB.

    Raises:
        OSError: No connection, no whole answer in time, or none that is HTTP.
    """
    late = threading.Event()
    with contextlib.closing(connection):
        connection.timeout = timeout_s
        connection.connect()
        watch = threading.Timer(timeout_s, _cut, (connection.sock, late))
        watch.daemon = True
        watch.start()
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read(MOST_BYTES)
            whole = not response.length  # None where the length is not announced.
        except http.client.HTTPException as error:
            raise OSError(f"{path}: no HTTP answer ({type(error).__name__})") from error
        finally:
            watch.cancel()
    if late.is_set():
        raise TimeoutError(f"{path}: no whole answer in {timeout_s:g} s")
    if not whole or len(body) == MOST_BYTES:
        raise OSError(f"{path}: the answer is cut short, or too long")
    return response.status, body


def _cut(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
