"""Scripted servers and proxies on real sockets, and the two clients as one function, for the `test_wire_*` modules."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from convscope import AsyncClient, Client, ConvscopeError
from convscope._wire import convscope_pb2 as wire

__all__ = [
    "BOTH",
    "EVERY",
    "HEAD",
    "OverAiohttp",
    "certificate_files",
    "drain",
    "listening",
    "make_certificate",
    "outcomes",
    "reply",
    "run",
    "self_signed",
    "send",
    "serve_tls",
    "take",
    "take_request",
]

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\n"
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])


class OverAiohttp(AsyncClient):
    """An AsyncClient whose connections are aiohttp's."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, backend="aiohttp", **settings)


EVERY = pytest.mark.parametrize("kind", [Client, AsyncClient, OverAiohttp])
T = TypeVar("T")


def run(kind: type, url: str, work: Callable[[Callable[..., Awaitable[Any]]], Awaitable[T]], **settings: Any) -> T:
    """Run a test's coroutine with either client.

    Args:
        kind: `Client`, `AsyncClient` or `OverAiohttp`.
        url: Where the server is.
        work: Gets a coroutine function that makes one `predict` call, with `model="cifar"` unless it says otherwise.
            With `Client` the call runs in a thread, so that `asyncio.gather` makes concurrent calls with both.
        **settings: Of the client; `retries=0` unless they say otherwise.

    Returns:
        What `work` returns.
    """
    settings = {"retries": 0, **settings}

    async def with_async_client() -> T:
        async with kind(url, **settings) as client:
            return await work(lambda *a, **k: client.predict(*a, **{"model": "cifar", **k}))

    async def with_client() -> T:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(110))
        with Client(url, **settings) as client:
            return await work(lambda *a, **k: asyncio.to_thread(client.predict, *a, **{"model": "cifar", **k}))

    return asyncio.run(with_client() if kind is Client else with_async_client())


def outcomes(kind: type, url: str, times: int, picture: bytes = b"cat", **settings: Any) -> list[Any]:
    """Make several calls, one after the other; return the predictions and the errors raised."""

    async def work(predict: Callable[..., Awaitable[Any]]) -> list[Any]:
        result: list[Any] = []
        for _ in range(times):
            try:
                result.append(await predict(picture))
            except ConvscopeError as error:
                result.append(error)
        return result

    return run(kind, url, work, **settings)


def make_certificate(folder: Path, names: str) -> tuple[Path, Path]:
    """Make a self-signed certificate for two days.

    Args:
        folder: Where to write it.
        names: The subjectAltName, such as `DNS:localhost`.

    Returns:
        The PEM files of the certificate and of its key.
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
    return certificate, key


_FOLDERS = tempfile.TemporaryDirectory()  # Of certificates, as long as the tests run.


@cache
def certificate_files(names: str) -> tuple[Path, Path]:
    """Return what `make_certificate` makes, once for the tests that only need one of these names."""
    return make_certificate(Path(tempfile.mkdtemp(dir=_FOLDERS.name)), names)


def self_signed(names: str) -> tuple[Path, ssl.SSLContext]:
    """Return the PEM file of a certificate of these names, to trust, and a server's context of its own with it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate_files(names))
    return certificate_files(names)[0], context


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


@contextmanager
def listening(serve: Callable[[socket.socket], None], family: socket.AddressFamily = socket.AF_INET) -> Iterator[str]:
    """Serve each connection in a thread of its own; yield `host:port`."""
    host = "127.0.0.1" if family is socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family, backlog=128) as server:
        threads = []
        connections = []

        def run(connection: socket.socket) -> None:
            connections.append(connection)
            with connection, suppress(OSError):
                serve(connection)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threads.append(threading.Thread(target=run, args=(server.accept()[0],), daemon=True))
                    threads[-1].start()

        threads.append(threading.Thread(target=accept, daemon=True))
        threads[0].start()
        yield f"{host if family is socket.AF_INET else f'[{host}]'}:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            with suppress(OSError):  # A closed one.
                connection.shutdown(socket.SHUT_RDWR)
        for thread in list(threads):
            thread.join(10)
            assert not thread.is_alive()


def take(connection: socket.socket) -> bytes:
    """Read one request; return its head."""
    return _take(connection)[0]


def take_request(connection: socket.socket) -> wire.PredictRequest | None:
    """Read one request; None if the client has closed the connection."""
    head, body = _take(connection)
    return wire.PredictRequest.FromString(body) if head else None


def _take(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head, body


def reply(cells: np.ndarray[Any, Any] | None = None) -> bytes:
    """Serialize an answer about one picture."""
    result = wire.Result()
    result.top.add(label="a class")
    if cells is not None:
        tensor = wire.Tensor(dtype=wire.FLOAT32, shape=cells.shape, data=cells.tobytes())
        result.maps.add(layer="conv1", tensor=tensor)
    return wire.PredictReply(model="cifar", results=[result]).SerializeToString()


def send(connection: socket.socket, body: bytes, more: bytes = b"") -> None:
    connection.sendall(HEAD + more + b"content-length: %d\r\n\r\n" % len(body) + body)
