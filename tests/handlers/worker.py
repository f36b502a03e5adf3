"""A worker's life: answer, and perhaps be killed. It runs without prometheus_client too."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from handlers.networks.cifar import Cifar
from handlers.ops.telemetry import Telemetry
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_message, make_service
from tests.pictures import colours, png

IDENTITY = Identity("cifar", "1.0", "torch-test", "cpu")


def metered(
    network: torch.nn.Module | None = None, classes: tuple[str, ...] = CIFAR_CLASSES, **kwargs: Any
) -> Pipeline:
    """Make a service that keeps metrics where `PROMETHEUS_MULTIPROC_DIR` says."""
    network = network or Cifar()
    layers = kwargs.get("layers") or network.layers
    return make_service(
        network,
        CIFAR_INPUT,
        classes,
        telemetry=Telemetry.of(IDENTITY, tuple(layers), classes, Settings.from_environment().metrics_dir),
        **kwargs,
    )


def main() -> None:
    """Response as many requests as the last argument but one says; if the last is `killed`, die answering more."""
    count, ending = int(sys.argv[-2]), sys.argv[-1]
    service = metered()
    service.telemetry.loaded(0.5)
    message = wire.PredictRequest(pictures=[png(colours())], layers=["conv1"])
    for _ in range(count):
        assert not ask_message(service, message).HasField("error")
    if ending == "killed":
        service.predictor.run = lambda jobs: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        ask_message(service, message)
    print("answered", count)
