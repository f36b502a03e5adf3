"""The message that the server is ready: where it listens, and commands to try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.configuration import Listeners
from server.java import Java
from server.models import Archive
from server.ports import reachable


@dataclass(frozen=True)
class Facts:
    """A server that is ready.

    Attributes:
        listeners: Where the server listens.
        archives: The archives served, the newest version of a model first.
        java: The Java that the server runs on.
        patches: Names of the patches of TorchServe that are active.
        seconds: Time from start to readiness.
        logs: Folder of the logs.
    """

    listeners: Listeners
    archives: Sequence[Archive]
    java: Java
    patches: Sequence[str]
    seconds: float
    logs: Path


def list_listeners(facts: Facts) -> dict[str, Any]:
    """Return the content of `describe_listeners` as values for a log collector."""
    listeners, java = facts.listeners, facts.java
    host = reachable(listeners.host)
    return {
        "rest": f"http://{host}:{listeners.rest}",
        "grpc": f"{host}:{listeners.grpc}",
        "metrics": f"http://{host}:{listeners.metrics}/metrics",
        "models": [archive.full_name for archive in facts.archives],
        "seconds": round(facts.seconds, 3),
        "java": f"{java.version} ({java.source})",
        "patches": list(facts.patches),
        "logs": str(facts.logs),
    }


def describe_listeners(facts: Facts) -> str:
    """Describe a server that is ready, for a person at a terminal."""
    listeners, java = facts.listeners, facts.java
    host = reachable(listeners.host)
    rest = f"http://{host}:{listeners.rest}"
    defaults: set[str] = set()
    urls: list[tuple[str, str]] = []
    for archive in facts.archives:
        path = archive.name if archive.name not in defaults else archive.full_name
        defaults.add(archive.name)
        urls.append((f"{archive.name} {archive.version}", f"{rest}/predictions/{path}"))
    width = max(len(name) for name, _ in urls)
    first = urls[0][1]
    lines = [
        f"Ready after {facts.seconds:.1f} s, on Java {java.version} ({java.source}).",
        f"  REST     {rest}",
        f"  gRPC     {host}:{listeners.grpc}",
        f"  metrics  http://{host}:{listeners.metrics}/metrics",
        *(f"  model    {name:<{width}}  {url}" for name, url in urls),
        f"  patches  {', '.join(facts.patches) or 'none'} (of TorchServe)",
        f"  logs     {facts.logs}",
        "Try:",
        f"  curl {first}",
        f"  curl -T picture.png {first}",
        f"  curl -F data=@picture.png -F layers=all -H 'Accept: application/x-npz' -o maps.npz {first}",
        "Ctrl-C stops it.",
    ]
    return "\n".join(lines)
