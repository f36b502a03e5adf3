"""What the server says once it is ready: where it listens and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.configuration import Listeners
from server.java import Java
from server.models import Archive
from server.ports import reachable


def list_listeners(
    listeners: Listeners, archives: Sequence[Archive], java: Java, seconds: float, logs: Path
) -> dict[str, Any]:
    """Say what `describe_listeners` says as values for a log collector."""
    host = reachable(listeners.host)
    return {
        "rest": f"http://{host}:{listeners.rest}",
        "grpc": f"{host}:{listeners.grpc}",
        "metrics": f"http://{host}:{listeners.metrics}/metrics",
        "models": [f"{archive.name}/{archive.version}" for archive in archives],
        "seconds": round(seconds, 3),
        "java": f"{java.version} ({java.source})",
        "logs": str(logs),
    }


def describe_listeners(
    listeners: Listeners, archives: Sequence[Archive], java: Java, seconds: float, logs: Path
) -> str:
    """Describe a server that is ready.

    Args:
        listeners: Where it listens.
        archives: What it serves, the newest version of a model first.
        java: The Java it runs on.
        seconds: Time it took to be ready.
        logs: Folder of its logs.
    """
    host = reachable(listeners.host)
    rest = f"http://{host}:{listeners.rest}"
    defaults: set[str] = set()
    urls: list[tuple[str, str]] = []
    for archive in archives:
        path = archive.name if archive.name not in defaults else f"{archive.name}/{archive.version}"
        defaults.add(archive.name)
        urls.append((f"{archive.name} {archive.version}", f"{rest}/predictions/{path}"))
    width = max(len(name) for name, _ in urls)
    first = urls[0][1]
    lines = [
        f"Ready after {seconds:.1f} s, on Java {java.version} ({java.source}).",
        f"  REST     {rest}",
        f"  gRPC     {host}:{listeners.grpc}",
        f"  metrics  http://{host}:{listeners.metrics}/metrics",
        *(f"  model    {name:<{width}}  {url}" for name, url in urls),
        f"  logs     {logs}",
        "Try:",
        f"  curl {first}",
        f"  curl -T picture.png {first}",
        f"  curl -F data=@picture.png -F layers=all -H 'Accept: application/x-npz' -o maps.npz {first}",
        "Ctrl-C stops it.",
    ]
    return "\n".join(lines)
