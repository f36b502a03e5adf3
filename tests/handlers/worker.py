"""A worker's life: answer, and perhaps be killed. It runs without prometheus_client too."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.api.limits import Limits
from handlers.loading import assemble
from handlers.network import archive
from handlers.network.engines.choice import choose
from handlers.ops.telemetry import Telemetry
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.pictures import colours, png

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
IDENTITY = Identity("cifar", "1.0", "torch-test", "cpu")


def telemetry(layers: tuple[str, ...], classes: tuple[str, ...]) -> Telemetry:
    return Telemetry.of(IDENTITY, layers, classes, Settings.from_environment().metrics_dir)


def metered(network: torch.nn.Module | None = None, classes: tuple[str, ...] | None = None, **kwargs: Any) -> Pipeline:
    """Make a service that keeps metrics where `PROMETHEUS_MULTIPROC_DIR` says."""
    from handlers.networks.cifar import Cifar
    from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service

    classes = classes or CIFAR_CLASSES
    kwargs["telemetry"] = telemetry(tuple(kwargs.get("layers") or (network or Cifar).layers), classes)
    return make_service(network or Cifar, CIFAR_INPUT, classes, **kwargs)


def main() -> None:
    """Answer as many requests as the last argument but one says; if the last is `killed`, die answering more.

    The network is that of an archive, in ONNX Runtime: to import torch takes longer than all that is asked of it.
    """
    count, ending = int(sys.argv[-2]), sys.argv[-1]
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(ROOT / "model_store/cifar.mar").extractall(folder)
        cifar = archive.load(Path(folder))
        engine = choose(cifar, sys.exit, device="cpu", wanted="onnxruntime", threads=1, precision="float32")
    counted = telemetry(tuple(cifar.layers), cifar.classes)
    service = assemble(cifar, IDENTITY, Limits(), sys.exit, engine, telemetry=counted)
    service.telemetry.loaded(0.5)
    message = wire.PredictRequest(pictures=[png(colours())], layers=["conv1"]).SerializeToString()

    def ask() -> None:
        [response] = service.respond([{"request": bytearray(message)}], [{}], ["the request"])
        assert not wire.PredictReply.FromString(response.body).HasField("error")

    for _ in range(count):
        ask()
    if ending == "killed":
        service.predictor.run = lambda jobs: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        ask()
    print("answered", count)
