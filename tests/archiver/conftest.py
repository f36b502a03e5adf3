"""Networks and checkpoints small enough to archive in every test."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from archiver import graph
from archiver.__main__ import main
from archiver.contents import Contents, from_checkpoint
from archiver.graph import with_engine
from handlers.images.preprocessing import Preprocessing
from handlers.networks import NETWORKS, architecture
from tests.archiver import stock

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, classes)

    def forward(self, images):
        return self.fc(self.relu(self.conv(images)).mean((2, 3)))
"""


@pytest.fixture(autouse=True)
def _no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build archives without a graph, as where its packages are missing: exporting takes seconds."""
    monkeypatch.setattr(graph, "missing_packages", lambda: ["onnx"])


@pytest.fixture(scope="session")
def _one_registry() -> Iterator[None]:
    """Read onnxscript's 500 functions once: torch does for every export, which takes longer than a small network's."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def exporter(_one_registry: None, _no_exporter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export where that is installed."""
    monkeypatch.setattr(graph, "missing_packages", list)


@pytest.fixture(scope="session")
def exported(_one_registry: None, checkpoint: Callable[..., Path]) -> Callable[..., Contents]:
    """A function that returns the contents of an archive of `simple` with a graph, made once."""

    @cache
    def make(*, half: bool = False) -> Contents:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "missing_packages", list)
            return with_engine(from_checkpoint(checkpoint("simple"), "1.0", half=half), "onnx")[0]

    return make


@pytest.fixture(scope="session")
def own_archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive of a user's network in a file, without classes, with weights from seed 3."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_net.py").write_text(NET)
    options = ["--name", "own", "--layers", "conv1=relu", "--size", "16x16", "--random-weights", "3"]
    assert main(["--arch", f"{folder}/own_net.py:Net", *options, "--engine", "torch", "--store", str(folder)]) == 0
    return (folder / "own.mar").read_bytes()


@pytest.fixture(scope="session")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the public packages alone."""
    return stock.environment(tmp_path_factory.mktemp("stock") / "venv")


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    """A user's network in a file of its own, far from the repository."""
    path = tmp_path / "elsewhere" / "own_net.py"
    path.parent.mkdir()
    path.write_text(NET)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes what training.train would, with weights from seed 0."""

    def write(model: str = "simple", /, **changes: object) -> Path:
        network = NETWORKS[model]
        channels, height, width = network.pictures
        classes = [] if model == "edges" else [f"class {index}" for index in range(10)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = network()
        content = {
            "format": 1,
            "model": model,
            "architecture": architecture(network),
            "arguments": {},
            "layers": dict(network.layers),
            "classes": classes,
            "preprocessing": Preprocessing(channels, height, width).to_dict(),
            "description": network.description,
            "state_dict": module.state_dict(),
            "training": {"data": "none", "epochs": 0, "seed": 0, "seconds": 0.0, "history": [{"epoch": 1}]},
            "optimizer": {"state": {}, "param_groups": []},
        }
        path = tmp_path_factory.mktemp(model) / "checkpoint.pt"
        torch.save(content | changes, path)
        return path

    return write
