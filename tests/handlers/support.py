"""A service in this process, and ways to ask it as each transport does."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from archiver import packing
from archiver.description import describe
from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing
from handlers.network.archive import DESCRIBED, GRAPH, REFERENCE, WEIGHTS, Archive, eager_arguments
from handlers.network.engines.torch_engine import TorchEngine
from handlers.outputs.response import Identity, Response
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REQUEST_ID = "26b2c1a8-9b8a-4f7d-8c61-0d6a3f1d2e10"  # As TorchServe gives one to each request.
CIFAR_INPUT = Preprocessing(3, 32, 32, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


STORE = Path(__file__).parents[2] / "model_store"
_FOLDERS = tempfile.TemporaryDirectory()  # Of archives, as long as the tests run.


def unpack(model: str, folder: Path) -> Path:
    """Unpack a committed archive into a folder, and return the folder."""
    with zipfile.ZipFile(STORE / f"{model}.mar") as archive:
        archive.extractall(folder)
    return folder


def make_archive(
    module: torch.nn.Module,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    *,
    layers: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    output: str = "",
    has_gradients: bool = True,
    graph: bytes | None = None,
) -> Archive:
    """Return what the archiver would make of a network, unproven."""
    card: dict[str, Any] = {
        "architecture": "handlers.networks:Any",
        "preprocessing": preprocessing.to_dict(),
        "layers": dict(module.layers if layers is None else layers),
        "classes": list(classes),
        "layouts": dict(layouts or {}),
        "output": output,
    }
    if not has_gradients:
        card["no_gradients"] = "said so"
    eager = TorchEngine(module, **eager_arguments(card))
    described, reference = describe(eager, preprocessing, len(classes), has_gradients=has_gradients)
    folder = Path(tempfile.mkdtemp(dir=_FOLDERS.name))
    (folder / WEIGHTS).write_bytes(packing.weights(module.state_dict()))
    save_file(reference, folder / REFERENCE)
    if graph is not None:
        (folder / GRAPH).write_bytes(graph)
    return Archive({**card, DESCRIBED: described}, folder)


def make_service(
    module: torch.nn.Module | type[torch.nn.Module],
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    **kwargs: Any,
) -> Pipeline:
    """Return a service of a network, in torch; the arguments are those of `make_archive`, of `Pipeline` and of
    `Settings`.

    Of a class, one network with random weights serves whoever asks: to draw up its card takes longer than a test.
    """
    own = {name: kwargs.pop(name) for name in ("layers", "layouts", "output", "has_gradients") if name in kwargs}
    limits = kwargs.pop("limits", Limits(max_reply_bytes=50_000_000))
    settings = Settings(**{name: kwargs.pop(name) for name in vars(Settings()) if name in kwargs})
    device = kwargs.pop("device", "cpu")
    if isinstance(module, type):
        archive, eager = _made(module, preprocessing, classes, frozenset(own.items()))
    else:
        archive = make_archive(module, preprocessing, classes, **own)
        eager = TorchEngine(module, **eager_arguments(archive.card), device=device)
    identity = Identity("cifar", "1.0", "torch-test", device)
    return Pipeline(archive, identity, limits, lambda: eager, eager, settings, **kwargs)


@cache
def _made(
    kind: type[torch.nn.Module], preprocessing: Preprocessing, classes: tuple[str, ...], own: frozenset[tuple[str, Any]]
) -> tuple[Archive, TorchEngine]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind().eval()
    archive = make_archive(module, preprocessing, classes, **dict(own))
    return archive, TorchEngine(module, **eager_arguments(archive.card))


def ask_message(service: Pipeline, message: wire.PredictRequest) -> wire.PredictReply:
    """Ask as gRPC does."""
    [answer] = service.respond([{"request": bytearray(message.SerializeToString())}], [{}], [REQUEST_ID])
    return wire.PredictReply.FromString(answer.body)


def ask_rest(service: Pipeline, row: dict[str, Any], **headers: str) -> Response:
    """Ask as REST does, header names written with underscores; a body that is a list or an object is sent as JSON."""
    if isinstance(row.get("body"), dict | list):
        row = {**row, "body": json.dumps(row["body"]).encode()}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    [answer] = service.respond([row], [{"Host": "localhost", **named}], [REQUEST_ID])
    return answer


def ask_json(service: Pipeline, row: dict[str, Any], **headers: str) -> dict[str, Any]:
    values = json.loads(ask_rest(service, row, **headers).body)
    assert isinstance(values, dict)
    return values


def cells(feature_map: wire.FeatureMap) -> np.ndarray[Any, Any]:
    tensor = feature_map.tensor
    dtype = wire.Dtype.Name(tensor.dtype).lower()
    return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))
