"""A service in this process, and ways to ask it as each transport does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing
from handlers.loading import assemble
from handlers.network.archive import Archive
from handlers.outputs.response import Identity, Response
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REQUEST_ID = "26b2c1a8-9b8a-4f7d-8c61-0d6a3f1d2e10"  # As TorchServe gives one to each request.
CIFAR_INPUT = Preprocessing(3, 32, 32, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


def make_service(
    module: torch.nn.Module, preprocessing: Preprocessing, classes: tuple[str, ...], **kwargs: Any
) -> Pipeline:
    card = {"architecture": "handlers.networks:Any", "description": "", "training": {}}
    layers = kwargs.pop("layers", None) or dict(module.layers)
    has_gradients = kwargs.pop("has_gradients", True)
    archive = Archive(module.eval(), preprocessing, layers, classes, card, has_gradients=has_gradients)
    limits = kwargs.pop("limits", Limits(max_reply_bytes=50_000_000))
    eager = archive.eager(kwargs.pop("device", "cpu"))
    return assemble(archive, Identity("cifar", "1.0", "torch-test", "cpu"), limits, eager, eager, **kwargs)


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
