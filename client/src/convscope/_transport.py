"""The `Transport` interface, and the functions that create one from a URL.

Transports do not interpret requests or replies. `_rest` and `_grpc` are imported when a URL needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args
from urllib.parse import SplitResult

from convscope._urls import is_loopback, parse_url

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

Backend: TypeAlias = Literal["httpx", "aiohttp"]


class Transport(Protocol):
    """Sends the requests of a `Client`. Thread-safe."""

    def send(self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float) -> PredictReply:
        """Send a request and return the reply, which may contain errors of the contract.

        Args:
            request: The request; its `request_id` is also sent as the header `x-request-id`.
            model: Name of the model.
            version: Version of the model; None for the server's default.
            deadline_s: Seconds from now until the reply must be complete.

        Returns:
            The reply.

        Raises:
            Overloaded: The service is starting or draining, its queue is full, or a gateway cannot reach it.
            ConvscopeError: No reply of the contract was received.
        """

    def close(self) -> None:
        """Close the connections."""


class AsyncTransport(Protocol):
    """Sends the requests of an `AsyncClient`; it belongs to one event loop."""

    async def asend(
        self, request: PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> PredictReply:
        """Send a request and return the reply; see `Transport.send`."""

    async def aclose(self) -> None:
        """Close the connections."""


def open_transport(url: str, *, api_key: str | None, ca_file: str | None) -> Transport:
    """Create the transport for a URL; see `Client` for the arguments. The first request connects.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The URL or the key is invalid.
        OSError: `ca_file` cannot be read.
    """
    parts, arguments = _transport_arguments(url, api_key, ca_file)
    if parts.scheme in ("http", "https"):
        from convscope._rest import RestTransport

        return RestTransport(parts.geturl(), **arguments)
    from convscope._grpc import GrpcTransport

    return GrpcTransport(parts.netloc, secure=parts.scheme == "grpcs", **arguments)


def open_async_transport(url: str, *, api_key: str | None, ca_file: str | None, backend: Backend) -> AsyncTransport:
    """Create the transport for a URL, for asyncio; see `open_transport`, and `AsyncClient` for `backend`."""
    parts, arguments = _transport_arguments(url, api_key, ca_file)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if parts.scheme in ("http", "https"):
        from convscope._rest import AsyncRestTransport

        return AsyncRestTransport(parts.geturl(), backend=backend, **arguments)
    if backend != "httpx":
        raise ValueError("backend applies only to http:// and https:// URLs")
    from convscope._grpc import AsyncGrpcTransport

    return AsyncGrpcTransport(parts.netloc, secure=parts.scheme == "grpcs", **arguments)


def _transport_arguments(url: str, api_key: str | None, ca_file: str | None) -> tuple[SplitResult, dict[str, Any]]:
    """Check the arguments, and return the parts of the URL and the arguments that all transports have."""
    parts = parse_url(url)
    if not isinstance(api_key, str | None):
        raise TypeError("api_key must be a str or None")
    if api_key is not None and not (api_key == api_key.strip() != "" and api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key must be printable ASCII, without line breaks and without leading or trailing spaces")
    if ca_file is not None and parts.scheme not in ("https", "grpcs"):
        raise ValueError("ca_file applies only to https:// and grpcs:// URLs")
    use_proxies = not is_loopback(parts.hostname or "")
    return parts, {"api_key": api_key, "ca_file": ca_file, "use_proxies": use_proxies}
