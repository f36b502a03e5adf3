"""Connections of HTTP/1.1: opened along a route, asked one thing after the other. Here those that block.

A request goes out in one piece, and an answer is put together as it comes. Sockets, and TLS within TLS, are httpcore's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import httpcore

from convscope._http import Incoming

if TYPE_CHECKING:
    from convscope._route import Route

_AT_ONCE = 256 * 1024  # Bytes read in one call.
SMALL = 64 * 1024  # Bytes of a body that are rather copied behind the head than sent on their own.
_IDLE_S = 5.0  # Seconds for which a connection that nobody uses may be used again.


class BaseConnection:
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


class Connection(BaseConnection):
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
            check_tunnel(self._exchange(route.tunnel, b"", ends, Incoming(bodiless=True)))
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
            if len(body) > SMALL:
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


def check_tunnel(answer: Incoming) -> None:
    """Check that a proxy has opened the way."""
    if not 200 <= answer.status < 300:
        raise httpcore.ProxyError(f"the proxy answered {answer.status} {answer.reason}")
    if not answer.reusable:
        raise httpcore.RemoteProtocolError("more came from the proxy than its answer")


def _left_s(ends: float) -> float:
    """Return the seconds left until a time."""
    left_s = ends - time.monotonic()
    if left_s <= 0:
        raise httpcore.TimeoutException("too late")
    return left_s
