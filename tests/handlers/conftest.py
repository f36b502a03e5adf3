from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from prometheus_client import values

from handlers.images.preprocessing import Preprocessing
from handlers.networks.cifar import Cifar
from handlers.networks.edges import Edges
from handlers.ops.log import set_up
from handlers.pipeline import Pipeline
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service


@pytest.fixture(autouse=True)
def _own_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's metrics set how the library keeps values in this process; the next test finds it as it was."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)


@pytest.fixture(scope="session")
def network() -> Cifar:
    torch.manual_seed(0)
    return Cifar().eval()


@pytest.fixture(scope="session")
def service(network: Cifar) -> Pipeline:
    return make_service(network, CIFAR_INPUT, CIFAR_CLASSES)


@pytest.fixture(scope="session")
def edges() -> Pipeline:
    return make_service(Edges, Preprocessing(1, None, None), ())


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Log as a worker does, here into memory, and afterwards as before."""
    package = logging.getLogger("handlers")
    before = (package.handlers, package.level, package.propagate)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    set_up("cifar", "1.0")
    yield sys.stdout  # type: ignore[misc]
    package.handlers, package.level, package.propagate = before
