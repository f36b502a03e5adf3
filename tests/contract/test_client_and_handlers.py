"""Filters through the client, from the handlers without TorchServe: the same on both transports and both clients."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from convscope import AsyncClient, BadRequest, Client, ProtocolError, UnknownLayer
from convscope._reply import read_filters
from convscope._wire import convscope_pb2 as wire

from tests.client.conftest import clean_environment
from tests.client.served import address, cifar, networks
from tests.client.stand_in import encode_tensor

__all__ = ["address", "cifar", "clean_environment", "networks"]


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
