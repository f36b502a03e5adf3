"""REST transports, using httpx. They POST a protobuf `PredictRequest` to `/predictions/<model>[/<version>]`.

Only this module imports httpx and httpcore; `map_httpx_exceptions` translates their exceptions.

httpx has timeouts for single reads and writes, but none for DNS or for a whole call, and it sends the whole body before
it reads a response. So this module goes beyond the documented interface of httpx and httpcore, in the versions of
`WRITTEN_FOR`, in these places:

* `RemainingTimeouts`: the extension `timeout` is a Mapping, of which httpcore reads each item when that step begins.
* `ConnectionTracker`: the extension `trace` is documented, but not that the events of `CONNECTED_EVENTS` have the
  network stream as `return_value`, nor that the socket of the stream is unusable in the TLS handshake.
* `SocketRegistry`: sockets of `get_extra_info("socket")` are shut down from another thread, which ends its request.
* `_WatchedBody`: sockets are polled while httpcore writes to them; after `httpcore.WriteError` from the body, httpcore
  reads the response.
* `_BaseRestTransport._new_client`: no `max_connections`. httpcore never releases a connection whose TLS handshake
  failed behind a proxy.
* `_BaseRestTransport._parse_and_check`: httpcore returns surplus bytes as the next response on that stream.
* `translate`: which messages of `RemoteProtocolError` mean that the connection broke, and that httpx-aiohttp reports a
  broken connection as a timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sized
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies
from weakref import WeakKeyDictionary, WeakSet

import httpcore
import httpx

from convscope._exceptions import ConnectError, DeadlineExceeded, ProtocolError, ReplyTooLarge, TransportError
from convscope._reply import parse_reply
from convscope._request import API_KEY_HEADER, MAX_MESSAGE_BYTES, REQUEST_ID_HEADER, USER_AGENT, trace_headers
from convscope._server_errors import (
    MESSAGES,
    closed_error,
    connection_error,
    deadline_error,
    http_error,
    parse_retry_after,
)
from convscope._urls import ascii_host

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

WRITTEN_FOR = {"httpx": "0.28.1", "httpcore": "1.0.9", "httpx-aiohttp": "0.2.0"}

PROTOBUF = "application/x-protobuf"
MAX_CONNECTIONS = 100  # Further requests wait for a connection.
KEEPALIVE_S = 5.0  # An idle connection is closed after this time.

CHUNK_THRESHOLD_BYTES = 256 * 1024
CHUNK_BYTES = 256 * 1024  # Larger bodies are sent in chunks, so that the deadline is checked between them.
WATCHED_UPLOAD_BYTES = 8 * 1024 * 1024  # Larger bodies get their own connection, whose socket is watched.
WATCHED_CHUNK_BYTES = 16 * 1024  # No more than a writable socket accepts without blocking.
_POLL_S = 0.01  # Interval of checking the socket, in asyncio.

CONNECTED_EVENTS = ("connect_tcp.complete", "start_tls.complete")  # Trace events that return a new stream.

# The exception for each one of httpx; the most specific base class wins. anyio raises some built-in ones unwrapped.
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
_DISCONNECT_PHRASES = ("disconnected", "closed connection")  # In a RemoteProtocolError: the connection broke.


class _BaseRestTransport:
    """Request building and response checks of the sync and async REST transports.

    Args:
        url: `http://` or `https://`, and the host.
        api_key: Sent as `x-api-key`, if given.
        ca_file: PEM file of CA certificates; None for the default ones.
        use_proxies: Whether to use the proxies of the environment, as httpx does.

    Raises:
        OSError: `ca_file` cannot be read.
        ValueError: A proxy of the environment is invalid.
    """

    def __init__(self, url: str, *, api_key: str | None, ca_file: str | None, use_proxies: bool) -> None:
        self._url = url
        # No other headers: TorchServe's worker takes time for each.
        self._headers = {"accept": PROTOBUF, "content-type": PROTOBUF, "user-agent": USER_AGENT}
        if api_key is not None:
            self._headers[API_KEY_HEADER] = api_key
        if use_proxies:
            _check_proxies()
        self._endpoint_url = lru_cache(maxsize=128)(lambda path: httpx.URL(f"{url}/predictions/{path}"))
        self._client_arguments: dict[str, Any] = {
            "verify": _ssl_context(ca_file, secure=url.startswith("https:")),
            "trust_env": use_proxies,
            "timeout": None,  # Each request has its own.
        }
        self._last_request_ids: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # By network stream.

    def _new_client(self, client_class: Any, *, keepalive: bool) -> Any:
        """Create an httpx client of the given class."""
        # We limit concurrency ourselves: in httpcore 1.0.9 a connection whose TLS handshake failed behind a proxy is
        # never released from the pool.
        limits = httpx.Limits(
            max_connections=None,
            max_keepalive_connections=MAX_CONNECTIONS if keepalive else 0,
            keepalive_expiry=KEEPALIVE_S,
        )
        return client_class(**self._client_arguments, limits=limits)

    def _parse_and_check(self, reader: ReplyReader, stream: Any, request_id: str) -> PredictReply:
        """Parse the response to a request, received over this stream; see `read_response`.

        Raises:
            ConnectError: It is the response to the previous request: httpx returns surplus bytes as the next response.
        """
        reply = reader.reply()
        if stream is not None:
            previous_id = self._last_request_ids.get(stream)
            if previous_id is not None and reply.request_id == previous_id != request_id:
                raise connection_error(self._url, "received the previous request's response again")
            self._last_request_ids[stream] = request_id
        return reply

    def _build_http_request(
        self,
        body: bytes,
        content: Any,
        request: PredictRequest,
        model: str,
        version: str | None,
        extensions: dict[str, Any],
    ) -> httpx.Request:
        """Build the HTTP request."""
        own = {"content-length": str(len(body)), REQUEST_ID_HEADER: request.request_id}
        headers = {**self._headers, **own, **trace_headers(request)}
        url = self._endpoint_url(model if version is None else f"{model}/{version}")
        return httpx.Request("POST", url, headers=headers, content=content, extensions=extensions)


class RestTransport(_BaseRestTransport):
    """REST transport that uses `httpx.Client`; see `_BaseRestTransport` for its arguments.

    httpx has timeouts for single reads and writes, and none for DNS. So each request runs in a thread, and the caller
    waits for that thread until the deadline.
    """

    def __init__(self, url: str, **arguments: Any) -> None:
        super().__init__(url, **arguments)
        self._client: httpx.Client = self._new_client(httpx.Client, keepalive=True)
        self._uploads: httpx.Client = self._new_client(httpx.Client, keepalive=False)
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="convscope-rest")
        self._sockets = SocketRegistry()

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        timeouts = RemainingTimeouts(deadline_s)
        body = request.SerializeToString()
        upload = Upload(body, timeouts) if len(body) > CHUNK_THRESHOLD_BYTES else None
        watched = len(body) > WATCHED_UPLOAD_BYTES
        tracker = ConnectionTracker(upload if watched else None, self._sockets)
        extensions = {"timeout": timeouts, "trace": tracker.trace}
        http_request = self._build_http_request(body, upload or body, request, model, version, extensions)
        client = self._uploads if watched else self._client
        try:
            future = self._threads.submit(
                self._exchange, client, http_request, request.request_id, deadline_s, tracker.new_sockets
            )
        except RuntimeError as error:
            raise closed_error(self._url) from error
        try:
            return future.result(deadline_s)
        except TimeoutError as error:
            raise deadline_error(deadline_s) from error
        except CancelledError as error:
            raise closed_error(self._url) from error
        finally:
            if not future.done() and not future.cancel():  # Deadline or Ctrl-C: close the sockets so the thread ends.
                shut_down(tracker.new_sockets)

    def _exchange(
        self,
        client: httpx.Client,
        http_request: httpx.Request,
        request_id: str,
        deadline_s: float,
        new_sockets: list[socket.socket],
    ) -> PredictReply:
        """Send a request and read the response."""
        if client.is_closed:
            raise closed_error(self._url)
        with (
            map_httpx_exceptions(self._url, deadline_s, new_connections=new_sockets),
            contextlib.closing(client.send(http_request, stream=True)) as response,
        ):
            reader = ReplyReader(response)
            for chunk in response.iter_raw():
                reader.feed(chunk)
        stream = response.extensions["network_stream"]
        try:
            return self._parse_and_check(reader, stream, request_id)
        except (ProtocolError, ConnectError):
            stream.close()
            raise

    def close(self) -> None:
        """Close the connections; a thread that waits for a response raises ConnectError."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sockets.shut_down_all()
        self._client.close()
        self._uploads.close()


class AsyncRestTransport(_BaseRestTransport):
    """REST transport that uses `httpx.AsyncClient`, or httpx-aiohttp's client.

    Args:
        url: As for `_BaseRestTransport`.
        backend: `"httpx"`, or `"aiohttp"`.
        **arguments: As for `_BaseRestTransport`.

    Raises:
        ImportError: httpx-aiohttp is not installed.
    """

    def __init__(self, url: str, *, backend: str, **arguments: Any) -> None:
        super().__init__(url, **arguments)
        client_class: Any = httpx.AsyncClient
        self._has_trace = backend == "httpx"
        if not self._has_trace:
            self._headers["accept-encoding"] = "identity"  # aiohttp would accept compressed responses.
            client_class = _aiohttp_client_class()
        self._client: httpx.AsyncClient = self._new_client(client_class, keepalive=True)
        self._uploads: httpx.AsyncClient = self._new_client(client_class, keepalive=False)
        self._connection_slots = asyncio.Semaphore(MAX_CONNECTIONS)

    async def asend(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        body = request.SerializeToString()
        upload = AsyncUpload(body) if len(body) > WATCHED_UPLOAD_BYTES else None
        # The streams opened for this request; None for one that aiohttp may have opened.
        new_streams: list[Any] = [] if self._has_trace else [None]

        async def trace(event: str, info: dict[str, Any]) -> None:
            if event.endswith(CONNECTED_EVENTS):
                new_streams.append(info["return_value"])
                if upload is not None:
                    upload.watch(info["return_value"])

        http_request = self._build_http_request(body, upload or body, request, model, version, {"trace": trace})
        client = self._client if upload is None else self._uploads
        try:
            with map_httpx_exceptions(self._url, deadline_s, new_connections=new_streams):
                async with asyncio.timeout(deadline_s), self._connection_slots:
                    return await self._exchange(client, http_request, request.request_id)
        except (DeadlineExceeded, asyncio.CancelledError):
            for stream in filter(None, new_streams):  # httpcore leaves a stream open if its handshake was cancelled.
                await stream.aclose()
            raise

    async def _exchange(self, client: httpx.AsyncClient, http_request: httpx.Request, request_id: str) -> PredictReply:
        """Send a request and read the response."""
        if client.is_closed:
            raise closed_error(self._url)
        async with contextlib.aclosing(await client.send(http_request, stream=True)) as response:
            reader = ReplyReader(response)
            async for chunk in response.aiter_raw():
                reader.feed(chunk)
        stream = response.extensions.get("network_stream")
        try:
            return self._parse_and_check(reader, stream, request_id)
        except (ProtocolError, ConnectError):
            if stream is not None:
                await stream.aclose()
            raise

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._uploads.aclose()


class SocketRegistry:
    """The sockets of all connections of a client. Thread-safe."""

    def __init__(self) -> None:
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._closed = False
        self._lock = threading.Lock()

    def add(self, socket_: socket.socket) -> None:
        """Add a socket; shut it down if the client has been closed."""
        with self._lock:
            self._sockets.add(socket_)
            if self._closed:
                shut_down([socket_])

    def shut_down_all(self) -> None:
        """Shut down all sockets, also those that are added later."""
        with self._lock:
            self._closed = True
            shut_down(self._sockets)


class ConnectionTracker:
    """Collects the sockets opened for one request, through httpx's `trace` extension.

    Args:
        upload: The request body, if it watches its connection.
        all_sockets: The sockets of all requests; those of this request are added.

    Attributes:
        new_sockets: The sockets; empty if the request uses an existing connection.
    """

    def __init__(self, upload: Upload | None, all_sockets: SocketRegistry) -> None:
        self.new_sockets: list[socket.socket] = []
        self._upload = upload
        self._all_sockets = all_sockets
        self._handshake: socket.socket | None = None

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Handle a trace event."""
        if event.endswith("start_tls.started"):
            connected = self.new_sockets[-1]  # `ssl` takes over its file descriptor in the handshake: duplicate it.
            self._handshake = socket.fromfd(connected.fileno(), connected.family, connected.type)
            self._add(self._handshake)
        elif event.endswith(("start_tls.complete", "start_tls.failed")) and self._handshake is not None:
            self._handshake.close()
        if event.endswith(CONNECTED_EVENTS):
            self._add(info["return_value"].get_extra_info("socket"))
            if self._upload is not None:
                self._upload.watch(info["return_value"])

    def _add(self, socket_: socket.socket) -> None:
        self.new_sockets.append(socket_)
        self._all_sockets.add(socket_)


def shut_down(sockets: Iterable[socket.socket]) -> None:
    """Shut sockets down. Unlike closing them, this wakes the threads that wait for them."""
    for socket_ in sockets:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(socket_, socket.SHUT_RDWR)  # SSLSocket's own method would end TLS, too.


class RemainingTimeouts(Mapping[str, float]):
    """The `timeout` extension of a request: each step gets the time that remains when it begins.

    Args:
        deadline_s: Seconds from now until the deadline.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._expires_at = time.monotonic() + deadline_s

    def remaining_s(self) -> float:
        """Return the seconds until the deadline.

        Raises:
            DeadlineExceeded: None remain.
        """
        remaining_s = self._expires_at - time.monotonic()
        if remaining_s <= 0:
            raise deadline_error(self._deadline_s)
        return remaining_s

    def __getitem__(self, step: str) -> float:
        return self.remaining_s()

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "read", "write", "pool"))

    def __len__(self) -> int:
        return 4


class _WatchedBody:
    """A request body that is sent in chunks while its socket is watched.

    Is the socket writable, and has the server responded or closed the connection? A server that rejects a request for
    its size responds at once, and may not read the rest of it.

    Args:
        body: The body.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._poll: Any = None

    def watch(self, stream: Any) -> None:
        """Watch an httpcore stream, the connection of the request: first without TLS, then with it."""
        if not hasattr(select, "poll"):
            return  # Windows has no poll(): early responses are not noticed there.
        # Over TLS, readable bytes may be TLS records without data, but a closed connection is unambiguous.
        tls = stream.get_extra_info("ssl_object") is not None
        events = getattr(select, "POLLRDHUP", 0) if tls else select.POLLIN
        self._poll = select.poll()
        self._poll.register(stream.get_extra_info("socket"), select.POLLOUT | events)

    def _chunks(self) -> Iterator[bytes]:
        size = CHUNK_BYTES if self._poll is None else WATCHED_CHUNK_BYTES
        for start in range(0, len(self._body), size):
            yield self._body[start : start + size]

    def _wait_writable(self, seconds: float) -> bool:
        """Wait up to `seconds` until the socket is writable; return whether it is.

        Raises:
            httpcore.WriteError: The server has responded or closed the connection; httpcore then reads the response.
        """
        if self._poll is None:
            return True
        events = self._poll.poll(1000 * seconds)
        if any(flags & ~select.POLLOUT for _, flags in events):
            raise httpcore.WriteError("the server responded before the request was complete")
        return bool(events)


class Upload(_WatchedBody):
    """A request body for `httpx.Client`, sent in chunks so that a deadline or an early response stops it.

    Args:
        body: The body.
        timeouts: The remaining time of the call.
    """

    def __init__(self, body: bytes, timeouts: RemainingTimeouts) -> None:
        super().__init__(body)
        self._timeouts = timeouts

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks():
            while not self._wait_writable(self._timeouts.remaining_s()):
                pass  # At the deadline `remaining_s` raises.
            yield chunk


class AsyncUpload(_WatchedBody):
    """A large request body for `httpx.AsyncClient`, sent in chunks so that an early response stops it."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks():
            while not self._wait_writable(0):
                await asyncio.sleep(_POLL_S)
            yield chunk


class ReplyReader:
    """Collects the chunks of a response.

    Args:
        response: The response, whose headers have been received.

    Raises:
        ReplyTooLarge: It is over this client's limit.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._chunks: list[bytes] = []
        self._size = 0
        length = response.headers.get("content-length", "")
        self._check(int(length) if length.isdecimal() else 0)

    def feed(self, chunk: bytes) -> None:
        """Add the next chunk of the body; raise ReplyTooLarge if the body is over this client's limit."""
        self._size += len(chunk)
        self._check(self._size)
        self._chunks.append(chunk)

    def reply(self) -> PredictReply:
        """Parse the complete response; see `read_response`."""
        return read_response(self._response.status_code, self._response.headers, b"".join(self._chunks))

    def _check(self, size: int) -> None:
        if size > MAX_MESSAGE_BYTES:
            raise ReplyTooLarge(MESSAGES[ReplyTooLarge])


def read_response(status: int, headers: Mapping[str, str], body: bytes) -> PredictReply:
    """Parse an HTTP response; names of headers are case-insensitive.

    Raises:
        ConvscopeError: The response is not a reply, or the service is starting or draining.
    """
    retry_after_s = parse_retry_after(headers.get("retry-after", ""))
    if headers.get("content-type", "").lower().startswith(PROTOBUF):
        reply = parse_reply(body, retry_after_s)
        if 200 <= status < 300 or reply.HasField("error"):
            return reply
    raise http_error(status, body, retry_after_s)


@contextlib.contextmanager
def map_httpx_exceptions(url: str, deadline_s: float, *, new_connections: Sized) -> Iterator[None]:
    """Replace exceptions of httpx by ours, with the original as the cause.

    Args:
        url: URL of the service, for the message.
        deadline_s: Deadline of the request, for the message.
        new_connections: Connections opened for the request; empty if it used an existing one.
    """
    try:
        yield
    except tuple(TRANSLATIONS) as error:
        raise translate(error, url, deadline_s, reused=not new_connections) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "aiohttp":
            raise
        raise ProtocolError(f"invalid HTTP response from {url}: {error}") from error  # Not wrapped by httpx-aiohttp.


def translate(error: Exception, url: str, deadline_s: float, *, reused: bool) -> TransportError:
    """Map an exception of httpx to one of ours; `reused` says whether the request used an existing connection."""
    reason = str(error) or type(error).__name__
    ours = next(TRANSLATIONS[base] for base in type(error).__mro__ if base in TRANSLATIONS)
    if type(error.__cause__).__module__.partition(".")[0] == "aiohttp" and ours is DeadlineExceeded:
        ours = ConnectError  # httpx-aiohttp reports a broken connection as a timeout; we set none.
    if isinstance(error, httpx.RemoteProtocolError) and (
        reused or any(phrase in reason for phrase in _DISCONNECT_PHRASES)
    ):
        ours = ConnectError
    if ours is ConnectError:
        return connection_error(url, reason)
    if ours is DeadlineExceeded:
        return deadline_error(deadline_s)
    return ours(f"invalid HTTP response from {url}: {reason}")


def _aiohttp_client_class() -> type[httpx.AsyncClient]:
    """Return the client class of httpx-aiohttp."""
    try:
        from httpx_aiohttp import HttpxAiohttpClient
    except ImportError as error:
        raise ImportError("backend='aiohttp' requires httpx-aiohttp: pip install 'convscope[aiohttp]'") from error
    client_class: type[httpx.AsyncClient] = HttpxAiohttpClient
    return client_class


def _ssl_context(ca_file: str | None, *, secure: bool) -> ssl.SSLContext:
    """Create the TLS context for connections to the service."""
    if ca_file is not None:
        return ssl.create_default_context(cafile=ca_file)
    if secure:
        return httpx.create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # Never used: do not load certificates for http.


def _check_proxies() -> None:
    """Raise ValueError unless httpx can use the environment's proxies: its own errors would show their passwords."""
    for scheme, proxy in getproxies().items():
        if scheme not in ("http", "https", "all") or not proxy:
            continue
        try:
            url = httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}").url
            usable = url.scheme in ("http", "https") or find_spec("socksio") is not None
            ascii_host(url.host)
        except (ValueError, httpx.InvalidURL):
            usable = False
        if not usable:
            raise ValueError(
                f"environment variable {scheme}_proxy/{scheme.upper()}_PROXY must be http://host:port or"
                " https://host:port"
            )
