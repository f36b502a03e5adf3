"""The public fake transport: applications test themselves without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import convscope
import numpy as np
import pytest
from convscope import AsyncClient, Client, Explanation, Input, Layer, Limits, ModelCard, Overloaded, Training
from convscope.testing import FakeTransport, Request, explanation, model_card, prediction

CAT = prediction({"cat": 0.75, "dog": 0.25}, maps={"conv1": np.arange(24, dtype=np.float32).reshape(2, 3, 4)})
CARD = ModelCard(
    model="cifar",
    version="1.0",
    description="a fake",
    architecture="somewhere:Network",
    engine="fake",
    device="cpu",
    classes=("cat", "dog"),
    input=Input(channels=3, height=32, width=None, mean=(0.5,), std=(0.25,)),
    layers=(
        Layer("conv1", "relu1", (2, 3, 4), (1, 1), (3, 3), (-1, -1), 10, {"float32": 96}, kernel=(3, 3), groups=1),
        Layer("fc", "fc", (2,), None, None, None, 5, {"float32": 8}),
    ),
    parameters=15,
    training=Training("pictures", 50, 10, 5, None, 0.75, 1.5, "a machine", {"torch": "2"}),
    limits=Limits(64, 1000, 2000, 3000),
)


@pytest.fixture(params=[Client, AsyncClient])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A function that calls a method of a client with a fake transport."""

    def call(transport: FakeTransport, method: str, *arguments: Any, retries: int = 0, **options: Any) -> Any:
        if request.param is Client:
            with Client("http://fake", transport=transport, retries=retries) as client:
                result = getattr(client, method)(*arguments, **options)
                return list(result) if method == "predict_many" else result

        async def run() -> Any:
            async with AsyncClient("http://fake", transport=transport, retries=retries) as client:
                result = getattr(client, method)(*arguments, **options)
                return [one async for one in result] if method == "predict_many" else await result

        return asyncio.run(run())

    return call


def test_notes_come_with_predictions_and_explanations(ask: Callable[..., Any]):
    noted = prediction({"cat": 1.0}, notes=("grey to RGB",))
    assert ask(FakeTransport(noted), "predict", b"picture", model="cifar").notes == ("grey to RGB",)
    assert ask(FakeTransport(CAT), "predict", b"picture", model="cifar").notes == ()
    explained = Explanation(noted, method="cam", label="cat", target=0, heat=np.zeros((1, 2, 2), np.float32))
    assert ask(FakeTransport(explained), "explain", b"picture", model="cifar").notes == ("grey to RGB",)


def test_one_prediction_is_the_response_to_every_picture(ask: Callable[..., Any]):
    transport = FakeTransport(CAT)
    result = ask(transport, "predict", b"picture", model="cifar")
    assert [(score.label, round(score.probability, 3)) for score in result.top] == [("cat", 0.75), ("dog", 0.25)]
    np.testing.assert_array_equal(result.maps["conv1"], CAT.maps["conv1"])
    assert (result.model, result.version, result.request_id) == ("cifar", "1.0", transport.requests[0].request_id)
    assert len(ask(FakeTransport(CAT), "predict", [b"one", b"two"], model="cifar")) == 2
    assert len(ask(FakeTransport(CAT), "predict_many", [b"one"] * 5, model="cifar", batch=2)) == 5
    assert transport.closed


@pytest.mark.parametrize(
    ("made", "scores"),
    [(CAT, "softmax"), (prediction(values={"age": 41.0}), "value"), (prediction(maps=CAT.maps), "")],
    ids=["classes", "values", "maps"],
)
def test_a_prediction_says_what_its_numbers_are(ask: Callable[..., Any], made: convscope.Prediction, scores: str):
    assert made.scores == scores
    assert ask(FakeTransport(made), "predict", b"picture", model="cifar").scores == scores


def test_a_function_gets_the_request_and_responds_picture_by_picture(ask: Callable[..., Any]):
    def respond(request: Request) -> Any:
        return [
            prediction(error=convscope.BadImage("no picture")) if file == b"bad" else prediction({file.decode(): 1.0})
            for file in request.pictures
        ]

    transport = FakeTransport(respond)
    good, bad = ask(
        transport,
        "predict",
        [b"good", b"bad"],
        model="cifar",
        version="2",
        layers="conv1",
        top_k=3,
        map_dtype="uint8",
        pool=2,
        channels=[0, 3],
        request_id="order-7",
        deadline_s=5,
    )
    assert good.top[0].label == "good"
    assert isinstance(bad.error, convscope.BadImage)
    [request] = transport.requests
    assert 0 < request.deadline_s <= 5
    expected = {
        **{"method": "predict", "model": "cifar", "version": "2", "pictures": (b"good", b"bad"), "layers": ("conv1",)},
        **{"top_k": 3, "map_dtype": "uint8", "pool": 2, "channels": (0, 3), "request_id": "order-7", "timing": False},
    }
    assert {name: getattr(request, name) for name in expected} == expected


def test_explanations_cards_and_filters_are_answered(ask: Callable[..., Any]):
    heat = np.ones((1, 2, 2), np.float32)
    why = Explanation(CAT, method="grad_cam", layer="conv1", target=1, label="dog", heat=heat, picture=heat)
    transport = FakeTransport(why)
    result = ask(transport, "explain", b"picture", model="cifar", target=1)
    assert (result.method, result.layer, result.target, result.label) == ("grad_cam", "conv1", 1, "dog")
    np.testing.assert_array_equal(result.heat, heat)
    np.testing.assert_array_equal(result.picture, heat)
    assert (transport.requests[0].method, transport.requests[0].explain_method, transport.requests[0].target) == (
        *("explain", "grad_cam"),
        1,
    )
    assert ask(FakeTransport(CARD), "model_card", "cifar") == CARD
    assert ask(FakeTransport(CARD), "ready", "cifar") is True
    kernels = np.ones((2, 3, 3, 3), np.float32)
    transport = FakeTransport(kernels)
    np.testing.assert_array_equal(ask(transport, "filters", "cifar", "conv1"), kernels)
    assert (transport.requests[0].method, transport.requests[0].layers) == ("filters", ("conv1",))


def test_an_explanation_without_a_delta_has_none(ask: Callable[..., Any]):
    result = ask(FakeTransport(explanation(np.ones((1, 2, 2)), label="cat")), "explain", b"picture", model="cifar")
    assert (result.delta, result.target, result.label, result.has_picture) == (None, 0, "cat", False)
    exact = explanation(np.ones((1, 2, 2)), label="cat", delta=0.0, picture=np.zeros((3, 8, 8)))
    result = ask(FakeTransport(exact), "explain", b"picture", model="cifar")
    assert (result.delta, result.has_picture, result.picture.shape) == (0.0, True, (3, 8, 8))


def test_a_card_can_be_made(ask: Callable[..., Any]):
    card = model_card(layers={"conv1": (16, 32, 32), "fc": (10,)}, classes=["cat", "dog"])
    assert ask(FakeTransport(card), "model_card", "fake") == card
    layer = card.layer("conv1")
    assert (layer.shape, layer.bytes, layer.has_receptive_field) == ((16, 32, 32), {"float32": 65536}, False)
    assert (card.parameters, layer.parameters) == (0, 0)
    with pytest.raises(convscope.UnknownLayer, match="fake has no layer 'conv2'; layers: conv1, fc"):
        card.layer("conv2")


def test_the_timing_is_there_if_it_is_requested(ask: Callable[..., Any]):
    timed = prediction({"cat": 1.0})
    timed.timing = convscope.Timing(0.1, 0.2, 0.3, 0.4, 0.5, 1.5, 2, 3.0)
    [result] = ask(FakeTransport(timed), "predict", [b"picture"], model="cifar", timing=True)
    assert (result.timing.forward_s, result.timing.handler_s, result.timing.batch_requests) == (0.4, 1.5, 2)
    assert ask(FakeTransport(CAT), "predict", b"picture", model="cifar", timing=True).timing.batch_requests == 1
    assert ask(FakeTransport(timed), "predict", b"picture", model="cifar").timing is None


@pytest.mark.usefixtures("waits")
def test_errors_are_raised_and_retried_as_a_services_are(ask: Callable[..., Any]):
    responses: list[Any] = [Overloaded("full"), convscope.ConnectError("gone"), CAT]
    transport = FakeTransport(lambda _: responses.pop(0))
    assert ask(transport, "predict", b"picture", model="cifar", retries=2).top
    assert len({request.request_id for request in transport.requests}) == 1
    with pytest.raises(convscope.ModelNotFound, match=r"no such model \(request "):
        ask(FakeTransport(convscope.ModelNotFound("no such model")), "predict", b"picture", model="cifar")
    assert ask(FakeTransport(Overloaded("full")), "ready", "cifar") is False


def test_a_response_of_the_wrong_kind_or_number_is_detected(ask: Callable[..., Any]):
    with pytest.raises(convscope.ProtocolError, match="1 results for 2 pictures"):
        ask(FakeTransport([CAT]), "predict", [b"one", b"two"], model="cifar")
    with pytest.raises(convscope.ProtocolError, match="no model card"):
        ask(FakeTransport(CAT), "model_card", "cifar")
