"""Connections of HTTP/1.1: opened along a route, asked one thing after the other. Here those that block.

A request goes out in one piece, and an answer is put together as it comes. `_socket_stream` does the sending.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import httpcore

from convscope._http import Incoming
from convscope._socket_stream import AT_ONCE, SocketStream

if TYPE_CHECKING:
    from convscope._route import Route

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
        self._opening: Any = None  # The stream while the connection is being opened: only `close` may use it.
        self._stream: Any = None  # The stream that requests go over: None until every step of the route is done.
        self._answer: Incoming | None = None  # The response to the last request, never a proxy's to CONNECT.
        self._idle_since = 0.0

    def rest(self) -> bool:
        """Note that nobody uses it now; say whether it may be used again."""
        self._idle_since = time.monotonic()
        if self.closed or self._stream is None or self._answer is None:
            return False
        return self._answer.complete and self._answer.reusable

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
        self._answer = answer = Incoming()
        if self._stream is None:
            self._stream = self._open(ends)
        self._exchange(self._stream, head, body, ends, answer)
        return answer

    def close(self) -> None:
        """Close it; whoever waits for an answer is woken."""
        self.closed = True
        stream = self._stream or self._opening
        if stream is not None:
            stream.close()

    def _open(self, ends: float) -> _Stream:
        route = self._route
        stream = self._keep(_Stream(_connect(route.host, route.port, ends)))
        if route.proxy_tls is not None:
            stream = self._keep(stream.start_tls(route.proxy_tls, route.host, ends))
        if route.tunnel:
            answer = Incoming(bodiless=True)
            self._exchange(stream, route.tunnel, b"", ends, answer)
            check_tunnel(answer)
        if route.tls is not None:
            stream = self._keep(stream.start_tls(route.tls, route.service, ends))
        return stream

    def _keep(self, stream: _Stream) -> _Stream:
        self._opening = stream
        if self.closed:  # Meanwhile.
            stream.close()
            raise httpcore.ConnectError("it was closed")
        return stream

    def _exchange(self, stream: _Stream, head: bytes, body: bytes, ends: float, answer: Incoming) -> None:
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


def _connect(host: str, port: int, ends: float) -> httpcore.NetworkStream:
    """Connect to the first of the host's addresses that takes it; each gets an equal share of the time left."""
    found = [host] if is_address(host) else _look_up(host, port, ends)
    below = httpcore.SyncBackend()
    failed: Exception = httpcore.ConnectError(f"{host} has no address")
    for tried, address in enumerate(found):
        share_s = _left_s(ends) / (len(found) - tried)
        try:
            return SocketStream(below.connect_tcp(address, port, share_s).get_extra_info("socket"))
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            failed = error
    raise failed


def _look_up(host: str, port: int, ends: float) -> list[str]:
    """Return a host's addresses.

    The system's resolver can be neither interrupted nor given a deadline: a thread waits for it, perhaps for longer.
    """
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put([str(address[0]) for *_, address in addresses])
        except Exception as error:
            found.put(httpcore.ConnectError(str(error)))

    try:
        threading.Thread(target=ask, name="convscope-resolver", daemon=True).start()
    except RuntimeError:  # No thread can be started, as when the program is about to end.
        ask()
    try:
        addresses = found.get(timeout=_left_s(ends))
    except queue.Empty:
        raise httpcore.ConnectTimeout(f"the addresses of {host} were not found in time") from None
    if isinstance(addresses, Exception):
        raise addresses
    return addresses


def is_address(host: str) -> bool:
    """Say whether a host is an address, which needs no look-up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Stream:
    """One of httpcore's streams, told until when instead of how long."""

    def __init__(self, below: httpcore.NetworkStream) -> None:
        self._below = below
        self._process = os.getpid()

    def read(self, ends: float) -> bytes:
        return self._below.read(AT_ONCE, _left_s(ends))

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
