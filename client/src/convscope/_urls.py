"""Checks and normalises the URL of a service."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

_SCHEMES = ("http", "https", "grpc", "grpcs")
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def parse_url(url: str) -> SplitResult:
    """Check a URL, and split it into its parts.

    Args:
        url: `http://host:port`, `https://host`, `grpc://host:port` or `grpcs://host:port`, without a path.

    Returns:
        The parts; the host is an IP address or an ASCII name.

    Raises:
        TypeError: `url` is not a str.
        ValueError: The URL is invalid.
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {url!r}")
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ValueError(f"url must begin with http://, https://, grpc:// or grpcs:// and contain a host: {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("url must not contain a user, query or fragment; pass the key as api_key")
    host = ascii_host(parts.hostname)
    netloc = f"[{host}]" if ":" in host else host
    if parts.port is not None:
        netloc = f"{netloc}:{parts.port}"
    if parts.path not in ("", "/"):
        raise ValueError(
            f"url must end behind the host and port, without the path {parts.path!r}: the model and its version are"
            " separate arguments"
        )
    if parts.scheme.startswith("grpc") and parts.port is None:
        raise ValueError(f"url must name the port: grpc://host:port or grpcs://host:port, not {url!r}")
    return parts._replace(netloc=netloc, path="")


def ascii_host(host: str) -> str:
    """Return a host name in ASCII, as DNS, TLS and HTTP need it.

    Args:
        host: The host of a URL, without brackets. A non-ASCII name is converted as browsers do it: IDNA 2008 after the
            mapping of UTS 46. (Python's own codec is IDNA 2003, which converts ß to ss.)

    Returns:
        An IP address, or a name in ASCII.

    Raises:
        ValueError: The host is invalid.
    """
    name = host
    if not host.isascii():
        import idna

        try:
            name = idna.encode(host, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(
                f"invalid international host name (IDNA 2008): {error}; write the name in ASCII, as xn--..."
            ) from error
    if ":" in name:
        return str(ipaddress.IPv6Address(name))
    if not _HOST.fullmatch(name) or len(name) > 253:
        raise ValueError(f"invalid host name or IP address in url: {host[:80]!r}")
    return name


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, for which proxies of the environment are not used."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
