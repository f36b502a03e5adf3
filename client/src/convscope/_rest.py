"""The REST seam: a request as `application/x-protobuf` to `/predictions/<model>[/<version>]`, with httpcore.

The only module, beside `_network` below it, that knows httpcore. Connections are kept open and shared between threads.
They are httpcore's; which one carries a request is decided here, since its pool looks at all connections at every
request and reply, which with 32 of them took 3 ms. httpx, which is built on it, takes as much again on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import httpcore

from convscope._exceptions import ConnectError, DeadlineExceeded, ProtocolError, ReplyTooLarge, TransportError
from convscope._forking import renew_after_fork
from convscope._http_answers import PROTOBUF, understand
from convscope._network import AsyncNetwork, Network, holds_more
from convscope._proxies import environment_proxy
from convscope._transport import API_KEY_HEADER, MAX_MESSAGE_BYTES, REQUEST_ID_HEADER, USER_AGENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

MOST_CONNECTIONS = 100  # Who comes when all are in use waits.
IDLE_S = 5.0  # Seconds for which a connection that nobody uses may be used again.

# Which of ours stands for which of httpcore's; the nearest ancestor counts.
TRANSLATIONS: dict[type[Exception], type[TransportError]] = {
    httpcore.TimeoutException: DeadlineExceeded,
    httpcore.NetworkError: ConnectError,
    httpcore.ProxyError: ConnectError,
    httpcore.ProtocolError: ProtocolError,
    httpcore.UnsupportedProtocol: ProtocolError,
    httpcore.ConnectionNotAvailable: ConnectError,  # Another thread closed this client.
}


class _Rest:
    """What both transports over HTTP/1.1 are.

    Args:
        url: `http://` or `https://`, host, and a path if the service lies below one.
        pool: httpcore's, of which only single connections are used.
        network: What it is to connect with.
        api_key: Sent as `x-api-key`, if given.
        ca_file: PEM file of the certificates to trust; None for the usual ones.
        use_proxies: Whether to use the proxies of the environment.
        mount: What carries the requests, in place of a connection: for tests.
    """

    def __init__(
        self,
        url: str,
        pool: Any,
        network: Any,
        *,
        api_key: str | None = None,
        ca_file: str | None = None,
        use_proxies: bool = True,
        mount: Any = None,
    ) -> None:
        self._url = url
        base = _parse(url)
        host = base.host if base.port is None else b"%b:%d" % (base.host, base.port)
        # No others: TorchServe's worker pays for every header it reads.
        headers = {"accept": PROTOBUF, "content-type": PROTOBUF, "user-agent": USER_AGENT}
        if api_key is not None:
            headers[API_KEY_HEADER] = api_key
        self._headers = [(b"host", host), *((name.encode(), value.encode()) for name, value in headers.items())]
        self._locate = lru_cache(maxsize=128)(
            lambda path: httpcore.URL(
                scheme=base.scheme, host=base.host.strip(b"[]"), port=base.port, target=base.target + path.encode()
            )
        )
        proxy = environment_proxy(url) if use_proxies else None
        made = pool(
            ssl_context=_trust(ca_file) if base.scheme == b"https" else None,
            proxy=None if proxy is None else httpcore.Proxy(proxy.url, auth=proxy.auth),
            keepalive_expiry=IDLE_S,
            network_backend=network,
        )
        origin = self._locate("").origin
        self._closed = False
        self._connect: Callable[[], Any] = lambda: mount or made.create_connection(origin)
        self._connections: set[Any] = set()
        self._idle: list[Any] = []  # The one used last comes first: it is the likeliest to be open still.

    def _take(self) -> tuple[Any, list[Any]]:
        """Return a connection that nobody uses, which may have to be opened, and those that are to be closed."""
        expired: list[Any] = []
        if self._closed:
            raise ConnectError(f"no connection to {self._url}: the client was closed")
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
                self._connections.add(connection)
                return connection, expired
            if not connection.has_expired():
                return connection, expired
            self._connections.discard(connection)
            expired.append(connection)

    def _put(self, connection: Any) -> bool:
        """Give a connection back; say whether it is to be closed."""
        if connection.is_idle() and not holds_more(connection):
            self._idle.append(connection)
            return self._closed  # Since the connection was taken, which may not have been open by then.
        # The answer was not read to its end, said that it was the last, or more came. httpcore has closed it, but for
        # the last, and a caller cancelled while it waited for httpcore's lock, just connected or with all of it read.
        self._connections.discard(connection)
        return not connection.is_closed()

    def _build(
        self, request: PredictRequest, model: str, version: str | None, extensions: dict[str, Any]
    ) -> httpcore.Request:
        path = quote(model, safe="") if version is None else f"{quote(model, safe='')}/{quote(version, safe='')}"
        content = request.SerializeToString()
        own = [(b"content-length", b"%d" % len(content)), (REQUEST_ID_HEADER.encode(), request.request_id.encode())]
        return httpcore.Request(
            b"POST", self._locate(path), headers=self._headers + own, content=content, extensions=extensions
        )


class RestTransport(_Rest):
    """Sends requests over HTTP/1.1; see `_Rest` for its settings."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, httpcore.ConnectionPool, Network(), **settings)
        self._free = threading.Semaphore(MOST_CONNECTIONS)
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin without connections."""
        inherited, self._connections, self._idle = self._connections, set(), []
        self._free = threading.Semaphore(MOST_CONNECTIONS)
        for connection in inherited:
            connection.close()

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        ends = time.monotonic() + deadline_s
        if not self._free.acquire(timeout=deadline_s):
            raise DeadlineExceeded("the deadline passed")
        try:
            connection, expired = self._take()
            try:
                with _translated(self._url):
                    for old in expired:
                        old.close()
                    response = connection.handle_request(
                        self._build(
                            request, model, version, {"timeout": {"connect": ends, "write": ends, "read": ends}}
                        )
                    )
                    with contextlib.closing(response):
                        body = _Body()
                        for chunk in response.stream:
                            body.add(chunk)
            finally:
                if self._put(connection):
                    connection.close()
        finally:
            self._free.release()
        return understand(response.status, _by_name(response.headers), body.data())

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        for connection in list(self._connections):
            connection.close()


class AsyncRestTransport(_Rest):
    """Sends requests over HTTP/1.1 from asyncio; see `_Rest` for its settings."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, httpcore.AsyncConnectionPool, AsyncNetwork(), **settings)
        self._free = asyncio.Semaphore(MOST_CONNECTIONS)

    async def send(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        try:
            with _translated(self._url):
                async with asyncio.timeout(deadline_s), self._free:
                    connection, expired = self._take()
                    try:
                        if expired:
                            await _close_all(expired)
                        response = await connection.handle_async_request(self._build(request, model, version, {}))
                        async with contextlib.aclosing(response):
                            body = _Body()
                            async for chunk in response.stream:
                                body.add(chunk)
                    finally:
                        if self._put(connection):
                            await connection.aclose()
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed") from error
        return understand(response.status, _by_name(response.headers), body.data())

    async def close(self) -> None:
        """Close the connections."""
        self._closed = True
        await _close_all(self._connections)


async def _close_all(connections: Iterable[Any]) -> None:
    """Close connections, all of them even if the caller is cancelled meanwhile."""
    async with contextlib.AsyncExitStack() as closing:
        for connection in connections:
            closing.push_async_callback(connection.aclose)


def _parse(url: str) -> httpcore.URL:
    """Return where models are asked at a service; its host is as the `Host` header has it."""
    parts = urlsplit(url)
    try:
        host = (parts.hostname or "").encode("idna")
    except UnicodeError as error:
        raise ValueError(f"url cannot be used: {error}") from error
    return httpcore.URL(
        scheme=parts.scheme.encode(),
        host=b"[%b]" % host if b":" in host else host,
        port=parts.port,
        target=(quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~") + "/predictions/").encode(),
    )


def _trust(ca_file: str | None) -> ssl.SSLContext:
    """Make the context that says whom to trust."""
    return httpcore.default_ssl_context() if ca_file is None else ssl.create_default_context(cafile=ca_file)


def _by_name(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what httpcore raises into our own exceptions."""
    try:
        yield
    except tuple(TRANSLATIONS) as error:
        # What httpcore says of a request that is none quotes its headers.
        raise translate(error, url) from (None if isinstance(error, httpcore.LocalProtocolError) else error)


def translate(error: Exception, url: str) -> TransportError:
    """Make our exception for one of httpcore's.

    Args:
        error: What httpcore raised.
        url: Whom it was talking to.

    Returns:
        The exception, not raised.
    """
    reason = str(error) or type(error).__name__
    ours: type[TransportError] = next(TRANSLATIONS[kind] for kind in type(error).__mro__ if kind in TRANSLATIONS)
    if isinstance(error, httpcore.RemoteProtocolError) and ("disconnected" in reason or "peer closed" in reason):
        ours = ConnectError
    if isinstance(error, httpcore.LocalProtocolError):
        return ProtocolError(f"the request to {url} cannot be put into HTTP")
    if ours is ConnectError:
        return ConnectError(f"no connection to {url}: {reason}")
    return ours(
        "the deadline passed" if ours is DeadlineExceeded else f"{url} does not speak HTTP as expected: {reason}"
    )


class _Body:
    """A body as it comes, up to the limit of size."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > MAX_MESSAGE_BYTES:
            raise ReplyTooLarge(f"the reply is over this client's limit of {MAX_MESSAGE_BYTES} bytes")
        self._chunks.append(chunk)

    def data(self) -> bytes:
        return b"".join(self._chunks)
