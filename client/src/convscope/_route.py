"""How a service is reached over HTTP: directly, through a plain proxy, or through a proxy's tunnel."""

from __future__ import annotations

import base64
import ssl
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import httpcore

from convscope._proxies import environment_proxy
from convscope._transport import ascii_host

_PORTS = {"http": 80, "https": 443}


class Route(NamedTuple):
    """What is to be done until a request can be sent, in this order, and what every request then says.

    Attributes:
        host: Whom to connect with: the service, or its proxy.
        port: On which port.
        proxy_tls: Whom to trust as the proxy, where TLS is spoken with it.
        tunnel: The request to the proxy for a way to the service; empty for none.
        tls: Whom to trust as the service, where TLS is spoken with it.
        service: The service's host, whose certificate is looked for.
        target: What stands in a request's first line before a model's name.
        headers: The first headers of every request, with their line ends.
    """

    host: str
    port: int
    proxy_tls: ssl.SSLContext | None
    tunnel: bytes
    tls: ssl.SSLContext | None
    service: str
    target: bytes
    headers: bytes


def find_route(url: str, *, ca_file: str | None, use_proxies: bool) -> Route:
    """Find out how a service is reached.

    Args:
        url: `http://` or `https://`, host, and a path if the service lies below one.
        ca_file: PEM file of the certificates to trust; None for the usual ones.
        use_proxies: Whether to use the proxies of the environment.

    Returns:
        The route.

    Raises:
        OSError: `ca_file` cannot be read.
        ValueError: The URL, or the proxy that the environment names, cannot be used.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    service = ascii_host(parts.hostname or "")
    port = parts.port or _PORTS[parts.scheme]
    named = f"[{service}]" if ":" in service else service
    where = named if parts.port is None else f"{named}:{parts.port}"
    target = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~") + "/predictions/"
    headers = f"host: {where}\r\n"
    tls = _trust(ca_file) if secure else None
    proxy = environment_proxy(url) if use_proxies else None
    if proxy is None:
        return Route(service, port, None, b"", tls, service, target.encode(), headers.encode())
    known = ""
    if proxy.auth is not None:
        known = f"proxy-authorization: Basic {base64.b64encode(':'.join(proxy.auth).encode()).decode()}\r\n"
    tunnel = ""
    if secure:
        tunnel = f"CONNECT {named}:{port} HTTP/1.1\r\nhost: {named}:{port}\r\naccept: */*\r\n{known}\r\n"
    else:
        target, headers = f"http://{where}{target}", headers + known
    through = urlsplit(proxy.url)
    proxy_tls = _trust(None) if through.scheme == "https" else None
    host, port = ascii_host(through.hostname or ""), through.port or _PORTS[through.scheme]
    return Route(host, port, proxy_tls, tunnel.encode(), tls, service, target.encode(), headers.encode())


def _trust(ca_file: str | None) -> ssl.SSLContext:
    """Make the context that says whom to trust."""
    context = httpcore.default_ssl_context() if ca_file is None else ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context
