"""The model card and readiness, over both transports."""

from __future__ import annotations

import dataclasses
import json

import convscope
import pytest
from convscope import Client

from tests.client.stand_in import CLASSES, StandIn


def test_a_card_says_all_that_the_service_said(client: Client):
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


def test_a_model_that_answers_is_ready(client: Client, stand_in: StandIn):
    assert client.ready("cifar") is True
    assert stand_in.requests[-1][2].describe


@pytest.mark.parametrize("model", ["full", "died", "failed", "error-draining", "error-internal"])
def test_a_model_that_may_answer_later_is_not_ready(client: Client, model: str):
    assert client.ready(model) is False


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_cannot_be_reached_is_not_ready(scheme: str):
    with Client(f"{scheme}://127.0.0.1:1") as client:
        assert client.ready("cifar") is False


def test_a_model_that_does_not_answer_in_time_is_not_ready(client: Client, stand_in: StandIn):
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
