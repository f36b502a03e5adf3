"""The archives load where nothing of ours is installed: a stock TorchServe 0.12 with public packages alone."""

import base64
import io
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from archiver.__main__ import main
from archiver.store import STORE
from tests.archiver import stock
from tests.archiver.conftest import NET

OURS = ("convscope", "handlers", "archiver", "training", "server")
UNNEEDED = ("onnxruntime", "prometheus_client", "httpx", "grpc", "matplotlib", "tqdm", "mlxtend", "pytest")
# All archives hold the same handlers (test_archive), and tests/e2e serves all: here one of float16 weights. A worker is
# six processor seconds.
COMMITTED = {f"block{number}": channels for number, channels in enumerate((32, 64, 64, 192, 192, 256, 256), 1)}


@pytest.fixture(scope="module")
def address(stock_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    store = folder / "store"
    store.mkdir()
    shutil.copy(STORE / "deep.mar", store)
    source = folder / "own_net.py"
    source.write_text(NET)
    own = [
        "--arch",
        f"{source}:Net",
        "--name",
        "own",
        "--random-weights",
        "0",
        "--layers",
        "conv1=relu",
        "--size",
        "any",
    ]
    classes = folder / "classes.txt"
    classes.write_text("a\nb\nc\n")
    assert main([*own, "--classes", str(classes), "--store", str(store)]) == 0
    with stock.serve(stock_python, store, folder / "run") as address:
        yield address


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 36), 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_the_environment_has_nothing_of_ours_and_nothing_the_archive_should_not_need(stock_python: Path) -> None:
    assert stock.importable(stock_python, OURS + UNNEEDED) == set()


def test_the_environment_has_the_public_packages(stock_python: Path) -> None:
    modules = {"torch", "torchvision", "ts", "numpy", "PIL", "yaml", "google.protobuf", "safetensors"}
    assert stock.importable(stock_python, sorted(modules)) == modules


def test_a_committed_archive_answers_a_picture_with_classes_and_maps(address: str) -> None:
    headers = {"Content-Type": "image/png", "X-Convscope-Layers": "all"}
    reply = stock.ask(f"{address}/predictions/deep", picture(), headers)
    (result,) = reply["results"]
    check_maps(result["maps"], COMMITTED)
    assert len(result["top"]) == 5
    assert all(score["label"] and 0 <= score["probability"] <= 1 for score in result["top"])


def test_a_users_own_network_answers_a_picture_with_classes_and_maps(address: str) -> None:
    headers = {"Content-Type": "image/png", "X-Convscope-Layers": "conv1"}
    reply = stock.ask(f"{address}/predictions/own", picture(), headers)
    assert reply["model"] == "own"
    (result,) = reply["results"]
    assert sorted(score["label"] for score in result["top"]) == ["a", "b", "c"]
    check_maps(result["maps"], {"conv1": 4})
    assert result["maps"]["conv1"]["shape"] == [4, 36, 40]


@pytest.mark.parametrize("model", ["deep", "own"])
def test_an_explanation_needs_nothing_more(model: str, address: str) -> None:
    headers = {"Content-Type": "image/png"}
    (result,) = stock.ask(f"{address}/explanations/{model}", picture(), headers)["results"]
    assert result["explanation"]["method"] == "grad_cam"
    assert len(base64.b64decode(result["explanation"]["heat"]["data"])) == 4 * math.prod(
        result["explanation"]["heat"]["shape"]
    )


def check_maps(maps: dict, channels: dict[str, int]) -> None:
    assert {name: tensor["shape"][0] for name, tensor in maps.items()} == channels
    for tensor in maps.values():
        assert tensor["dtype"] == "float32"
        assert len(base64.b64decode(tensor["data"])) == 4 * math.prod(tensor["shape"])
