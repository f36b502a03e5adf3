"""Filters through the client, from the handlers without TorchServe: the same on both transports and both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from convscope import AsyncClient, BadRequest, Client, ProtocolError, UnknownLayer
from convscope._reply import read_filters
from convscope._wire import convscope_pb2 as wire

from handlers.images.preprocessing import Preprocessing
from handlers.networks import Cifar, Edges, Flat
from tests.client.conftest import clean_environment
from tests.client.served import serving
from tests.client.stand_in import StandIn, encode_tensor
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, make_service

__all__ = ["clean_environment"]


@pytest.fixture(scope="module")
def cifar() -> Cifar:
    torch.manual_seed(0)
    return Cifar()


@pytest.fixture(scope="module")
def networks(cifar: Cifar) -> Iterator[StandIn]:
    services = {
        "cifar": make_service(cifar, CIFAR_INPUT, CIFAR_CLASSES),
        "flat": make_service(Flat(), CIFAR_INPUT, CIFAR_CLASSES),
        "edges": make_service(Edges(), Preprocessing(1, None, None), ()),
    }
    with serving(services) as stand_in:
        yield stand_in


@pytest.fixture(params=["rest", "grpc"])
def address(request: pytest.FixtureRequest, networks: StandIn) -> str:
    return networks.rest_url if request.param == "rest" else networks.grpc_url


def test_both_clients_fetch_the_very_weights(address, cifar):
    async def fetch():
        async with AsyncClient(address) as client:
            return await client.filters("cifar", "conv2")

    with Client(address) as client:
        result = client.filters("cifar", "conv2")
    assert np.array_equal(result, cifar.conv2.weight.detach().numpy())
    assert not result.flags.writeable
    assert np.array_equal(result, asyncio.run(fetch()))


def test_what_has_no_filters_is_an_error_with_the_requests_id(address):
    with Client(address) as client:
        with pytest.raises(BadRequest, match="fc1 is not made by a two-dimensional convolution") as caught:
            client.filters("flat", "fc1", request_id="order-7")
        assert caught.value.request_id == "order-7"
        with pytest.raises(UnknownLayer):
            client.filters("cifar", "nose")
        with pytest.raises(TypeError, match="layer must be a str"):
            client.filters("cifar", ["conv1"])
        with pytest.raises(ValueError, match="empty"):
            client.filters("cifar", "")


@pytest.mark.parametrize(
    "reply", [wire.PredictReply(), wire.PredictReply(filters=encode_tensor(np.ones((2, 3), np.float32), 0))]
)
def test_a_reply_without_kernels_breaks_the_contract(reply):
    with pytest.raises(ProtocolError, match="filters"):
        read_filters(reply)
