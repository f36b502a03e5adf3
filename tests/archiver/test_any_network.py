"""Networks of torchvision and timm: archived with the proposed layers, and compared with the network run in torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archiver.__main__ import main
from handlers import loading
from handlers.images.preprocessing import Preprocessing, to_input
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import ask_json, ask_message, ask_rest, cells
from tests.thorough import variants

SIZE = 64

VGG = """
from torch import nn
from torchvision.models.vgg import VGG, make_layers


def vgg(classes):
    network = VGG(make_layers([8, "M", 16, "M", 32, 32, "M", 64, 64, "M"]), init_weights=False)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(64, classes)
    return network
"""

MOBILENET = """
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3


def mobilenet(classes):
    squeezed = InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1)
    expanded = InvertedResidualConfig(16, 5, 48, 24, False, "HS", 2, 1, 1)
    return MobileNetV3([squeezed, expanded], 32, num_classes=classes)
"""

CONVNEXT = """
from torchvision.models.convnext import CNBlockConfig, ConvNeXt


def convnext(classes):
    stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)]
    return ConvNeXt(stages, num_classes=classes)
"""

DOUBTFUL = """
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, maps):
        return self.act(self.two(self.one(maps)) + maps)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.first = Block(4)
        self.pool = nn.MaxPool2d(2)
        self.second = Block(4)
        self.fc = nn.Linear(4, 10)

    def forward(self, images):
        maps = self.first(self.act(self.norm(self.stem(images))))
        if maps.mean() > 0.5:  # What happens next depends on the picture.
            maps = self.pool(maps)
        return self.fc(self.second(maps).mean((2, 3)))
"""


def build_with_random_weights(build, *args, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return build(*args, **kwargs).eval()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes a user's file, and imports it for the test as any user would."""
    names = []

    def write(name: str, source: str):
        path = tmp_path / "mine" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        names.append(name)
        namespace: dict[str, object] = {"__name__": name}
        exec(compile(source, path, "exec"), namespace)
        return path, namespace

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exporter: None):
    """A function that archives a network and returns what was said, and a function that loads it in an engine."""

    def archive(name: str, *arguments: str):
        (tmp_path / "classes.txt").write_text("".join(f"class {number}\n" for number in range(10)))
        options = ["--layers", "auto", "--size", f"{SIZE}x{SIZE}", "--classes", str(tmp_path / "classes.txt")]
        status = main([*arguments, "--name", name, *options, "--store", str(tmp_path)])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        folder = tmp_path / name
        ZipFile(tmp_path / f"{name}.mar").extractall(folder)
        (tmp_path / f"{name}.mar").unlink()
        monkeypatch.syspath_prepend(folder)

        def load(wanted: str) -> Pipeline:
            environment = {"CONVSCOPE_ENGINE": wanted, "CONVSCOPE_MAX_RESPONSE_BYTES": "50000000"}
            return loading.load(
                folder,
                model=name,
                version="1.0",
                config={},
                batch_size=1,
                gpu=None,
                settings=Settings.from_environment(environment),
            )

        return shown.out, load

    return archive


def by_hand(network: nn.Module, modules: Mapping[str, str], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and what some modules made, by public name, from a plain forward pass."""
    maps: dict[str, Tensor] = {}
    for name, module in modules.items():
        part = network.get_submodule(module)
        part.register_forward_hook(lambda _module, _inputs, output, name=name: maps.update({name: output.clone()}))
    with torch.no_grad():
        return network(images)[0], {name: value[0] for name, value in maps.items()}


def assert_serves(
    service: Pipeline, network: nn.Module, modules: Mapping[str, str], preprocessing: Preprocessing, tolerance: float
) -> None:
    """Compare scores, maps and card with the network's own, and ask for each of the other things once."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    picture = _npy(pixels)
    torch.set_num_threads(1)  # As the service has: the number of threads decides on the last bits.
    logits, maps = by_hand(network, modules, torch.from_numpy(to_input([pixels], preprocessing)))
    reply = ask_message(service, wire.PredictRequest(pictures=[picture], layers=["all"], top_k=0))
    assert not reply.HasField("error"), reply.error
    scores = torch.empty(10)
    for score in reply.results[0].top:
        scores[score.index] = score.logit
    assert _difference(scores, logits) <= tolerance
    assert [found.layer for found in reply.results[0].maps] == list(modules)
    for found in reply.results[0].maps:
        assert _difference(torch.tensor(cells(found)), maps[found.layer]) <= tolerance, found.layer

    card = ask_json(service, {"body": b""})
    assert {layer["name"]: layer["shape"] for layer in card["layers"]} == {
        name: list(value.shape) for name, value in maps.items()
    }
    assert all(layer["multiply_adds"] and layer["dense_parameters"] for layer in card["layers"])
    last = list(modules)[-1]
    pooled = ask_message(
        service,
        wire.PredictRequest(
            pictures=[picture],
            layers=[last],
            pool=1,
            map_dtype=wire.FLOAT16,
            channels=wire.ChannelSelection(strongest=2),
        ),
    )
    means = maps[last].mean((1, 2))
    assert list(pooled.results[0].maps[0].channels) == means.argsort(descending=True)[:2].tolist()
    grid = ask_rest(service, {"data": picture, "layers": last}, Accept="image/png")
    assert (grid.status, grid.body[:4]) == (200, b"\x89PNG")


def _npy(pixels: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


VGG_MODULES = {f"conv{number}": f"features.{place}" for number, place in enumerate((1, 4, 7, 9, 12, 14), 1)}
MOBILENET_MODULES = {"conv1": "features.0", "block1": "features.1", "block2": "features.2", "conv2": "features.3"}
CONVNEXT_MODULES = {"conv1": "features.0", "block1": "features.1.0", "conv2": "features.2", "block2": "features.3.0"}
CONVNEXT_MODULES |= {"block3": "features.3.1", "conv3": "features.4", "block4": "features.5.0"}


@pytest.mark.parametrize(
    ("name", "source", "modules"),
    variants(
        [("mobilenet", MOBILENET, MOBILENET_MODULES)],
        [("convnext", CONVNEXT, CONVNEXT_MODULES), ("vgg", VGG, VGG_MODULES)],
    ),
)
def test_a_network_serves_what_it_computes_in_both_engines(
    name: str, source: str, modules: dict[str, str], serve, own
) -> None:
    path, namespace = own(f"own_{name}", source)
    said, load = serve(name, "--arch", f"{path}:{name}", "--arguments", '{"classes": 10}', "--random-weights", "0")
    assert "served by: ONNX Runtime" in said
    for wanted, tolerance in (("torch", 0.0), ("onnxruntime", 1e-5)):
        network = build_with_random_weights(namespace[name], 10)
        for part in network.modules():  # Else a hook sees what an activation after it overwrites.
            if getattr(part, "inplace", False):
                part.inplace = False
        assert_serves(load(wanted), network, modules, Preprocessing(3, SIZE, SIZE), tolerance)


def test_a_network_that_cannot_be_traced_serves_what_it_computes_and_says_why_by_torch_alone(serve, own) -> None:
    path, namespace = own("doubtful", DOUBTFUL)
    said, load = serve("doubtful", "--arch", f"{path}:Net", "--random-weights", "0")
    assert "served by: torch alone: the network cannot be exported" in said
    service = load("torch")
    network = build_with_random_weights(namespace["Net"])
    modules = {"conv1": "act", "block1": "first", "block2": "second"}
    assert_serves(service, network, modules, Preprocessing(3, SIZE, SIZE), 0.0)
    assert ask_json(service, {"body": b""})["layers"][0]["receptive_field"] == []
