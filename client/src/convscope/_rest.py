"""The REST seam: a request as `application/x-protobuf` to `/predictions/<model>[/<version>]`, with httpx.

The only module that knows httpx. Connections are kept open and shared between threads. Requests go straight to httpx's
transports: its clients would merge URLs, headers and cookies anew for each of them, a quarter of what a call costs.
Each transport has one connection: a pool of httpx looks at all of its connections at every request and reply, which
with 32 of them took 3 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from urllib.request import getproxies, proxy_bypass

import httpx

from convscope._exceptions import ConnectError, DeadlineExceeded, ProtocolError, ReplyTooLarge, TransportError
from convscope._http_answers import PROTOBUF, understand
from convscope._transport import API_KEY_HEADER, MAX_MESSAGE_BYTES, REQUEST_ID_HEADER, USER_AGENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

MOST_CONNECTIONS = 100  # As httpx; who comes when all are in use waits.
_ONE = httpx.Limits(max_connections=1)

# Which of ours stands for which of httpx's; the nearest ancestor counts.
TRANSLATIONS: dict[type[Exception], type[TransportError]] = {
    httpx.TimeoutException: DeadlineExceeded,
    httpx.NetworkError: ConnectError,
    httpx.ProxyError: ConnectError,
    httpx.ProtocolError: ProtocolError,
    httpx.DecodingError: ProtocolError,
    httpx.TooManyRedirects: ProtocolError,
    httpx.UnsupportedProtocol: ProtocolError,
    httpx.InvalidURL: ProtocolError,
    httpx.StreamError: ConnectError,  # Another thread closed this client.
    httpx.HTTPError: TransportError,
}


class _Rest(ABC):
    """What both transports over HTTP/1.1 are.

    Args:
        url: `http://` or `https://`, host, and a path if the service lies below one.
        api_key: Sent as `x-api-key`, if given.
        ca_file: PEM file of the certificates to trust; None for httpx's usual ones.
        use_proxies: Whether to use the proxies of the environment.
        mount: What carries the requests, in place of the network: for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        ca_file: str | None = None,
        use_proxies: bool = True,
        mount: Any = None,
    ) -> None:
        # No others: TorchServe's worker pays for every header it reads.
        headers = {"accept": PROTOBUF, "content-type": PROTOBUF, "user-agent": USER_AGENT}
        if api_key is not None:
            headers[API_KEY_HEADER] = api_key
        self._headers = list(headers.items())
        try:
            base = httpx.URL(url.rstrip("/") + "/predictions/")
        except httpx.InvalidURL as error:
            raise ValueError(f"url cannot be used: {error}") from error
        self._url = url
        self._locate = lru_cache(maxsize=128)(lambda path: httpx.URL(f"{base}{path}"))
        settings: dict[str, Any] = {
            "verify": _trust(base, ca_file),
            "proxy": _environment_proxy(base) if use_proxies else None,
            "limits": _ONE,
        }
        self._connections: list[Any] = []
        self._idle: list[Any] = []  # The one used last comes first: it is the likeliest to be open still.
        self._connect: Callable[[], Any] = lambda: mount or self._open(**settings)

    @abstractmethod
    def _open(self, **settings: Any) -> Any:
        """Make one of httpx's transports out of its settings."""

    def _take(self) -> Any:
        """Return a connection that nobody uses, which may have to be opened; `_idle.append` gives it back."""
        try:
            return self._idle.pop()
        except IndexError:
            connection = self._connect()
            self._connections.append(connection)
            return connection

    def _build(
        self, request: PredictRequest, model: str, version: str | None, extensions: dict[str, Any]
    ) -> httpx.Request:
        path = quote(model, safe="") if version is None else f"{quote(model, safe='')}/{quote(version, safe='')}"
        return httpx.Request(
            "POST",
            self._locate(path),
            headers=[*self._headers, (REQUEST_ID_HEADER, request.request_id)],
            content=request.SerializeToString(),
            extensions=extensions,
        )


class RestTransport(_Rest):
    """Sends requests over HTTP/1.1; see `_Rest` for its arguments."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._free = threading.Semaphore(MOST_CONNECTIONS)

    def _open(self, **settings: Any) -> Any:
        return httpx.HTTPTransport(**settings)

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        ends = time.monotonic() + deadline_s
        if not self._free.acquire(timeout=deadline_s):
            raise DeadlineExceeded("the deadline passed")
        http = self._take()
        try:
            with _translated(self._url):
                response = http.handle_request(self._build(request, model, version, {"timeout": _TimeLeft(ends)}))
                with contextlib.closing(response):
                    body = _Body()
                    for chunk in response.iter_bytes():
                        body.add(chunk)
                        if time.monotonic() > ends:
                            raise DeadlineExceeded("the deadline passed")
        finally:
            self._idle.append(http)
            self._free.release()
        return understand(response.status_code, response.headers, body.data())

    def close(self) -> None:
        """Close the connections."""
        for http in self._connections:
            http.close()


class AsyncRestTransport(_Rest):
    """Sends requests over HTTP/1.1 from asyncio; see `_Rest` for its arguments."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._free = asyncio.Semaphore(MOST_CONNECTIONS)

    def _open(self, **settings: Any) -> Any:
        return httpx.AsyncHTTPTransport(**settings)

    async def send(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        try:
            with _translated(self._url):
                async with asyncio.timeout(deadline_s), self._free:
                    http = self._take()
                    try:
                        response = await http.handle_async_request(self._build(request, model, version, {}))
                        async with contextlib.aclosing(response):
                            body = _Body()
                            async for chunk in response.aiter_bytes():
                                body.add(chunk)
                    finally:
                        self._idle.append(http)
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed") from error
        return understand(response.status_code, response.headers, body.data())

    async def close(self) -> None:
        """Close the connections."""
        for http in self._connections:
            await http.aclose()


class _TimeLeft(dict[str, float]):
    """The timeouts of httpx's steps: each gets what is left of the whole when it begins."""

    def __init__(self, ends: float) -> None:
        super().__init__()
        self._ends = ends

    def get(self, _step: str, _default: Any = None) -> float:
        return max(self._ends - time.monotonic(), 0.001)


def _trust(url: httpx.URL, ca_file: str | None) -> ssl.SSLContext:
    """Make the context that says whom to trust; for `http`, nobody: reading the usual certificates takes a while."""
    if url.scheme == "http":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=ca_file)


def _environment_proxy(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names for a URL, if any."""
    if proxy_bypass(url.netloc.decode("ascii")):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what httpx raises into our own exceptions."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise translate(error, url) from error


def translate(error: Exception, url: str) -> TransportError:
    """Make our exception for one of httpx's.

    Args:
        error: What httpx raised.
        url: Whom it was talking to.

    Returns:
        The exception, not raised.
    """
    reason = str(error) or type(error).__name__
    ours: type[TransportError] = next(TRANSLATIONS[kind] for kind in type(error).__mro__ if kind in TRANSLATIONS)
    if isinstance(error, httpx.RemoteProtocolError) and ("disconnected" in reason or "peer closed" in reason):
        ours = ConnectError
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
