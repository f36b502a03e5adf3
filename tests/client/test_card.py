"""The model card and readiness, over both transports."""

from __future__ import annotations

import dataclasses
import json
import re

import convscope
import numpy as np
import pytest
from convscope import Client, testing

from tests.client.stand_in import CLASSES, StandIn

LAYER = convscope.Layer("conv1", "relu1", (4, 8, 8), (1, 1), (3, 3), (-1, -1), 100, {"float32": 1024})


def test_a_card_has_all_fields_of_the_reply(client: Client):
    card = client.model_card("cifar", "2.0")
    assert card == convscope.ModelCard(
        model="cifar",
        version="2.0",
        description="stands in",
        architecture="somewhere:Network",
        engine="stand-in-1",
        device="cpu",
        classes=tuple(CLASSES),
        input=convscope.Input(3, 32, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        layers=(
            convscope.Layer(
                *("conv1", "relu1", (4, 6, 5), (1, 1), (3, 3), (-1, -1), 448, {"float32": 480, "uint8": 120}),
                *((8, 6, 5), "Conv2d", (3, 3), (1, 1), (1, 1), (1, 1), 2, 4320, 28920),
            ),
            convscope.Layer("conv2", "conv2", (3, 2, 2), None, None, None, 12, {}),
        ),
        parameters=1000,
        training=convscope.Training("pictures", 50, 10, 5, None, 0.75, 1.5, "m", {}),
        limits=convscope.Limits(64, 1000, 2000, 3_000_000),
        multiply_adds=12345,
        edits=("zero", "scale"),
    )


def test_a_card_can_be_written_as_json(client: Client):
    assert json.loads(json.dumps(dataclasses.asdict(client.model_card("cifar"))))["input"]["channels"] == 3


def test_every_field_of_the_contract_is_in_the_card():
    from convscope._wire import convscope_pb2 as wire

    for ours, theirs in [
        (convscope.ModelCard, wire.ModelCard),
        (convscope.Input, wire.Input),
        (convscope.Layer, wire.Layer),
        (convscope.Training, wire.Training),
        (convscope.Limits, wire.Limits),
    ]:
        assert [field.name for field in dataclasses.fields(ours)] == [field.name for field in theirs.DESCRIPTOR.fields]


def test_a_card_cannot_be_changed(client: Client):
    with pytest.raises(dataclasses.FrozenInstanceError):
        client.model_card("cifar").model = "other"  # type: ignore[misc]


def test_a_model_that_responds_is_ready(client: Client, stand_in: StandIn):
    assert client.ready("cifar") is True
    assert stand_in.requests[-1][2].describe


@pytest.mark.parametrize("model", ["full", "died", "failed", "error-draining", "error-internal"])
def test_a_model_that_may_respond_later_is_not_ready(client: Client, model: str):
    assert client.ready(model) is False


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_cannot_be_reached_is_not_ready(scheme: str):
    with Client(f"{scheme}://127.0.0.1:1") as client:
        assert client.ready("cifar") is False


def test_a_model_that_does_not_respond_in_time_is_not_ready(client: Client, stand_in: StandIn):
    stand_in.release.clear()
    try:
        assert client.ready("slow", deadline_s=0.2) is False
    finally:
        stand_in.release.set()


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("missing", convscope.ModelNotFound),
        ("error-unauthorized", convscope.AuthenticationFailed),
        ("stranger", convscope.ProtocolError),
    ],
)
def test_what_waiting_does_not_help_is_raised(client: Client, model: str, error):
    with pytest.raises(error):
        client.ready(model)


def test_layers_are_selected_in_the_order_of_the_forward_pass():
    card = testing.model_card(layers=dict.fromkeys(("conv1", "conv2", "conv3"), (1, 2, 2)))
    for layers, expected in (
        ("conv2", ["conv2"]),
        (["conv3", "conv1", "conv3"], ["conv1", "conv3"]),
        ("all", ["conv1", "conv2", "conv3"]),
        (["conv2", "all"], ["conv1", "conv2", "conv3"]),
        ((), []),
    ):
        assert [layer.name for layer in card.select_layers(layers)] == expected
    with pytest.raises(convscope.UnknownLayer, match="no layer 'conv9'; layers: conv1, conv2, conv3"):
        card.select_layers(["all", "conv9"])


def test_the_receptive_field_of_a_cell():
    layer = dataclasses.replace(LAYER, stride=(2, 4), receptive_field=(5, 7), receptive_field_start=(-2, -3))
    assert layer.has_receptive_field
    assert layer.receptive_field_box(0, 0) == (-2, -3, 3, 4)
    assert layer.receptive_field_box(3, 2) == (4, 5, 9, 12)
    top, left, bottom, right = layer.receptive_field_box(np.arange(3), np.arange(2))
    assert [array.tolist() for array in (top, left, bottom, right)] == [[-2, 0, 2], [-3, 1], [3, 5, 7], [4, 8]]


@pytest.mark.parametrize("missing", ["stride", "receptive_field", "receptive_field_start"])
def test_an_unknown_receptive_field_is_an_error(missing: str):
    layer = dataclasses.replace(LAYER, **{missing: None})
    assert not layer.has_receptive_field
    with pytest.raises(ValueError, match="does not state the receptive field of layer 'conv1'"):
        layer.receptive_field_box(0, 0)


@pytest.mark.parametrize(
    ("height", "reply_bytes", "expected"),
    [(32, 0, 64), (32, 1000, 64), (32, 10**6, 9), (32, 10**8, 1), (None, 0, 64), (None, 1000, 1)],
)
def test_how_many_pictures_fit_into_a_request(height: int | None, reply_bytes: int, expected: int):
    card = testing.model_card(classes=["cat", "dog"])
    limits = dataclasses.replace(card.limits, max_images=64, max_reply_bytes=10**7)
    card = dataclasses.replace(card, limits=limits, input=dataclasses.replace(card.input, height=height))
    assert card.pictures_per_request(reply_bytes) == expected
    card = dataclasses.replace(card, limits=dataclasses.replace(limits, max_images=1))
    assert card.pictures_per_request(reply_bytes) == 1


def test_a_card_and_a_timing_show_themselves_in_a_notebook_without_markup_of_strangers(client: Client):
    card = dataclasses.replace(client.model_card("cifar"), description="<i>cat</i>")
    html = card._repr_html_()
    assert html.startswith("<pre>model ")
    assert "conv1  Conv2d" in html
    assert "&lt;i&gt;cat" in html
    assert "<i>" not in html
    timing = client.predict(b"cat", model="cifar", timing=True).timing
    assert timing is not None
    assert re.search("\nforward +4.00\n", timing._repr_html_())
