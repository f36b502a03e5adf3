"""One id from the caller over the wire to the reply, and in every exception of the call."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client

from tests.client.stand_in import StandIn
from tests.client.test_async import in_async
from tests.client.test_retries import ask as ask_without_waiting

MADE = re.compile("[0-9a-f]{32}")


def ask(kind: type, url: str, question: Any) -> Any:
    """Ask a question with a client that asks once."""
    if kind is AsyncClient:
        return in_async(url, question)
    with Client(url, retries=0) as client:
        return question(client)


BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])


@BOTH
def test_every_request_has_an_id_of_its_own_and_the_prediction_tells_it(kind: type, url: str, stand_in: StandIn):
    result = [ask(kind, url, lambda client: client.predict(b"cat", model="cifar")) for _ in range(2)]
    ids = [prediction.request_id for prediction in result]
    assert all(MADE.fullmatch(request_id) for request_id in ids)
    assert len(set(ids)) == 2
    assert ids == stand_in.request_ids == [request.request_id for *_, request in stand_in.requests]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_processes_make_ids_of_their_own_even_if_one_is_the_others_copy_or_seeds_its_random_numbers():
    program = (
        "import os, random\n"
        "random.seed(0)\n"
        "from convscope._request import validate_or_create_request_id\n"
        "validate_or_create_request_id(None)\n"
        "child = os.fork()\n"
        "os.write(1, f'{validate_or_create_request_id(None)}\\n'.encode())\n"
        "child and os.waitpid(child, 0)\n"
    )
    runs = [subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True) for _ in range(2)]
    ids = b"".join(run.stdout for run in runs).decode().split()
    assert len(set(ids)) == 4
    assert all(MADE.fullmatch(made) for made in ids)


@BOTH
def test_the_callers_own_id_travels(kind: type, url: str, stand_in: StandIn):
    result = ask(kind, url, lambda client: client.predict([b"cat", b"dog"], model="cifar", request_id="order-7_b.2"))
    assert [prediction.request_id for prediction in result] == ["order-7_b.2"] * 2
    ask(kind, url, lambda client: client.model_card("cifar", request_id="card"))
    ask(kind, url, lambda client: client.ready("cifar", request_id="ready"))
    assert stand_in.request_ids == ["order-7_b.2", "card", "ready"]
    assert [request.request_id for *_, request in stand_in.requests] == stand_in.request_ids


@pytest.mark.parametrize("request_id", ["", "a" * 65, "two words", "line\n", "ü", "a/b"])
def test_an_invalid_id_is_rejected_before_anything_is_sent(client: Client, stand_in: StandIn, request_id: str):
    for question in (
        lambda: client.predict(b"cat", model="cifar", request_id=request_id),
        lambda: client.predict([], model="cifar", request_id=request_id),
        lambda: client.model_card("cifar", request_id=request_id),
        lambda: client.ready("cifar", request_id=request_id),
    ):
        with pytest.raises(ValueError, match="request_id must be 1 to 64"):
            question()
    assert stand_in.request_ids == []


def test_an_id_of_another_type_is_a_type_error(client: Client):
    with pytest.raises(TypeError, match="request_id must be a str"):
        client.predict(b"cat", model="cifar", request_id=7)  # type: ignore[call-overload]


def test_an_id_may_be_as_long_as_the_contract_says(client: Client):
    assert client.predict(b"cat", model="cifar", request_id="a" * 64).request_id == "a" * 64


@BOTH
def test_a_retry_has_the_id_of_the_first_attempt(kind: type, url: str, stand_in: StandIn):
    stand_in.mishaps[:] = ["full", "reset"]
    result, retries = ask_without_waiting(kind, url)
    assert retries == 2
    assert stand_in.request_ids == [result.request_id] * 3


@BOTH
@pytest.mark.parametrize(
    ("model", "picture", "kind_of_error"),
    [
        ("missing", b"cat", convscope.ModelNotFound),
        ("died", b"cat", convscope.ServerError),
        ("stranger", b"cat", convscope.ProtocolError),
        ("miscounting", b"cat", convscope.ProtocolError),
        ("error-internal", b"cat", convscope.ServerError),
        ("error-novel", b"cat", convscope.RequestRejected),
        ("cifar", b"bad", convscope.BadImage),
    ],
)
def test_an_exception_tells_the_id_of_its_request(kind: type, url: str, model: str, picture: bytes, kind_of_error):
    with pytest.raises(kind_of_error) as caught:
        ask(kind, url, lambda client: client.predict(picture, model=model, request_id="order-7"))
    error = caught.value
    assert error.request_id == "order-7"
    assert str(error) == f"{error.message} (request order-7)"
    assert "order-7" not in error.message
    again = pickle.loads(pickle.dumps(error))
    assert (again.request_id, str(again)) == ("order-7", str(error))


@BOTH
def test_the_exception_of_a_card_or_of_readiness_tells_it_too(kind: type, url: str):
    for question in (
        lambda client: client.model_card("missing", request_id="order-7"),
        lambda client: client.ready("missing", request_id="order-7"),
        lambda client: client.model_card("error-bad_request", request_id="order-7"),
    ):
        with pytest.raises(convscope.ConvscopeError, match=r" \(request order-7\)$"):
            ask(kind, url, question)


def test_an_exception_of_the_wire_tells_it(client: Client, stand_in: StandIn):
    stand_in.release.clear()
    try:
        with pytest.raises(convscope.DeadlineExceeded) as caught:
            client.predict(b"cat", model="slow", deadline_s=0.3)
    finally:
        stand_in.release.set()
    assert stand_in.request_ids == [caught.value.request_id]


def test_a_bad_picture_among_others_tells_the_id_of_their_request(client: Client):
    good, bad = client.predict([b"one", b"bad"], model="cifar")
    assert bad.error.request_id == bad.request_id == good.request_id


@BOTH
def test_each_request_of_a_stream_has_an_id_of_its_own(kind: type, url: str, stand_in: StandIn):
    def blocking(client: Client) -> list[convscope.Prediction]:
        return list(client.predict_many([b"one", b"bad", b"two"], model="cifar", batch=2))

    async def awaited(client: AsyncClient) -> list[convscope.Prediction]:
        return [result async for result in client.predict_many([b"one", b"bad", b"two"], model="cifar", batch=2)]

    result = ask(kind, url, awaited if kind is AsyncClient else blocking)
    assert result[0].request_id == result[1].request_id == result[1].error.request_id
    assert {result[0].request_id, result[2].request_id} == set(stand_in.request_ids)
    assert len(stand_in.request_ids) == 2
    with pytest.raises(TypeError, match="request_id"):
        kind(url).predict_many([], model="cifar", request_id="order-7")


def test_a_request_of_a_stream_that_fails_tells_its_id(client: Client, stand_in: StandIn):
    result = list(client.predict_many([b"one", b"two"], model="missing"))
    assert sorted(prediction.request_id for prediction in result) == sorted(stand_in.request_ids)
    assert all(prediction.error.request_id == prediction.request_id for prediction in result)


def test_the_id_that_the_service_went_by_counts_more_than_the_one_sent(client: Client):
    result, bad = client.predict([b"cat", b"bad"], model="renamed", request_id="order-7")
    assert result.request_id == bad.error.request_id == "from-the-gateway"
    with pytest.raises(convscope.UnknownLayer, match=r"\(request from-the-gateway\)$"):
        client.predict(b"cat", model="renamed", layers="conv7", request_id="order-7")


def test_a_service_that_tells_no_id_leaves_the_one_sent(client: Client):
    assert client.predict(b"cat", model="older", request_id="order-7").request_id == "order-7"


def test_an_exception_of_no_request_has_no_id():
    error = convscope.BadImage("no")
    assert error.request_id is None
    assert str(error) == error.message == "no"


def test_predictions_are_equal_whatever_their_requests(client: Client):
    first = client.predict([b"cat", b"bad"], model="cifar", timing=True)
    assert first == client.predict([b"cat", b"bad"], model="cifar")
