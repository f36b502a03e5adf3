"""The REST seam: a request as `application/x-protobuf` to `/predictions/<model>[/<version>]`, with httpx.

The only module that knows httpx. Connections are kept open and shared between threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from convscope._exceptions import (
    AuthenticationFailed,
    BadRequest,
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    ImageTooLarge,
    Overloaded,
    ProtocolError,
    ReplyTooLarge,
    ServerError,
    TransportError,
)
from convscope._transport import (
    API_KEY_HEADER,
    MAX_MESSAGE_BYTES,
    REQUEST_ID_HEADER,
    USER_AGENT,
    parse_reply,
    torchserve_error,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

_PROTOBUF = "application/x-protobuf"
_TIMEOUTS = ("connect", "read", "write", "pool")

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
        use_proxies: Whether to use the proxies (and .netrc) of the environment.
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
        headers = {"accept": _PROTOBUF, "content-type": _PROTOBUF, "user-agent": USER_AGENT}
        if api_key is not None:
            headers[API_KEY_HEADER] = api_key
        try:
            self._predictions = httpx.URL(url.rstrip("/") + "/predictions/")
        except httpx.InvalidURL as error:
            raise ValueError(f"url cannot be used: {error}") from error
        self._url = url
        self._open(
            headers=headers,
            verify=ssl.create_default_context(cafile=ca_file) if ca_file is not None else True,
            trust_env=use_proxies,
            transport=mount,
        )
        for needless in ("accept-encoding", "connection"):  # TorchServe's worker pays for every header it reads.
            self._http.headers.pop(needless, None)

    _http: httpx.Client | httpx.AsyncClient

    @abstractmethod
    def _open(self, **settings: Any) -> None:
        """Make `_http` out of httpx's settings."""

    def _build(
        self, request: PredictRequest, model: str, version: str | None, extensions: dict[str, Any]
    ) -> httpx.Request:
        path = quote(model, safe="") if version is None else f"{quote(model, safe='')}/{quote(version, safe='')}"
        return self._http.build_request(
            "POST",
            f"{self._predictions}{path}",
            headers={REQUEST_ID_HEADER: request.request_id},
            content=request.SerializeToString(),
            extensions=extensions,
        )


class RestTransport(_Rest):
    """Sends requests over HTTP/1.1; see `_Rest` for its arguments."""

    _http: httpx.Client

    def _open(self, **settings: Any) -> None:
        self._http = httpx.Client(**settings)

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        ends = time.monotonic() + deadline_s
        waits = dict.fromkeys(_TIMEOUTS, deadline_s)

        def shorten_waits(_event: str, _info: dict[str, Any]) -> None:
            # httpx limits each step by itself; before each, leave it only what is left of the whole.
            waits.update(dict.fromkeys(_TIMEOUTS, max(ends - time.monotonic(), 0.001)))

        with _translated(self._url):
            asked = self._build(request, model, version, {"timeout": waits, "trace": shorten_waits})
            response = self._http.send(asked, stream=True)
            with contextlib.closing(response):
                body = _Body()
                for chunk in response.iter_bytes():
                    body.add(chunk)
                    if time.monotonic() > ends:
                        raise DeadlineExceeded("the deadline passed")
        return _understand(response, body.data())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncRestTransport(_Rest):
    """Sends requests over HTTP/1.1 from asyncio; see `_Rest` for its arguments."""

    _http: httpx.AsyncClient

    def _open(self, **settings: Any) -> None:
        self._http = httpx.AsyncClient(**settings)

    async def send(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""
        try:
            with _translated(self._url):
                async with asyncio.timeout(deadline_s):
                    asked = self._build(request, model, version, {"timeout": dict.fromkeys(_TIMEOUTS)})
                    response = await self._http.send(asked, stream=True)
                    async with contextlib.aclosing(response):
                        body = _Body()
                        async for chunk in response.aiter_bytes():
                            body.add(chunk)
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed") from error
        return _understand(response, body.data())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


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


def _understand(response: httpx.Response, body: bytes) -> PredictReply:
    """Return the reply of the contract, or raise what the answer stands for otherwise."""
    if response.headers.get("content-type", "").startswith(_PROTOBUF):
        reply = parse_reply(body)
        if response.is_success or reply.HasField("error"):
            return reply
    raise _refusal(response, body)


def _refusal(response: httpx.Response, body: bytes) -> ConvscopeError:
    """Make the exception for an answer that is not our handler's: TorchServe's own, a gateway's, or a stranger's."""
    status = response.status_code
    kind, message = _torchserve_words(body)
    known = torchserve_error(message)
    if known is not None:
        return known
    said = f"HTTP {status}" + (f": {message}" if message else "")
    if status in (401, 403):
        return AuthenticationFailed(f"the server refused the API key or the lack of one ({said})")
    if status == 413:
        return ImageTooLarge(f"the request is larger than the server's request limit ({said})")
    if status == 429 or (status == 503 and kind != "InternalServerException"):
        return Overloaded(f"the server takes no more work now ({said})", retry_after_s=_retry_after_s(response))
    if status in (408, 504):
        return DeadlineExceeded(f"a server on the way gave up waiting ({said})")
    if status == 400:
        return BadRequest(said)
    if status >= 500:
        return ServerError(said)
    return ProtocolError(f"not a convscope reply ({said}): is this a convscope server?")


def _torchserve_words(body: bytes) -> tuple[str, str]:
    """Return type and message of TorchServe's JSON error; of anything else no type and its first words."""
    try:
        error = json.loads(body)
        return str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode("utf-8", "replace").strip()
        return "", text.splitlines()[0] if text.isprintable() and text else ""


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the seconds of a Retry-After header, if it holds seconds."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else None
