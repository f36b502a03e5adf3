"""The connection to a service as the clients see it: one method, the same for REST and gRPC, and how a URL chooses.

A transport does not know what a request or a reply holds. `_rest` and `_grpc` are imported when a URL asks for them;
`testing` has one for applications' own tests.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args
from urllib.parse import SplitResult, urlsplit

from convscope._protocol import ascii_host

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply, PredictRequest

Backend: TypeAlias = Literal["httpx", "aiohttp"]

_SCHEMES = ("http", "https", "grpc", "grpcs")


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


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine itself, for which the environment's proxies are not used."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
