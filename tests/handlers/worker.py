"""A worker's life: answer, and perhaps be killed. It runs without prometheus_client too."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from handlers.networks.cifar import Cifar
from handlers.reply import Identity
from handlers.service import Service
from handlers.telemetry import Telemetry
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_message, make_service
from tests.pictures import colours, png

IDENTITY = Identity("cifar", "1.0", "torch-test", "cpu")


def metered(network: torch.nn.Module | None = None, classes: tuple[str, ...] = CIFAR_CLASSES, **kwargs: Any) -> Service:
    """Make a service that keeps metrics where `PROMETHEUS_MULTIPROC_DIR` says."""
    network = network or Cifar()
    layers = kwargs.get("layers") or network.layers
    return make_service(
        network, CIFAR_INPUT, classes, telemetry=Telemetry.of(IDENTITY, tuple(layers), classes), **kwargs
    )


def main() -> None:
    """Answer as many requests as the last argument but one says; if the last is `killed`, die answering more."""
    count, ending = int(sys.argv[-2]), sys.argv[-1]
    service = metered()
    service._telemetry.loaded(0.5)
    message = wire.PredictRequest(pictures=[png(colours())], layers=["conv1"])
    for _ in range(count):
        assert not ask_message(service, message).HasField("error")
    if ending == "killed":
        service._inference.run = lambda jobs: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        ask_message(service, message)
    print("answered", count)
