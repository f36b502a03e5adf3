"""HTTP through the gateway byte by byte, for what no client would send."""

from __future__ import annotations

import socket
import ssl

from tests.docker.stack import Stack


def connect(stack: Stack) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(stack.ca_file))
    context.set_alpn_protocols(["http/1.1"])
    return context.wrap_socket(
        socket.create_connection(("localhost", stack.port), timeout=30), server_hostname="localhost"
    )


def receive(connection: ssl.SSLSocket) -> bytes:
    """Read until the peer closes, or says nothing for a second after it has answered."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
            connection.settimeout(1)
    except (TimeoutError, OSError):
        pass
    return received


def head(stack: Stack, line: str, *headers: str, key: str | None = None) -> bytes:
    lines = [f"{line} HTTP/1.1", "Host: localhost", f"x-api-key: {stack.key if key is None else key}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
