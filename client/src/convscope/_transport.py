"""The seam between the clients and the network: one method, behind which REST and gRPC look alike.

It does not know what a request or a reply holds. The implementations are `_rest` and `_grpc`, each imported only when a
URL asks for it, and `testing`, for applications' own tests.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args
from urllib.parse import SplitResult, urlsplit

from google.protobuf.message import DecodeError

from convscope._exceptions import (
    AuthenticationFailed,
    BadRequest,
    ConvscopeError,
    DeadlineExceeded,
    ImageTooLarge,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ServerError,
)
from convscope._wire.convscope_pb2 import PredictReply

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictRequest

Backend: TypeAlias = Literal["httpx", "aiohttp"]

MAX_MESSAGE_BYTES = 512 * 1024 * 1024  # Of a request or a reply; gRPC's own default of 4 MB is less than one large map.
API_KEY_HEADER = "x-api-key"
REQUEST_ID_HEADER = "x-request-id"
USER_AGENT = "convscope-python"
WORKER_DIED = "Worker died"  # TorchServe's words.
_SCHEMES = ("http", "https", "grpc", "grpcs")
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class Transport(Protocol):
    """A connection to the service, for `Client`. Safe to use from several threads at once."""

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply, which may hold errors of the contract.

        Args:
            request: The request; its `request_id` is sent as the header `x-request-id`, too.
            model: The model's name.
            version: Its version; None for the server's default.
            deadline_s: Seconds from now until the reply must be complete.

        Returns:
            The reply as it came.

        Raises:
            ConvscopeError: No reply of the contract came; see `_exceptions`.
        """

    def close(self) -> None:
        """Close the connections."""


class AsyncTransport(Protocol):
    """A connection to the service, for `AsyncClient`; it belongs to one event loop."""

    async def asend(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""

    async def aclose(self) -> None:
        """Close the connections."""


def open_transport(url: str, *, api_key: str | None, ca_file: str | None) -> Transport:
    """Make the transport for a URL; nothing is connected yet.

    Args:
        url: `http://`, `https://`, `grpc://host:port` or `grpcs://host:port`.
        api_key: Sent with every request as `x-api-key`, if given.
        ca_file: PEM file of the certificates to trust instead of the usual ones, for `https` and `grpcs`.

    Returns:
        The transport.

    Raises:
        ValueError: The URL or the key cannot be used.
        OSError: `ca_file` cannot be read.
    """
    parts, settings = _settings(url, api_key, ca_file)
    if parts.scheme in ("http", "https"):
        from convscope._rest import RestTransport

        return RestTransport(parts.geturl(), **settings)
    from convscope._grpc import GrpcTransport

    return GrpcTransport(_grpc_target(parts, url), secure=parts.scheme == "grpcs", **settings)


def open_async_transport(url: str, *, api_key: str | None, ca_file: str | None, backend: Backend) -> AsyncTransport:
    """Make the transport for a URL, for asyncio; see `open_transport`, and `AsyncClient` for `backend`."""
    parts, settings = _settings(url, api_key, ca_file)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if parts.scheme in ("http", "https"):
        from convscope._rest import AsyncRestTransport

        return AsyncRestTransport(parts.geturl(), backend=backend, **settings)
    if backend != "httpx":
        raise ValueError(f"backend has no meaning for {parts.scheme}://")
    from convscope._grpc import AsyncGrpcTransport

    return AsyncGrpcTransport(_grpc_target(parts, url), secure=parts.scheme == "grpcs", **settings)


def _settings(url: str, api_key: str | None, ca_file: str | None) -> tuple[SplitResult, dict[str, Any]]:
    """Check the arguments of a transport.

    Returns:
        The URL's parts, with the host as `ascii_host` writes it, and the settings that all transports take.
    """
    if not isinstance(url, str) or not isinstance(api_key, str | None):
        raise TypeError("url must be text, and so must api_key where there is one")
    if api_key is not None and not (api_key == api_key.strip() != "" and api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key must be printable ASCII text, without line breaks and without blanks around it")
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ValueError(f"url must begin with http://, https://, grpc:// or grpcs:// and name a host: {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("url must hold no user, query or fragment; a key goes into api_key")
    if ca_file is not None and parts.scheme not in ("https", "grpcs"):
        raise ValueError(f"ca_file has no meaning for {parts.scheme}://")
    host = ascii_host(parts.hostname)
    named = f"[{host}]" if ":" in host else host
    parts = parts._replace(netloc=named if parts.port is None else f"{named}:{parts.port}")
    return parts, {"api_key": api_key, "ca_file": ca_file, "use_proxies": not is_loopback(host)}


def _grpc_target(parts: SplitResult, url: str) -> str:
    """Return `host:port` of a gRPC URL."""
    if parts.port is None or parts.path not in ("", "/"):
        raise ValueError(f"a gRPC url is grpc://host:port or grpcs://host:port, without a path: {url!r}")
    return parts.netloc


def ascii_host(host: str) -> str:
    """Return a host's name as DNS, TLS and HTTP know it.

    Args:
        host: The host of a URL, without brackets. A name with letters outside ASCII is converted as browsers do it:
            IDNA 2008 after the mapping of UTS 46. (Python's own codec is IDNA 2003, in which ß is ss.)

    Returns:
        An IP address, or a name in ASCII.

    Raises:
        ValueError: It is neither.
    """
    name = host
    if not host.isascii():
        import idna

        try:
            name = idna.encode(host, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(
                f"url names a host that IDNA 2008 does not allow ({error}): write it in ASCII, as xn--..."
            ) from error
    if ":" in name:
        return str(ipaddress.IPv6Address(name))
    if not _HOST.fullmatch(name) or len(name) > 253:
        raise ValueError(f"url must name a host by its address, or by its name in DNS, not {host[:80]!r}")
    return name


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine itself, for which the environment's proxies are not used."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def parse_reply(data: bytes) -> PredictReply:
    """Parse a serialized reply.

    Args:
        data: The bytes that came.

    Returns:
        The reply.

    Raises:
        ProtocolError: They are not a `PredictReply`.
    """
    try:
        return PredictReply.FromString(data)
    except DecodeError as error:
        raise ProtocolError("the answer is not a convscope reply: is this a convscope server?") from error


def http_error(status: int, body: bytes, retry_after_s: float | None) -> ConvscopeError:
    """Make the exception for a response of HTTP that is not the handler's: TorchServe's, a gateway's, or another's.

    Args:
        status: Its status code.
        body: The whole of it.
        retry_after_s: Seconds after which the server asks to be tried again, if it said so.

    Returns:
        The exception, not raised.
    """
    kind, message = _read_error(body)
    known = torchserve_error(message)
    if known is not None:
        return known
    said = f"HTTP {status}" + (f": {message}" if message else "")
    if status in (401, 403):
        return AuthenticationFailed(f"the server refused the API key or the lack of one ({said})")
    if status == 413:
        return ImageTooLarge(f"the request is larger than the server's request limit ({said})")
    if status == 429 or (status == 503 and kind != "InternalServerException"):
        return Overloaded(f"the server takes no more work now ({said})", retry_after_s=retry_after_s)
    if status == 502:
        return Overloaded(f"a gateway got no answer from the server ({said})", retry_after_s=retry_after_s)
    if status in (408, 504):
        return DeadlineExceeded(f"a server on the way gave up waiting ({said})")
    if status == 400:
        return BadRequest(said)
    if status >= 500:
        return ServerError(said)
    return ProtocolError(f"not a convscope reply ({said}): is this a convscope server?")


def _read_error(body: bytes) -> tuple[str, str]:
    """Return type and message of TorchServe's JSON error; of anything else no type and its first line."""
    try:
        error = json.loads(body)
        return str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
        return "", text.splitlines()[0] if text.isprintable() and text else ""


def torchserve_error(text: str) -> ConvscopeError | None:
    """Recognise an error that TorchServe made itself, before or instead of the handler.

    Args:
        text: The message it sent; on gRPC with the name of a Java exception as its last line.

    Returns:
        The exception, not raised; None if the message is not a known one.
    """
    message = text.split("\n", 1)[0]
    if "Model not found" in text or "does not exist for model" in text:
        return ModelNotFound(message)
    if "has no worker to serve" in text:  # Its message for a full queue, too.
        return Overloaded(message)
    if WORKER_DIED in text or "Prediction failed" in text:
        return ServerError(message)
    return None
