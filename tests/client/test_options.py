"""Options out of range are refused before anything is sent, in words that name them."""

from __future__ import annotations

import numpy as np
import pytest
from convscope import Client
from convscope._request import build_request
from convscope._wire import convscope_pb2 as wire

from tests.client.stand_in import StandIn


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"map_dtype": "float64"}, ValueError, "map_dtype must be one of float32, float16, uint8"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"top_k": 2**40}, ValueError, "top_k is too large"),
        ({"top_k": 2.5}, TypeError, "top_k must be a whole number"),
        ({"top_k": True}, TypeError, "top_k must be a whole number"),
        ({"pool": 0}, ValueError, "pool must be at least 1"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"channels": []}, ValueError, "channels must name at least one channel"),
        ({"channels": [-1]}, ValueError, "channels must be at least 0"),
        ({"channels": ["1"]}, TypeError, "channels must be a whole number"),
    ],
)
def test_an_option_out_of_range_is_refused(client: Client, stand_in: StandIn, options, error, words: str):
    with pytest.raises(error, match=words):
        client.predict(b"cat", model="cifar", **options)
    assert stand_in.requests == []


def test_numbers_of_numpy_are_numbers():
    request = build_request([b"cat"], top_k=np.int64(3), pool=np.uint8(2), channels=np.array([2, 0]))
    assert (request.top_k, request.pool, list(request.channels.indexes)) == (3, 2, [2, 0])


def test_one_layer_may_be_named_without_a_list():
    assert list(build_request([b"cat"], layers="conv1").layers) == ["conv1"]
    assert list(build_request([b"cat"], layers=("conv2", "conv1")).layers) == ["conv2", "conv1"]


def test_what_is_not_asked_for_is_not_sent():
    request = build_request([b"cat"])
    assert not request.HasField("pool")
    assert not request.HasField("channels")
    assert request.map_dtype == wire.FLOAT32
    assert not request.describe
