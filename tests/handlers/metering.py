"""A service that keeps metrics, and what a scrape of them would read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from torch import nn

from handlers.networks.cifar import Cifar
from handlers.ops.telemetry import Telemetry
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service

WHO = {"model": "cifar", "version": "1.0"}
IDENTITY = Identity("cifar", "1.0", "torch-test", "cpu")

Samples = list[tuple[dict[str, str], float]]


def metered(network: nn.Module | None = None, classes: tuple[str, ...] = CIFAR_CLASSES, **kwargs: Any) -> Pipeline:
    """Make a service that keeps metrics where `PROMETHEUS_MULTIPROC_DIR` says."""
    layers = tuple(kwargs.get("layers") or (network or Cifar).layers)
    kwargs["telemetry"] = Telemetry.of(IDENTITY, layers, classes, Settings.from_environment())
    return make_service(network or Cifar, CIFAR_INPUT, classes, **kwargs)


def every(directory: Path, name: str) -> Samples:
    """Read every sample of one name: its labels without model and version, value."""
    return _read(directory).get(name, [])


def scrape(directory: Path) -> dict[str, Samples]:
    """Read every sample that is not 0, by name."""
    kept = {name: [(labels, value) for labels, value in samples if value] for name, samples in _read(directory).items()}
    return {name: samples for name, samples in kept.items() if samples}


def value(directory: Path, name: str) -> float:
    """Return the value of a metric without labels of its own, 0 for none."""
    return next((number for labels, number in every(directory, name) if not labels), 0.0)


def _read(directory: Path) -> dict[str, Samples]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
    found: dict[str, Samples] = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = dict(sample.labels)
            assert {name: labels.pop(name) for name in WHO} == WHO
            found.setdefault(sample.name, []).append((labels, sample.value))
    return found
