"""On an NVIDIA GPU: the same scores and maps as on the CPU, in this process and through the server."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from convscope import Client

from handlers.networks.cifar import Cifar
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_message, cells, make_service
from tests.pictures import colours, png
from tests.server.harness import ROOT, Launched, launched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def test_maps_on_the_gpu_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    weights = Cifar().state_dict()
    replies = []
    for device in ("cpu", "cuda:0"):
        network = Cifar()
        network.load_state_dict(weights)
        service = make_service(network, CIFAR_INPUT, CIFAR_CLASSES, device=device)
        message = wire.PredictRequest(pictures=[png(colours(seed)) for seed in range(8)], layers=["all"], top_k=0)
        replies.append(ask_message(service, message))
    for on_cpu, on_gpu in zip(replies[0].results, replies[1].results, strict=True):
        for one, other in zip(on_cpu.maps, on_gpu.maps, strict=True):
            assert np.allclose(cells(one), cells(other), rtol=1e-3, atol=1e-4)


def test_the_server_serves_on_the_gpu_when_asked() -> None:
    work = Path(tempfile.mkdtemp(prefix="gpu-"))

    def ask(server: Launched) -> tuple[str, np.ndarray]:
        with Client(f"http://127.0.0.1:{server.port('REST')}") as client:
            seen = client.predict(ROOT / "samples/cat.png", model="cifar", layers=["conv2"])
            return seen.device, seen.maps["conv2"]

    with launched(ROOT / "model_store", work, "--device", "cuda", "--models", "cifar") as server:
        device, on_gpu = ask(server.await_ready())
    with launched(ROOT / "model_store", work, "--device", "cpu", "--models", "cifar") as server:
        _, on_cpu = ask(server.await_ready())
    shutil.rmtree(work)
    assert device == "cuda:0"
    assert np.allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)
