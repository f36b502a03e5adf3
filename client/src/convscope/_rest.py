"""REST on httpx: a request as `application/x-protobuf` to `/predictions/<model>[/<version>]`.

Of this package, `_rest` and `_upload` alone know httpx. Its exceptions become ours in `map_httpx_exceptions`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies
from weakref import WeakKeyDictionary, WeakSet

import httpx

from convscope._exceptions import ConnectError, DeadlineExceeded, ProtocolError, ReplyTooLarge, TransportError
from convscope._protocol import (
    API_KEY_HEADER,
    MAX_MESSAGE_BYTES,
    REQUEST_ID_HEADER,
    USER_AGENT,
    ascii_host,
    http_error,
    parse_reply,
)
from convscope._reply import check_open
from convscope._upload import LARGE_BYTES, SMALL_BYTES, AsyncUpload, Upload

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

PROTOBUF = "application/x-protobuf"
MAX_CONNECTIONS = 100  # Further requests wait for one of them.
KEEPALIVE_S = 5.0  # Seconds for which an idle connection may be used again.

OPENED = ("connect_tcp.complete", "start_tls.complete")  # The ends of the trace events that bring a new stream.

# What each exception of httpx becomes; the nearest ancestor counts. Below TLS, anyio lets some of Python's own through.
TRANSLATIONS: dict[type[Exception], type[TransportError]] = {
    httpx.HTTPError: ProtocolError,
    httpx.InvalidURL: ProtocolError,
    httpx.StreamError: ProtocolError,
    httpx.CookieConflict: ProtocolError,
    httpx.TimeoutException: DeadlineExceeded,
    httpx.NetworkError: ConnectError,
    httpx.ProxyError: ConnectError,
    OSError: ConnectError,
    TimeoutError: DeadlineExceeded,
}
_CUT_OFF = ("disconnected", "closed connection")  # In the message of a RemoteProtocolError: the response broke off.


class _Rest:
    """What both transports share.

    Args:
        url: `http://` or `https://`, host, and a path if the service lies below one.
        api_key: Sent as `x-api-key`, if given.
        ca_file: PEM file of the certificates to trust; None for the usual ones.
        use_proxies: Whether to use the proxies of the environment, as httpx does.

    Raises:
        OSError: `ca_file` cannot be read.
        ValueError: A proxy of the environment cannot be used.
    """

    def __init__(self, url: str, *, api_key: str | None, ca_file: str | None, use_proxies: bool) -> None:
        self._url = url
        # No other headers: TorchServe's worker pays for each that it reads.
        self._headers = {"accept": PROTOBUF, "content-type": PROTOBUF, "user-agent": USER_AGENT}
        if api_key is not None:
            self._headers[API_KEY_HEADER] = api_key
        if use_proxies:
            _check_proxies()
        self._target = lru_cache(maxsize=128)(lambda path: httpx.URL(f"{url.rstrip('/')}/predictions/{path}"))
        self._settings: dict[str, Any] = {
            "verify": _trust(ca_file, secure=url.startswith("https:")),
            "trust_env": use_proxies,
            "timeout": None,  # Every request brings its own.
        }
        self._answered: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # The last request's id by stream.

    def _open(self, kind: Any, *, keepalive: bool) -> Any:
        """Make a client of httpx, of the kind `httpx.Client` or `httpx.AsyncClient`."""
        # Both transports bound their requests themselves: in httpcore 1.0.9, a connection whose TLS handshake behind a
        # proxy failed counts for ever, so that its limit would be used up.
        limits = httpx.Limits(
            max_connections=None,
            max_keepalive_connections=MAX_CONNECTIONS if keepalive else 0,
            keepalive_expiry=KEEPALIVE_S,
        )
        return kind(**self._settings, limits=limits)

    def _read(self, reader: Reader, stream: Any, request_id: str) -> PredictReply:
        """Read the response to a request, which came over this stream; see `read_response`.

        Raises:
            ConnectError: It is the response to the request before: httpx takes surplus bytes for the next response.
        """
        reply = reader.reply()
        if stream is not None:
            before = self._answered.get(stream)
            if before is not None and reply.request_id == before != request_id:
                raise ConnectError(f"no connection to {self._url}: a response came twice")
            self._answered[stream] = request_id
        return reply

    def _closed(self) -> ConnectError:
        return ConnectError(f"no connection to {self._url}: the client was closed")

    def _request(
        self, body: bytes, content: Any, request_id: str, model: str, version: str | None, extensions: dict[str, Any]
    ) -> httpx.Request:
        """Build the request of HTTP."""
        headers = {**self._headers, "content-length": str(len(body)), REQUEST_ID_HEADER: request_id}
        url = self._target(model if version is None else f"{model}/{version}")
        return httpx.Request("POST", url, headers=headers, content=content, extensions=extensions)


class RestTransport(_Rest):
    """Sends requests with `httpx.Client`; see `_Rest` for its arguments.

    The timeouts of httpx are for single reads and writes, and no timeout at all is for finding a host's address. So a
    request runs in a thread of its own, and its caller waits for that thread until the deadline.
    """

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._client: httpx.Client = self._open(httpx.Client, keepalive=True)
        self._uploads: httpx.Client = self._open(httpx.Client, keepalive=False)
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="convscope-rest")
        self._sockets = Sockets()

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        ends = time.monotonic() + deadline_s
        body = request.SerializeToString()
        upload = Upload(body, ends) if len(body) > SMALL_BYTES else None
        opened = Opened(upload if len(body) > LARGE_BYTES else None, self._sockets)
        extensions = {"timeout": TimeLeft(ends), "trace": opened.trace}
        sent = self._request(body, upload or body, request.request_id, model, version, extensions)
        client = self._client if len(body) <= LARGE_BYTES else self._uploads
        try:
            exchange = self._threads.submit(self._exchange, client, sent, request.request_id, opened.sockets)
        except RuntimeError as error:
            raise self._closed() from error
        try:
            return exchange.result(deadline_s)
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed") from error
        except CancelledError as error:
            raise self._closed() from error
        finally:
            if not exchange.done() and not exchange.cancel():  # The caller goes, at its deadline or by Ctrl-C.
                shut_down(opened.sockets)

    def _exchange(
        self, client: httpx.Client, sent: httpx.Request, request_id: str, opened: list[socket.socket]
    ) -> PredictReply:
        """Send a request and read the response."""
        if client.is_closed:
            raise self._closed()
        with map_httpx_exceptions(self._url, opened), contextlib.closing(client.send(sent, stream=True)) as response:
            reader = Reader(response)
            for piece in response.iter_raw():
                reader.take(piece)
        stream = response.extensions["network_stream"]
        try:
            return self._read(reader, stream, request_id)
        except (ProtocolError, ConnectError):
            stream.close()
            raise

    def close(self) -> None:
        """Close the connections; a thread that waits for a response gets a ConnectError."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sockets.close()
        self._client.close()
        self._uploads.close()


class AsyncRestTransport(_Rest):
    """Sends requests with `httpx.AsyncClient`, or with httpx-aiohttp's. Deadlines are exact.

    Args:
        url: As for `_Rest`.
        backend: `"httpx"`, or `"aiohttp"`, which costs half the processor time.
        **settings: As for `_Rest`.

    Raises:
        ImportError: httpx-aiohttp is not installed; says how to get it.
    """

    def __init__(self, url: str, *, backend: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        kind: Any = httpx.AsyncClient
        self._traced = backend == "httpx"
        if not self._traced:
            self._headers["accept-encoding"] = "identity"  # Else aiohttp says that it takes compressed responses.
            kind = _aiohttp_client()
        self._client: httpx.AsyncClient = self._open(kind, keepalive=True)
        self._uploads: httpx.AsyncClient = self._open(kind, keepalive=False)
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)

    async def asend(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        body = request.SerializeToString()
        upload = AsyncUpload(body) if len(body) > LARGE_BYTES else None
        # The streams of the connections that are opened for this request; None for one that aiohttp may have opened.
        opened: list[Any] = [] if self._traced else [None]

        async def trace(event: str, info: dict[str, Any]) -> None:
            if event.endswith(OPENED):
                opened.append(info["return_value"])
                if upload is not None:
                    upload.watch(info["return_value"])

        sent = self._request(body, upload or body, request.request_id, model, version, {"trace": trace})
        client = self._client if upload is None else self._uploads
        try:
            with map_httpx_exceptions(self._url, opened):
                async with asyncio.timeout(deadline_s), self._free:
                    return await self._exchange(client, sent, request.request_id)
        except (DeadlineExceeded, asyncio.CancelledError):
            for stream in filter(None, opened):  # httpcore leaves one open whose TLS handshake was cancelled.
                await stream.aclose()
            raise

    async def _exchange(self, client: httpx.AsyncClient, sent: httpx.Request, request_id: str) -> PredictReply:
        """Send a request and read the response."""
        if client.is_closed:
            raise self._closed()
        async with contextlib.aclosing(await client.send(sent, stream=True)) as response:
            reader = Reader(response)
            async for piece in response.aiter_raw():
                reader.take(piece)
        stream = response.extensions.get("network_stream")
        try:
            return self._read(reader, stream, request_id)
        except (ProtocolError, ConnectError):
            if stream is not None:
                await stream.aclose()
            raise

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._uploads.aclose()


class Sockets:
    """The sockets of all connections of a client. Safe to use from several threads."""

    def __init__(self) -> None:
        self._open: WeakSet[socket.socket] = WeakSet()
        self._closed = False
        self._lock = threading.Lock()

    def add(self, opened: socket.socket) -> None:
        """Add a socket; shut it down if the client was closed while it was opened."""
        with self._lock:
            self._open.add(opened)
            if self._closed:
                shut_down([opened])

    def close(self) -> None:
        """Shut all sockets down, now and from now on."""
        with self._lock:
            self._closed = True
            shut_down(self._open)


class Opened:
    """The sockets of the connections that are opened for one request, as httpx's `trace` extension tells.

    Args:
        upload: The request's body, if it watches its connection.
        everyone: The sockets of all requests; those of this one are added.

    Attributes:
        sockets: The sockets; empty if the request goes over a connection that was open before.
    """

    def __init__(self, upload: Upload | None, everyone: Sockets) -> None:
        self.sockets: list[socket.socket] = []
        self._upload = upload
        self._everyone = everyone
        self._handshake: socket.socket | None = None

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Take an event of the extension."""
        if event.endswith("start_tls.started"):
            connected = self.sockets[-1]  # In the handshake it has no file descriptor: `ssl` takes that over.
            self._handshake = socket.fromfd(connected.fileno(), connected.family, connected.type)
            self._add(self._handshake)
        elif event.endswith(("start_tls.complete", "start_tls.failed")) and self._handshake is not None:
            self._handshake.close()
        if event.endswith(OPENED):
            self._add(info["return_value"].get_extra_info("socket"))
            if self._upload is not None:
                self._upload.watch(info["return_value"])

    def _add(self, opened: socket.socket) -> None:
        self.sockets.append(opened)
        self._everyone.add(opened)


def shut_down(sockets: Iterable[socket.socket]) -> None:
    """End connections. Unlike closing their sockets, this wakes the threads that wait for them."""
    for one in sockets:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(one, socket.SHUT_RDWR)  # The method of an SSLSocket would end its TLS, too.


class TimeLeft(Mapping[str, float]):
    """The `timeout` extension of a request: each step of it gets the time that is left when the step begins.

    Args:
        ends: When the call must end, by `time.monotonic`.
    """

    def __init__(self, ends: float) -> None:
        self._ends = ends

    def __getitem__(self, step: str) -> float:
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed")
        return left_s

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "read", "write", "pool"))

    def __len__(self) -> int:
        return 4


class Reader:
    """Puts the pieces of a response together.

    Args:
        response: The response, of which the headers have come.

    Raises:
        ReplyTooLarge: It is over this client's limit.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._pieces: list[bytes] = []
        self._size = 0
        length = response.headers.get("content-length", "")
        self._check(int(length) if length.isdecimal() else 0)

    def take(self, piece: bytes) -> None:
        """Take the next piece of the body; raise ReplyTooLarge if the body is over this client's limit."""
        self._size += len(piece)
        self._check(self._size)
        self._pieces.append(piece)

    def reply(self) -> PredictReply:
        """Read the whole response; see `read_response`."""
        return read_response(self._response.status_code, self._response.headers, b"".join(self._pieces))

    def _check(self, size: int) -> None:
        if size > MAX_MESSAGE_BYTES:
            raise ReplyTooLarge(f"the reply is over this client's limit of {MAX_MESSAGE_BYTES} bytes")


def read_response(status: int, headers: Mapping[str, str], body: bytes) -> PredictReply:
    """Read a response of HTTP.

    Args:
        status: Its status code.
        headers: By name, in any case.
        body: The whole of it.

    Returns:
        The reply of the contract.

    Raises:
        ConvscopeError: The error that any other response stands for.
    """
    if headers.get("content-type", "").lower().startswith(PROTOBUF):
        reply = parse_reply(body)
        check_open(reply, _retry_after_s(headers))
        if 200 <= status < 300 or reply.HasField("error"):
            return reply
    raise http_error(status, body, _retry_after_s(headers))


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, if it holds seconds."""
    value = headers.get("retry-after", "").strip()
    return float(value) if value.isascii() and value.isdigit() else None


@contextlib.contextmanager
def map_httpx_exceptions(url: str, opened: Sized) -> Iterator[None]:
    """Raise our exception in place of one of httpx's, which becomes its cause.

    Args:
        url: The service's, for the message.
        opened: What was opened for the request; empty if it went over a connection that was open before.
    """
    try:
        yield
    except tuple(TRANSLATIONS) as error:
        raise translate(error, url, reused=not opened) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "aiohttp":
            raise
        raise ProtocolError(f"{url} does not speak HTTP as expected: {error}") from error  # Not one of httpx-aiohttp's.


def translate(error: Exception, url: str, *, reused: bool) -> TransportError:
    """Make our exception for one of httpx's.

    Args:
        error: What httpx raised.
        url: The service's, for the message.
        reused: Whether the service has responded before over the same connection.

    Returns:
        The exception, not raised.
    """
    reason = str(error) or type(error).__name__
    ours = next(TRANSLATIONS[kind] for kind in type(error).__mro__ if kind in TRANSLATIONS)
    if type(error.__cause__).__module__.partition(".")[0] == "aiohttp" and ours is DeadlineExceeded:
        ours = ConnectError  # No step of it has a timeout: httpx-aiohttp takes a connection that broke for one.
    if isinstance(error, httpx.RemoteProtocolError) and (reused or any(words in reason for words in _CUT_OFF)):
        ours = ConnectError
    if ours is ConnectError:
        return ConnectError(f"no connection to {url}: {reason}")
    if ours is DeadlineExceeded:
        return DeadlineExceeded("the deadline passed")
    return ours(f"{url} does not speak HTTP as expected: {reason}")


def _aiohttp_client() -> type[httpx.AsyncClient]:
    """Return the client of httpx-aiohttp."""
    try:
        from httpx_aiohttp import HttpxAiohttpClient
    except ImportError as error:
        raise ImportError(
            "backend='aiohttp' is httpx-aiohttp, which cannot be imported: pip install 'convscope[aiohttp]'"
        ) from error
    client: type[httpx.AsyncClient] = HttpxAiohttpClient
    return client


def _trust(ca_file: str | None, *, secure: bool) -> ssl.SSLContext:
    """Make the TLS context for connections to the service."""
    if ca_file is not None:
        return ssl.create_default_context(cafile=ca_file)
    if secure:
        return httpx.create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # Never used: reading the usual certificates takes 20 ms.


def _check_proxies() -> None:
    """Raise ValueError unless httpx can use the environment's proxies: its own errors would show their passwords."""
    for kind, named in getproxies().items():
        if kind not in ("http", "https", "all") or not named:
            continue
        try:
            url = httpx.Proxy(named if "://" in named else f"http://{named}").url
            usable = url.scheme in ("http", "https") or find_spec("socksio") is not None
            ascii_host(url.host)
        except (ValueError, httpx.InvalidURL):
            usable = False
        if not usable:
            names = f"{kind}_proxy or {kind.upper()}_PROXY"
            raise ValueError(f"{names} in the environment must be http://host:port or https://host:port")
