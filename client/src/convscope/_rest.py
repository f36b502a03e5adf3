"""The REST seam: a request as `application/x-protobuf` to `/predictions/<model>[/<version>]`.

Connections (`_network`, `_async_network`) are kept open and shared between threads, or tasks; which one carries a
request is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpcore

from convscope._async_network import AsyncConnection
from convscope._exceptions import ConnectError, DeadlineExceeded, ProtocolError, TransportError
from convscope._forking import renew_after_fork
from convscope._http_answers import PROTOBUF, understand
from convscope._network import Connection
from convscope._route import find_route
from convscope._transport import API_KEY_HEADER, REQUEST_ID_HEADER, USER_AGENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

MOST_CONNECTIONS = 100  # Who comes when all are in use waits.

# Which of ours stands for which of httpcore's; the nearest ancestor counts.
TRANSLATIONS: dict[type[Exception], type[TransportError]] = {
    httpcore.TimeoutException: DeadlineExceeded,
    httpcore.NetworkError: ConnectError,
    httpcore.ProxyError: ConnectError,
    httpcore.ProtocolError: ProtocolError,
    httpcore.UnsupportedProtocol: ProtocolError,
    httpcore.ConnectionNotAvailable: ConnectError,
}
_RAISED = tuple(TRANSLATIONS)
_ID = REQUEST_ID_HEADER.encode()


class _Rest:
    """What both transports over HTTP/1.1 are.

    Args:
        url: `http://` or `https://`, host, and a path if the service lies below one.
        connection: Makes a connection along a route.
        api_key: Sent as `x-api-key`, if given.
        ca_file: PEM file of the certificates to trust; None for the usual ones.
        use_proxies: Whether to use the proxies of the environment.
    """

    def __init__(
        self,
        url: str,
        connection: Callable[..., Any],
        *,
        api_key: str | None = None,
        ca_file: str | None = None,
        use_proxies: bool = True,
    ) -> None:
        self._url = url
        route = find_route(url, ca_file=ca_file, use_proxies=use_proxies)
        # No others: TorchServe's worker pays for every header it reads.
        headers = {"accept": PROTOBUF, "content-type": PROTOBUF, "user-agent": USER_AGENT}
        if api_key is not None:
            headers[API_KEY_HEADER] = api_key
        said = route.headers + "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        # What the requests to a model have in common: their head as far as the length of the body.
        self._begin = lru_cache(maxsize=128)(
            lambda path: b"POST %b%b HTTP/1.1\r\n%bcontent-length: " % (route.target, path.encode(), said)
        )
        self._closed = False
        self._connect: Callable[[], Any] = lambda: connection(route)
        self._connections: set[Any] = set()
        self._idle: list[Any] = []  # The one used last comes first: it is the likeliest to be open still.
        self._lock = threading.Lock()  # Of these two.

    def _take(self) -> tuple[Any, list[Any]]:
        """Return a connection that nobody uses, which may have to be opened, and those that are to be closed."""
        if self._closed:
            raise ConnectError(f"no connection to {self._url}: the client was closed")
        with self._lock:
            expired = self._reap()
            connection = self._idle.pop() if self._idle else self._connect()
            self._connections.add(connection)
        return connection, expired

    def _put(self, connection: Any) -> list[Any]:
        """Give a connection back; return those that are to be closed, which may include it."""
        with self._lock:
            expired = self._reap()
            if connection.rest():
                self._idle.append(connection)
                if not self._closed:  # Since the connection was taken, which may not have been open by then.
                    return expired
            else:  # It is not open, its answer was not read to its end, said that it was the last, or more came.
                self._connections.discard(connection)
        return [*expired, connection]

    def _reap(self) -> list[Any]:
        """Forget the idle connections that cannot be used any more, and return them."""
        expired = [connection for connection in self._idle if connection.expired()]
        if expired:
            self._idle = [connection for connection in self._idle if connection not in expired]
            self._connections.difference_update(expired)
        return expired

    def _write(self, request: PredictRequest, model: str, version: str | None) -> tuple[bytes, bytes]:
        """Return a request's head and body."""
        path = quote(model, safe="") if version is None else f"{quote(model, safe='')}/{quote(version, safe='')}"
        body, named = request.SerializeToString(), request.request_id
        if not (named.isascii() and named.isprintable()):
            raise ProtocolError(f"the request to {self._url} cannot be put into HTTP")
        return b"%b%d\r\n%b: %b\r\n\r\n" % (self._begin(path), len(body), _ID, named.encode()), body


class RestTransport(_Rest):
    """Sends requests over HTTP/1.1; see `_Rest` for its settings."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, Connection, **settings)
        self._free = threading.Semaphore(MOST_CONNECTIONS)
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin without connections."""
        inherited, self._connections, self._idle = self._connections, set(), []
        self._free, self._lock = threading.Semaphore(MOST_CONNECTIONS), threading.Lock()
        for connection in inherited:
            connection.close()

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        ends = time.monotonic() + deadline_s
        head, body = self._write(request, model, version)
        if not self._free.acquire(timeout=deadline_s):
            raise DeadlineExceeded("the deadline passed")
        try:
            connection, expired = self._take()
            try:
                for old in expired:
                    old.close()
                answer = connection.ask(head, body, ends)
            finally:
                for old in self._put(connection):
                    old.close()
        except _RAISED as error:
            raise translate(error, self._url) from error
        finally:
            self._free.release()
        return understand(answer.status, answer.headers, answer.body())

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()


class AsyncRestTransport(_Rest):
    """Sends requests over HTTP/1.1 from asyncio; see `_Rest` for its settings."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, AsyncConnection, **settings)
        self._free = asyncio.Semaphore(MOST_CONNECTIONS)

    async def send(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        head, body = self._write(request, model, version)
        try:
            async with asyncio.timeout(deadline_s), self._free:
                connection, expired = self._take()
                try:
                    if expired:
                        await _close_all(expired)
                    answer = await connection.ask(head, body)
                finally:
                    if expired := self._put(connection):
                        await _close_all(expired)
        except _RAISED as error:
            raise translate(error, self._url) from error
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed") from error
        return understand(answer.status, answer.headers, answer.body())

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        await _close_all(list(self._connections))


async def _close_all(connections: Iterable[Any]) -> None:
    """Close connections, all of them even if the caller is cancelled meanwhile."""
    async with contextlib.AsyncExitStack() as closing:
        for connection in connections:
            closing.push_async_callback(connection.close)


def translate(error: Exception, url: str) -> TransportError:
    """Make our exception for one of httpcore's.

    Args:
        error: What httpcore, or a connection of ours, raised.
        url: Whom it was talking to.

    Returns:
        The exception, not raised.
    """
    reason = str(error) or type(error).__name__
    ours: type[TransportError] = next(TRANSLATIONS[kind] for kind in type(error).__mro__ if kind in TRANSLATIONS)
    if ours is ConnectError:
        return ConnectError(f"no connection to {url}: {reason}")
    return ours(
        "the deadline passed" if ours is DeadlineExceeded else f"{url} does not speak HTTP as expected: {reason}"
    )
