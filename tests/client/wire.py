"""Scripted servers and proxies on real sockets, and the two clients as one function, for the `test_wire_*` modules."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from convscope import AsyncClient, Client, ConvscopeError

from tests.client.test_network import HEAD, listening, reply, send, take

__all__ = [
    "BOTH",
    "HEAD",
    "drain",
    "listening",
    "make_certificate",
    "outcomes",
    "reply",
    "run",
    "send",
    "serve_tls",
    "take",
]

BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
T = TypeVar("T")


def run(kind: type, url: str, work: Callable[[Callable[..., Awaitable[Any]]], Awaitable[T]], **settings: Any) -> T:
    """Run a test's coroutine with either client.

    Args:
        kind: `Client` or `AsyncClient`.
        url: Where the server is.
        work: Gets a coroutine function that makes one `predict` call, with `model="cifar"` unless it says otherwise.
            With `Client` the call runs in a thread, so that `asyncio.gather` makes concurrent calls with both.
        **settings: Of the client; `retries=0` and `coalesce="off"` unless they say otherwise.

    Returns:
        What `work` returns.
    """
    settings = {"retries": 0, "coalesce": "off", **settings}

    async def with_async_client() -> T:
        async with AsyncClient(url, **settings) as client:
            return await work(lambda *a, **k: client.predict(*a, **{"model": "cifar", **k}))

    async def with_client() -> T:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(110))
        with Client(url, **settings) as client:
            return await work(lambda *a, **k: asyncio.to_thread(client.predict, *a, **{"model": "cifar", **k}))

    return asyncio.run(with_async_client() if kind is AsyncClient else with_client())


def outcomes(kind: type, url: str, times: int, picture: bytes = b"cat", **settings: Any) -> list[Any]:
    """Make several calls, one after the other; return the predictions and the errors raised."""

    async def work(predict: Callable[..., Awaitable[Any]]) -> list[Any]:
        found: list[Any] = []
        for _ in range(times):
            try:
                found.append(await predict(picture))
            except ConvscopeError as error:
                found.append(error)
        return found

    return run(kind, url, work, **settings)


def make_certificate(folder: Path, names: str) -> tuple[Path, ssl.SSLContext]:
    """Make a self-signed certificate.

    Args:
        folder: Where to write it.
        names: The subjectAltName, such as `DNS:localhost`.

    Returns:
        The PEM file to trust, and the server's context.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-addext", f"subjectAltName={names}", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def drain(connection: Any) -> None:
    """Read one request, however large, and keep none of it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    left = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]) - len(body)
    while left > 0:
        left -= len(connection.recv(min(left, 65536)))


def serve_tls(context: ssl.SSLContext, serve: Callable[[Any], None]) -> Callable[[Any], None]:
    """Make a server for `listening` speak TLS."""

    def secured(connection: Any) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # A last word goes out before the end does.
        with context.wrap_socket(connection, server_side=True) as tls:
            serve(tls)

    return secured
