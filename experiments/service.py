"""The client's service for experiments: a running server, or the archives' own handlers in this process.

In this process a request goes through the steps of a worker (parse, decode, predict, edit, encode), without HTTP and
gRPC. The engine is torch, so an untrained twin is computed exactly like the trained network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from convscope import Client
from torch import nn

from handlers.api.limits import Limits
from handlers.network import archive as archives
from handlers.network.archive import Archive, eager_arguments
from handlers.network.engines.torch_engine import TorchEngine
from handlers.networks import NETWORKS
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire

UNTRAINED = "-untrained"
_LIMITS = Limits(max_reply_bytes=2**28)
_DEADLINE_S = 600.0  # On a busy machine a request with many pictures and edits takes a while.


class InProcess:
    """A transport of the client that hands each request to the pipeline of its model.

    Args:
        pipelines: Pipelines by the name of the model.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline]) -> None:
        self._pipelines = pipelines

    def send(self, request: Any, *, model: str, version: str | None, deadline_s: float) -> Any:
        """Return the reply to a serialized `convscope.v1.PredictRequest`."""
        message = {"request": bytearray(request.SerializeToString())}
        [response] = self._pipelines[model].respond([message], [{}], [request.request_id or "experiment"])
        return wire.PredictReply.FromString(bytes(response.body))

    def close(self) -> None:
        """Do nothing: there is no connection."""


@contextmanager
def client(store: Path, url: str, models: Sequence[str], twins: Mapping[str, nn.Module]) -> Iterator[Client]:
    """Open a client on a running server, or on archives and twins in this process; see `Setting.client`."""
    if url and not twins:
        with Client(url, deadline_s=_DEADLINE_S) as served:
            yield served
        return
    with tempfile.TemporaryDirectory() as folder:
        pipelines = {}
        archives_of = {
            name: unpacked(store / f"{name}.mar", Path(folder) / name) for name in {*models, *map(_of, twins)}
        }
        for name in models:
            pipelines[name] = _pipeline(archives_of[name], archives_of[name].module, name)
        for name, module in twins.items():
            pipelines[name] = _pipeline(archives_of[_of(name)], module, name)
        with Client("http://in-this-process", transport=InProcess(pipelines), deadline_s=_DEADLINE_S) as served:
            yield served


def _of(twin: str) -> str:
    """Return the archive whose card a twin has."""
    return twin.partition("-")[0]


def unpacked(path: Path, folder: Path) -> Archive:
    """Unpack an archive into a folder and read it."""
    with ZipFile(path) as file:
        file.extractall(folder)
    return archives.load(folder)


def trained(store: Path, name: str) -> nn.Module:
    """Return the network of an archive with its weights, in evaluation mode."""
    with tempfile.TemporaryDirectory() as folder:
        return unpacked(store / f"{name}.mar", Path(folder)).module


def first_weights(name: str, seed: int = 0) -> nn.Module:
    """Return a network with the weights that its training begins with, in evaluation mode."""
    torch.manual_seed(seed)
    network = NETWORKS[name]
    return (network() if name == "edges" else network(**{"classes": 10})).eval()


def _pipeline(archive: Archive, module: nn.Module, name: str) -> Pipeline:
    eager = TorchEngine(module, device="cpu", **eager_arguments(archive.card))
    identity = Identity(name, "1.0", f"torch-{torch.__version__}", "cpu")
    return Pipeline(archive, identity, _LIMITS, lambda: eager, eager)
