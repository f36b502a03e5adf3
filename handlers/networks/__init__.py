"""The networks served here, each one a module of this package, by the names they are served under."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from handlers.networks.cifar import Cifar
from handlers.networks.deep import Deep
from handlers.networks.digits import Digits
from handlers.networks.edges import Edges
from handlers.networks.flat import Flat
from handlers.networks.network import Network
from handlers.networks.simple import Simple

__all__ = ["NETWORKS", "Cifar", "Deep", "Digits", "Edges", "Flat", "Network", "Simple", "architecture"]

NETWORKS: Mapping[str, type[Network]] = MappingProxyType(
    {"edges": Edges, "digits": Digits, "simple": Simple, "cifar": Cifar, "flat": Flat, "deep": Deep}
)


def architecture(network: type[Network]) -> str:
    """Return where a network is imported from, as `module:Class`."""
    return f"{network.__module__}:{network.__qualname__}"
