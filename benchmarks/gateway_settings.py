"""The ways in that are measured, and the settings of the gateway that are tried, one changed at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.envoy import Files, Setting, http_filter, manager

Edit = Callable[[Files], None]

KIB = 1024
MIB = 1024 * KIB


def _buffers(size: int) -> Edit:
    """What a connection may hold back, towards callers and towards the service."""

    def edit(files: Files) -> None:
        for config in (*files["plain"]["resources"], *files["tls"]["resources"], *files["clusters"]["resources"]):
            config["per_connection_buffer_limit_bytes"] = size

    return edit


def _upstream(files: Files) -> dict[str, Any]:
    """Return the HTTP/2 settings towards TorchServe's gRPC port."""
    cluster = next(one for one in files["clusters"]["resources"] if one["name"] == "grpc")
    [options] = cluster["typed_extension_protocol_options"].values()
    found: dict[str, Any] = options["explicit_http_config"]["http2_protocol_options"]
    return found


def _windows(stream: int, connection: int) -> Edit:
    """HTTP/2's flow control, towards callers and towards the service: what may come unasked."""

    def edit(files: Files) -> None:
        window = {"initial_stream_window_size": stream, "initial_connection_window_size": connection}
        for options in (manager(files)["http2_protocol_options"], _upstream(files)):
            options |= window

    return edit


def _streams(count: int) -> Edit:
    """So many calls in flight on one connection to TorchServe; for more Envoy opens others."""

    def edit(files: Files) -> None:
        _upstream(files)["max_concurrent_streams"] = count

    return edit


def _without_log(name: str) -> Edit:
    def edit(files: Files) -> None:
        manager(files)["access_log"] = [one for one in manager(files)["access_log"] if one["name"] != name]

    return edit


def _without_filter(name: str) -> Edit:
    def edit(files: Files) -> None:
        manager(files)["http_filters"].remove(http_filter(files, name))

    return edit


DOORS = (
    Setting("plain, no keys", keys=False),
    Setting("plain, keys"),
    Setting("TLS, keys", door="tls"),
)

_PLAN: tuple[tuple[str, Edit, int], ...] = (
    ("as it is", lambda _: None, 2),
    ("1 thread", lambda _: None, 1),
    ("4 threads", lambda _: None, 4),
    ("buffers 256 KiB", _buffers(256 * KIB), 2),
    ("buffers 4 MiB", _buffers(4 * MIB), 2),
    ("buffers 16 MiB", _buffers(16 * MIB), 2),
    ("windows 64 KiB", _windows(64 * KIB, 256 * KIB), 2),
    ("windows 4 MiB", _windows(4 * MIB, 64 * MIB), 2),
    ("4 calls a connection", _streams(4), 2),
    ("1 call a connection", _streams(1), 2),
    # What each of these costs; none is to go.
    ("without the access log", _without_log("stdout"), 2),
    ("without the statistics", _without_log("stats"), 2),
    ("without the digest", _without_filter("digest"), 2),
    ("without the request buffer", _without_filter("buffer"), 2),
)

SETTINGS = tuple(Setting(name, edit, threads, keys=name != "without the digest") for name, edit, threads in _PLAN)
