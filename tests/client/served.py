"""Real networks behind the stand-in's two transports: the client's requests, the handlers' answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from convscope._wire import convscope_pb2 as wire

from handlers.images.preprocessing import Preprocessing
from handlers.networks import Cifar, Edges, Flat
from handlers.pipeline import Pipeline
from tests.client.stand_in import StandIn, serve
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service


@contextmanager
def serving(services: Mapping[str, Pipeline]) -> Iterator[StandIn]:
    """Serve networks by name; `requests` of what is returned lists what they were asked."""

    def take(model: str, version: str, data: bytes, key: str | None) -> wire.PredictReply:
        stand_in.requests.append((model, version, wire.PredictRequest.FromString(data)))
        [response] = services[model].respond([{"request": bytearray(data)}], [{}], ["an-id"])
        return wire.PredictReply.FromString(response.body)

    with serve() as stand_in:
        stand_in.take = take  # type: ignore[method-assign]
        yield stand_in


@pytest.fixture(scope="module")
def cifar() -> Cifar:
    torch.manual_seed(0)
    return Cifar()


@pytest.fixture(scope="module")
def networks(cifar: Cifar) -> Iterator[StandIn]:
    services = {
        "cifar": make_service(cifar, CIFAR_INPUT, CIFAR_CLASSES),
        "flat": make_service(Flat(), CIFAR_INPUT, CIFAR_CLASSES),
        "edges": make_service(Edges, Preprocessing(1, None, None), ()),
    }
    with serving(services) as stand_in:
        yield stand_in


@pytest.fixture(params=["rest", "grpc"])
def address(request: pytest.FixtureRequest, networks: StandIn) -> str:
    return networks.rest_url if request.param == "rest" else networks.grpc_url
