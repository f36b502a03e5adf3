"""The proxy that the environment names: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in either case."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from convscope._transport import ascii_host


class EnvironmentProxy(NamedTuple):
    """A proxy: its URL, and name and password if it wants them."""

    url: str
    auth: tuple[str, str] | None


def environment_proxy(url: str) -> EnvironmentProxy | None:
    """Return the proxy that the environment names for a URL, if any.

    Args:
        url: Whom it is to be used for.

    Returns:
        The proxy; None where none is named, or `NO_PROXY` names the host.

    Raises:
        ValueError: The one named cannot be used. Says which variable names it and not its value, which may hold a
            password.
    """
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    kind = parts.scheme if proxies.get(parts.scheme) else "all"
    named = proxies.get(kind)
    if not named:
        return None
    try:
        proxy = urlsplit(named if "://" in named else f"http://{named}")
        usable = proxy.scheme in ("http", "https") and ascii_host(proxy.hostname or "") and proxy.port != 0
    except ValueError:
        usable = False
    if not usable:
        names = f"{kind}_proxy or {kind.upper()}_PROXY"
        raise ValueError(f"{names} in the environment must be http://host:port or https://host:port")
    known = None if proxy.username is None else (unquote(proxy.username), unquote(proxy.password or ""))
    return EnvironmentProxy(f"{proxy.scheme}://{proxy.netloc.rpartition('@')[2]}", known)
