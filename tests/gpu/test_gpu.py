"""On an NVIDIA GPU: the same scores and maps as on the CPU, in this process and through the server."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convscope import Client

from archiver.trial import noise
from handlers.api.options import Options
from handlers.images.preprocessing import to_input, to_input_on
from handlers.network.engines.cuda_graphs import CudaGraphEngine
from handlers.network.engines.reference import difference
from handlers.network.engines.torch_choice import GPU_TOLERANCE, PRECISIONS, choose_in_torch
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks.cifar import Cifar
from handlers.outputs.maps import FeatureMap, prepare
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


LAYERS = frozenset(Cifar.layers)
# Ways to run a network on a GPU: what is chosen by, what its name ends in, and how far from the CPU's maps it may be.
WAYS = {
    "plain": ({"wanted": "torch"}, "", GPU_TOLERANCE),
    "auto": ({}, "-channels-last-graphs", GPU_TOLERANCE),
    "float16": ({"precision": "float16"}, "-float16-channels-last-graphs", PRECISIONS["float16"][1]),
    "float16, plain": ({"precision": "float16", "wanted": "torch"}, "-float16", PRECISIONS["float16"][1]),
    "bfloat16": ({"precision": "bfloat16"}, "-bfloat16-channels-last-graphs", PRECISIONS["bfloat16"][1]),
}


@pytest.fixture(scope="module")
def on_cpu() -> TorchEngine:
    torch.manual_seed(0)
    return TorchEngine(Cifar(), Cifar.layers, has_scores=True)


def on_gpu(on_cpu: TorchEngine, way: str) -> Any:
    network = Cifar()
    network.load_state_dict(on_cpu.module.state_dict())
    eager = TorchEngine(network, Cifar.layers, has_scores=True, device="cuda:0")
    return choose_in_torch(eager, CIFAR_INPUT, **{"wanted": "auto", "precision": "float32", **WAYS[way][0]})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_maps_of_the_cpu_and_says_its_name(on_cpu: TorchEngine, way: str) -> None:
    engine = on_gpu(on_cpu, way)
    _, name, tolerance = WAYS[way]
    assert engine.name == on_cpu.name + name
    for count in (1, 8, 1, 32):
        images = noise(CIFAR_INPUT, count) * (1 + count / 8)
        scores, maps = engine.forward(images, LAYERS)
        expected_scores, expected = on_cpu.forward(images, LAYERS)
        assert scores is not None
        assert expected_scores is not None
        assert scores.device.type == "cpu"
        assert difference(scores.numpy(), expected_scores.numpy()) <= tolerance
        for layer in LAYERS:
            assert maps[layer].is_cuda
            assert maps[layer].is_contiguous()
            assert difference(maps[layer].cpu().numpy(), expected[layer].numpy()) <= tolerance


@pytest.mark.parametrize("way", WAYS)
def test_no_memory_is_shared_between_two_calls_on_the_gpu(on_cpu: TorchEngine, way: str) -> None:
    engine, images = on_gpu(on_cpu, way), noise(CIFAR_INPUT, 4)
    scores, maps = engine.forward(images, LAYERS)
    kept = {name: values.cpu() for name, values in maps.items()}
    kept_scores = scores.clone()  # type: ignore[union-attr]
    for _ in range(5):
        engine.forward(images * -3, LAYERS)
    assert torch.equal(scores, kept_scores)  # type: ignore[arg-type]
    assert all(torch.equal(maps[name].cpu(), kept[name]) for name in LAYERS)


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    """A branch on the data waits for the GPU, which a recording forbids; the GPU must work afterwards."""

    class Branching(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * 2 if images.sum() > 0 else images

    eager = TorchEngine(Branching(), {}, has_scores=True, device="cuda:0")
    captured = CudaGraphEngine(eager, (3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    for sign, factor in ((1, 2), (-1, 1)):
        scores, _ = captured.forward(images * sign)
        assert torch.equal(scores, images * sign * factor)  # type: ignore[arg-type]
    assert captured.recorded == ()


@pytest.mark.parametrize("options", [{}, {"pool": 1}, {"pool": 3}, {"channels": 2}])
def test_bytes_made_on_the_gpu_are_those_of_the_cpu(on_cpu: TorchEngine, options: dict[str, int]) -> None:
    values = on_cpu.forward(noise(CIFAR_INPUT, 8), LAYERS)[1]["conv2"]
    asked = Options(map_dtype="uint8", **options)  # type: ignore[arg-type]
    for one, other in zip(prepare("conv2", values.cuda(), asked), prepare("conv2", values.numpy(), asked), strict=True):
        assert isinstance(one, FeatureMap)
        assert isinstance(other, FeatureMap)
        assert one.channels == other.channels
        if "pool" not in options:  # Pooling sums in another order there.
            assert np.array_equal(one.cells, other.cells)
            assert np.array_equal(one.scale, other.scale)  # type: ignore[arg-type]
            assert np.array_equal(one.offset, other.offset)  # type: ignore[arg-type]
        assert (np.abs(one.values() - other.values()).max() <= 1.01 * max(one.scale.max(), other.scale.max())).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_maps_of_every_dtype_are_own_memory_of_the_cpu(on_cpu: TorchEngine, dtype: str) -> None:
    values = on_cpu.forward(noise(CIFAR_INPUT, 2), LAYERS)[1]["conv2"].cuda()
    asked = Options(map_dtype=dtype)  # type: ignore[arg-type]
    first = [item for item in prepare("conv2", values, asked) if isinstance(item, FeatureMap)]
    kept = [item.cells.copy() for item in first]
    prepare("conv2", values * -3, asked)
    assert len(first) == 2
    assert all(np.array_equal(item.cells, cells) for item, cells in zip(first, kept, strict=True))


GPU = "cuda:0"


def test_bytes_sent_to_the_gpu_become_there_what_they_become_here(on_cpu: TorchEngine) -> None:
    pictures = [colours(seed) for seed in range(9)]
    found = to_input_on(GPU, pictures, CIFAR_INPUT)
    assert isinstance(found, torch.Tensor)
    assert found.is_cuda
    assert np.array_equal(found.cpu().numpy(), to_input(pictures, CIFAR_INPUT))
    engine = on_gpu(on_cpu, "auto")
    for _ in range(2):  # Recorded, then replayed.
        scores, _ = engine.run(found, LAYERS)
        expected, _ = on_cpu.run(to_input(pictures, CIFAR_INPUT), LAYERS)
        assert np.abs(scores - expected).max() <= GPU_TOLERANCE * np.abs(expected).max()  # type: ignore[operator]
