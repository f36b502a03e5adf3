"""Connections of HTTP/1.1, blocking and asyncio's: opened along a route, asked one thing after the other.

A request goes out in one piece, and an answer is put together as it comes; on asyncio the caller is woken once, when
all of it is there. Blocking sockets, and TLS within TLS, are httpcore's.
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

from convscope._http import Incoming

if TYPE_CHECKING:
    from convscope._route import Route

_AT_ONCE = 256 * 1024  # Bytes read in one call.
_SMALL = 64 * 1024  # Bytes of a body that are rather copied behind the head than sent on their own.
_SECOND_ADDRESS_S = 0.25  # Seconds after which a host's next address is tried beside the first: RFC 8305's.
_IDLE_S = 5.0  # Seconds for which a connection that nobody uses may be used again.


class _Connection:
    """What both connections are.

    Args:
        route: Where they lead.

    Attributes:
        closed: Whether it was closed from here.
    """

    def __init__(self, route: Route) -> None:
        self.closed = False
        self._route = route
        self._stream: Any = None
        self._answer: Incoming | None = None
        self._idle_since = 0.0

    def rest(self) -> bool:
        """Note that nobody uses it now; say whether it may be used again."""
        self._idle_since = time.monotonic()
        return not self.closed and self._answer is not None and self._answer.complete and self._answer.reusable

    def expired(self) -> bool:
        """Say whether it has rested for too long, or the server has closed it or sent what nobody asked for."""
        return time.monotonic() > self._idle_since + _IDLE_S or bool(self._stream.get_extra_info("is_readable"))


class Connection(_Connection):
    """A blocking connection. `ends` is the time, by `time.monotonic`, to end by."""

    def ask(self, head: bytes, body: bytes, ends: float) -> Incoming:
        """Send a request and return its answer.

        Args:
            head: First line and headers, with the blank line.
            body: What comes behind it.
            ends: When to give up.

        Returns:
            The answer, complete.

        Raises:
            httpcore.NetworkError: No connection came about, or it broke.
            httpcore.ProtocolError: What came is no answer of HTTP/1.1.
            httpcore.ProxyError: The proxy refused.
            httpcore.TimeoutException: It took too long.
            ReplyTooLarge: The answer is over this client's limit.
        """
        if self._stream is None:
            self._open(ends)
        return self._exchange(head, body, ends, Incoming())

    def close(self) -> None:
        """Close it; whoever waits for an answer is woken."""
        self.closed = True
        if self._stream is not None:
            self._stream.close()

    def _open(self, ends: float) -> None:
        route = self._route
        self._keep(_Stream(_connect(route.host, route.port, ends)))
        if route.proxy_tls is not None:
            self._keep(self._stream.start_tls(route.proxy_tls, route.host, ends))
        if route.tunnel:
            _check_tunnel(self._exchange(route.tunnel, b"", ends, Incoming(bodiless=True)))
        if route.tls is not None:
            self._keep(self._stream.start_tls(route.tls, route.service, ends))

    def _keep(self, stream: _Stream) -> None:
        self._stream = stream
        if self.closed:  # Meanwhile.
            stream.close()
            raise httpcore.ConnectError("it was closed")

    def _exchange(self, head: bytes, body: bytes, ends: float, answer: Incoming) -> Incoming:
        stream, self._answer = self._stream, answer
        sent = False
        # A server may refuse a request, and close, before it has come to its end: there is an answer to read.
        with contextlib.suppress(httpcore.WriteError):
            if len(body) > _SMALL:
                stream.write(head, ends)
                stream.write(memoryview(body), ends)  # Of which the rest is no copy.
            else:
                stream.write(head + body, ends)
            sent = True
        while not answer.complete:
            data = stream.read(ends)
            if data:
                answer.take(data)
            else:
                answer.end()
        answer.reusable &= sent
        return answer


def _connect(host: str, port: int, ends: float) -> httpcore.NetworkStream:
    """Connect to the first of the host's addresses that takes it; each gets an equal share of the time left."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore.ConnectError(str(error)) from error
    below = httpcore.SyncBackend()
    failed: Exception = httpcore.ConnectError(f"{host} has no address")
    for tried, (*_, address) in enumerate(found):
        share_s = _left_s(ends) / (len(found) - tried)
        try:
            return below.connect_tcp(str(address[0]), port, share_s)
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            failed = error
    raise failed


class _Stream:
    """One of httpcore's streams, told until when instead of how long."""

    def __init__(self, below: httpcore.NetworkStream) -> None:
        self._below = below
        self._process = os.getpid()

    def read(self, ends: float) -> bytes:
        return self._below.read(_AT_ONCE, _left_s(ends))

    def write(self, data: Any, ends: float) -> None:
        self._below.write(data, _left_s(ends))

    def close(self) -> None:
        if self._process == os.getpid():  # In a child it is the parent's: nobody is told.
            with contextlib.suppress(OSError):
                self._below.get_extra_info("socket").shutdown(socket.SHUT_RDWR)  # Wakes the thread that reads from it.
        self._below.close()

    def start_tls(self, trust: Any, host: str, ends: float) -> _Stream:
        return _Stream(self._below.start_tls(trust, host, _left_s(ends)))

    def get_extra_info(self, info: str) -> Any:
        return self._below.get_extra_info(info)


class AsyncConnection(_Connection):
    """A connection of the event loop's. It knows no timeouts: whoever asks puts one around the whole."""

    async def ask(self, head: bytes, body: bytes) -> Incoming:
        """Send a request and return its answer; see `Connection.ask`."""
        if self._stream is None:
            await self._open()
        return await self._exchange(head, body, Incoming())

    async def close(self) -> None:
        """Close it; whoever waits for an answer is woken."""
        self.closed = True
        if self._stream is not None:
            await self._stream.aclose()

    async def _open(self) -> None:
        route = self._route
        await self._keep(await _connect_async(route.host, route.port))
        if route.proxy_tls is not None:
            await self._stream.start_tls(route.proxy_tls, route.host)
        if route.tunnel:
            _check_tunnel(await self._exchange(route.tunnel, b"", Incoming(bodiless=True)))
        if route.tls is not None:
            await self._stream.start_tls(route.tls, route.service)

    async def _keep(self, stream: _AsyncStream) -> None:
        self._stream = stream
        if self.closed:  # Meanwhile.
            await stream.aclose()
            raise httpcore.ConnectError("it was closed")

    async def _exchange(self, head: bytes, body: bytes, answer: Incoming) -> Incoming:
        self._answer = answer
        if len(body) > _SMALL:
            await self._stream.exchange((head, body), answer)
        else:
            await self._stream.exchange((head + body,), answer)
        return answer


async def _connect_async(host: str, port: int) -> _AsyncStream:
    loop = asyncio.get_running_loop()
    race: dict[str, Any] = {}
    # asyncio's race loses a connection whose caller is cancelled just when it is won; an address needs no race. Other
    # loops, such as uvloop's, have none: they try one address after the other.
    if isinstance(loop, asyncio.BaseEventLoop) and not _is_address(host):
        race["happy_eyeballs_delay"] = _SECOND_ADDRESS_S
    try:
        _, stream = await loop.create_connection(_AsyncStream, host, port, **race)
    except OSError as error:
        raise httpcore.ConnectError(str(error)) from error
    return stream


class _AsyncStream(asyncio.Protocol):
    """What asyncio tells of a connection."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._readable = False  # There was more to read than answers, or its end.
        self._error: Exception | None = None
        self._answer: Incoming | None = None
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self._readable = True
            return
        try:
            self._answer.take(data)
        except Exception as error:
            self._error = error
        if self._answer.complete or self._error is not None:
            self._wake()

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._readable = True
        if self._error is None and exc is not None:
            self._error = httpcore.ReadError(str(exc))
            self._error.__cause__ = exc
        self._wake()

    async def exchange(self, pieces: tuple[bytes, ...], answer: Incoming) -> None:
        """Send a request, and wait until its answer is complete."""
        self._answer = answer
        for piece in pieces:
            self._transport.write(piece)
        try:
            if not self._readable:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        finally:
            self._answer = self._waiter = None
        if answer.complete:
            return
        if self._error is not None:
            raise self._error
        answer.end()

    async def aclose(self) -> None:
        self._transport.close()
        try:
            await asyncio.sleep(0)
        finally:
            self._transport.abort()  # What could not be sent by now is of no use to anybody.

    async def start_tls(self, trust: Any, host: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(self._transport, self, trust, server_hostname=host)
        except BaseException as error:
            self._transport.abort()
            if isinstance(error, OSError):
                raise httpcore.ConnectError(str(error)) from error
            raise
        if secure is None:
            raise httpcore.ConnectError("the connection was closed")
        self._transport = secure

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._readable or self._transport.is_closing()
        return self._transport.get_extra_info(info)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _check_tunnel(answer: Incoming) -> None:
    """Check that a proxy has opened the way."""
    if not 200 <= answer.status < 300:
        raise httpcore.ProxyError(f"the proxy answered {answer.status} {answer.reason}")
    if not answer.reusable:
        raise httpcore.RemoteProtocolError("more came from the proxy than its answer")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _left_s(ends: float) -> float:
    """Return the seconds left until a time."""
    left_s = ends - time.monotonic()
    if left_s <= 0:
        raise httpcore.TimeoutException("too late")
    return left_s
