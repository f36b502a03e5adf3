"""Options out of range are refused before anything is sent, in words that name them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from convscope import Client
from convscope.testing import FakeTransport, Request, prediction

from tests.client.stand_in import StandIn


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"map_dtype": "float64"}, ValueError, "map_dtype must be one of float32, float16, uint8"),
        ({"map_dtype": ["uint8"]}, ValueError, "map_dtype must be one of float32, float16, uint8"),
        ({"layers": None}, TypeError, "layers must be names, one name, or 'all', not None"),
        ({"layers": 5}, TypeError, "layers must be names, one name, or 'all', not 5"),
        ({"layers": [1]}, TypeError, r"layers must be names, one name, or 'all', not \[1\]"),
        ({"version": 1}, TypeError, "version must be a str, not 1"),
        ({"model": 5}, TypeError, "model must be a str, not 5"),
        ({"model": ""}, ValueError, "model must be 1 to 255 of"),
        ({"deadline_s": "3"}, TypeError, "deadline_s must be a number of seconds"),
        ({"deadline_s": True}, TypeError, "deadline_s must be a number of seconds"),
        ({"deadline_s": float("nan")}, ValueError, "deadline_s must be above 0 and at most 86400 seconds"),
        ({"deadline_s": 1e10}, ValueError, "deadline_s must be above 0 and at most 86400 seconds"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0"),
        ({"top_k": 2**40}, ValueError, "top_k must be at most 4294967295, not"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int, not"),
        ({"top_k": True}, TypeError, "top_k must be an int, not"),
        ({"top_k": 1.0}, TypeError, "top_k must be an int, not"),
        ({"pool": 0}, ValueError, "pool must be at least 1"),
        ({"pool": True}, TypeError, "pool must be an int, not"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"channels": []}, ValueError, "channels must name at least one channel"),
        ({"channels": [-1]}, ValueError, "channels must be at least 0"),
        ({"channels": ["1"]}, TypeError, "channels must be an int, not"),
        ({"channels": True}, TypeError, "channels must be"),
        ({"channels": [True]}, TypeError, "channels must be an int, not"),
        ({"timing": 0}, TypeError, "timing must be"),
    ],
)
def test_an_option_out_of_range_is_rejected(client: Client, stand_in: StandIn, options, error, words: str):
    for pictures in (b"cat", []):
        with pytest.raises(error, match=words):
            client.predict(pictures, **{"model": "cifar", **options})
    assert stand_in.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layer": 5}, "layer must be a str or None, not 5"), ({"method": None}, "method must be a str, not None")],
)
def test_an_explain_option_of_the_wrong_type_is_named(client: Client, stand_in: StandIn, options, message: str):
    with pytest.raises(TypeError, match=message):
        client.explain(b"cat", model="cifar", **options)
    assert stand_in.requests == []


@pytest.mark.parametrize(
    ("method", "option"),
    [("predict", "layer"), ("explain", "layers"), ("explain", "pool"), ("predict_many", "request_id")],
)
def test_an_unknown_option_is_a_type_error(client: Client, stand_in: StandIn, method: str, option: str):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        getattr(client, method)([b"cat"], model="cifar", **{option: "a"})
    assert stand_in.requests == []


@pytest.mark.parametrize("deadline_s", [np.float32(5), np.int64(5), 86_400])
def test_a_deadline_may_be_any_number_up_to_a_day(client: Client, deadline_s):
    assert client.predict(b"cat", model="cifar", deadline_s=deadline_s).top


def sent(**options: Any) -> Request:
    """Return the request that `predict` makes of its options."""
    transport = FakeTransport(prediction())
    with Client("http://fake", transport=transport) as client:
        client.predict(b"cat", model="cifar", **options)
    return transport.requests[0]


def test_numbers_of_numpy_are_numbers():
    request = sent(top_k=np.int64(3), pool=np.uint8(2), channels=np.array([2, 0]))
    assert (request.top_k, request.pool, request.channels) == (3, 2, (2, 0))


def test_layers_are_one_name_or_several_taken_as_they_come():
    assert sent(layers="conv1").layers == ("conv1",)
    assert sent(layers=("conv2", "conv1")).layers == ("conv2", "conv1")
    names = iter(["conv1", "conv2"])
    assert sent(layers=names).layers == ("conv1", "conv2")
    assert sent(layers=names).layers == ()


def test_what_is_not_requested_is_not_sent():
    request = sent()
    assert (request.method, request.map_dtype, request.pool, request.channels) == ("predict", "float32", None, None)
