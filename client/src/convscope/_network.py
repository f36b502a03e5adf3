"""The network below httpcore: what is sent goes out in one piece, and what has come is taken in one piece.

httpcore writes a request's head and body one by one and reads 64 KB at a time, each of which costs a system call, on
the other side too, and a turn through its parser. Its own asyncio network is anyio's, which takes turns of the event
loop besides. With these streams in place of its own, and without httpx, the transport takes half the processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import time
from typing import TYPE_CHECKING, Any, cast

import httpcore

if TYPE_CHECKING:
    import ssl

_AT_ONCE = 256 * 1024  # Bytes read in one call.
_SMALL = 64 * 1024  # Bytes that rather wait for the next ones than be sent alone.
_AHEAD = 1024 * 1024  # Bytes received and not read, from which on the server has to wait.
_SECOND_ADDRESS_S = 0.25  # Seconds after which a host's next address is tried beside the first: RFC 8305's.


class Network(httpcore.NetworkBackend):
    """A blocking network. Its timeouts are not seconds: they are the time, by `time.monotonic`, to end by."""

    def __init__(self) -> None:
        self._below = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first of the host's addresses that takes it; each gets an equal share of the time left."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        failed: Exception = httpcore.ConnectError(f"{host} has no address")
        for tried, (*_, address) in enumerate(found):
            left_s = _left_s(timeout)
            share_s = None if left_s is None else left_s / (len(found) - tried)
            try:
                return _Stream(self._below.connect_tcp(str(address[0]), port, share_s, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed


class _Stream(httpcore.NetworkStream):
    """One of httpcore's own streams, of which less is asked."""

    def __init__(self, below: httpcore.NetworkStream) -> None:
        self._below = below
        self._unsent = b""
        self._process = os.getpid()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent:
            # A server may refuse a request, and close, before it has come to its end: there is an answer to read.
            with contextlib.suppress(httpcore.WriteError):
                self._send(timeout)
        return self._below.read(max(max_bytes, _AT_ONCE), _left_s(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if len(buffer) > _SMALL:
            self._send(timeout)
            self._below.write(buffer, _left_s(timeout))
        else:
            self._unsent += buffer

    def close(self) -> None:
        if self._process == os.getpid():  # In a child it is the parent's: nobody is told.
            with contextlib.suppress(OSError):
                self._below.get_extra_info("socket").shutdown(socket.SHUT_RDWR)  # Wakes the thread that reads from it.
        self._below.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._below.start_tls(ssl_context, server_hostname, _left_s(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._below.get_extra_info(info)

    def _send(self, timeout: float | None) -> None:
        unsent, self._unsent = self._unsent, b""
        self._below.write(unsent, _left_s(timeout))


class AsyncNetwork(httpcore.AsyncNetworkBackend):
    """asyncio's network. It knows no timeouts: whoever asks puts one around the whole."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect."""
        loop = asyncio.get_running_loop()
        # asyncio's race loses a connection whose caller is cancelled just when it is won; an address needs no race.
        delay_s = None if _is_address(host) else _SECOND_ADDRESS_S
        try:
            _, stream = await loop.create_connection(_AsyncStream, host, port, happy_eyeballs_delay=delay_s)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        return stream


class _AsyncStream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """A connection of the event loop's."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._unsent = b""
        self._come: list[bytes] = []
        self._size = 0
        self._ended = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._come.append(data)
        self._size += len(data)
        if self._size > _AHEAD:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._error = exc
        self._wake()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent:
            self._send()
        if not self._come and not self._ended:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self._come:
            come = b"".join(self._come)
            self._come.clear()
            if self._size > _AHEAD:
                self._transport.resume_reading()
            self._size = 0
            return come
        if self._error is not None:
            raise httpcore.ReadError(str(self._error)) from self._error
        return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if len(buffer) > _SMALL:
            self._send()
            self._transport.write(buffer)
        else:
            self._unsent += buffer

    async def aclose(self) -> None:
        self._transport.close()
        try:
            await asyncio.sleep(0)
        finally:
            self._transport.abort()  # What could not be sent by now is of no use to anybody.

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(self._transport, self, ssl_context, server_hostname=server_hostname)
        except BaseException as error:
            self._transport.abort()
            if isinstance(error, OSError):
                raise httpcore.ConnectError(str(error)) from error
            raise
        if secure is None:
            raise httpcore.ConnectError("the connection was closed")
        self._transport = secure
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._ended or bool(self._come) or self._transport.is_closing()
        return self._transport.get_extra_info(info)

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, b""
        self._transport.write(unsent)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def holds_more(connection: Any) -> bool:
    """Say whether more has come over a connection than the answer: it would seem to be the next one.

    Args:
        connection: httpcore's, of HTTP/1.1, whose answer was read. It does not tell by itself.
    """
    while (inner := getattr(connection, "_connection", None)) is not None:  # Through a proxy there are two around it.
        connection = inner
    parser = getattr(connection, "_h11_state", None)  # None where no connection came about.
    return parser is not None and bool(parser.trailing_data[0])


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _left_s(ends: float | None) -> float | None:
    """Return the seconds left until a time."""
    if ends is None:
        return None
    left_s = ends - time.monotonic()
    if left_s <= 0:
        raise httpcore.TimeoutException("too late")
    return left_s
