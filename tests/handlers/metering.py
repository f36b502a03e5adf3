"""What a scrape of the workers' metrics would read."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

WHO = {"model": "cifar", "version": "1.0"}


def scrape(directory: Path) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Read every sample that is not 0: name → its labels without model and version, value."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = dict(sample.labels)
            assert {name: labels.pop(name) for name in WHO} == WHO
            if sample.value:
                found.setdefault(sample.name, []).append((labels, sample.value))
    return found


def value(directory: Path, name: str) -> float:
    """Return the value of a metric without labels of its own, 0 for none."""
    return next((number for labels, number in scrape(directory).get(name, []) if not labels), 0.0)
