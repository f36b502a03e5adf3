"""Edits: what is sent, what comes back, and what is refused before anything is sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import AsyncClient, BadImage, Change, ClassScore, Client, Edit, ProtocolError
from convscope.testing import FakeTransport, prediction

from tests.client.stand_in import StandIn

ZERO = Edit(layer="conv1", operation="zero")
CHANGE = Change(
    [ClassScore(1, "dog", 0.25, 1.5), ClassScore(0, "cat", -0.25, -1.0)], {"conv1": np.ones((2, 2, 2), np.float32)}
)


def sent(client: Client, transport: FakeTransport, *edits: Any, **options: Any) -> tuple[Edit, ...]:
    client.predict(b"cat", model="cifar", edits=edits, **options)
    return transport.requests[-1].edits


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport(prediction({"dog": 0.6, "cat": 0.4}, change=CHANGE))


@pytest.fixture
def fake(transport: FakeTransport) -> Client:
    return Client("http://fake", transport=transport)


def test_every_field_is_sent(fake: Client, transport: FakeTransport) -> None:
    edits = (
        Edit(layer="conv1", operation="scale", value=0.5, channels=[3, 5], region=(0, 1, 2, 3)),
        Edit(layer="conv2", operation="clamp", value=(-1.0, 1.0), channels={"except": [2]}, box=(0.0, 0.5, 8.0, 9.0)),
        Edit(layer="conv2", operation="patch", value=0.0, picture=0),
        ZERO,
    )
    assert sent(fake, transport, *edits, compare=True) == edits
    assert transport.requests[-1].compare
    as_dicts = [{name: getattr(edit, name) for name in Edit.__dataclass_fields__} for edit in edits]
    assert sent(fake, transport, *as_dicts) == edits
    assert sent(fake, transport, *json.loads(json.dumps(as_dicts))) == edits
    numbers = Edit(layer="a", operation="add", value=np.float32(0.5), channels=np.array([1, 2]), region=np.arange(4))  # type: ignore[arg-type]
    assert sent(fake, transport, numbers)[0] == Edit(
        layer="a", operation="add", value=0.5, channels=[1, 2], region=(0, 1, 2, 3)
    )


def test_the_change_comes_back(fake: Client, tmp_path: Path) -> None:
    result = fake.predict(b"cat", model="cifar", edits=[ZERO], compare=True)
    assert result.change == CHANGE
    assert result != prediction({"dog": 0.6, "cat": 0.4})
    manifest = json.loads((result.save(tmp_path / "saved") / "manifest.json").read_text())
    assert [score["logit"] for score in manifest["change"]["scores"]] == [1.5, -1.0]
    with np.load(tmp_path / "saved" / manifest["change"]["maps"]) as arrays:
        assert np.array_equal(arrays["conv1"], CHANGE.maps["conv1"])


def test_there_is_none_unless_asked_for(client: Client) -> None:
    assert client.predict(b"cat", model="cifar").change is None
    with pytest.raises(BadImage):
        client.predict([b"bad"], model="cifar")[0].change  # noqa: B018


def test_many_and_async(fake: Client, transport: FakeTransport) -> None:
    assert [one.change for one in fake.predict_many([b"a", b"b"], model="cifar", edits=[ZERO], batch=2)] == [CHANGE] * 2

    async def ask() -> Any:
        async with AsyncClient("http://fake", transport=transport) as client:
            many = [one async for one in client.predict_many([b"a"], model="cifar", edits=[ZERO])]
            return [await client.predict(b"cat", model="cifar", edits=[ZERO], compare=True), *many]

    assert [one.change for one in asyncio.run(ask())] == [CHANGE] * 2
    assert [request.edits for request in transport.requests] == [(ZERO,)] * 3


def test_a_service_too_old_for_edits_is_detected(client: Client) -> None:
    """It skips the fields that it does not know, and would answer as if nothing had been edited."""
    with pytest.raises(ProtocolError, match="does not support edits"):
        client.predict(b"cat", model="older", edits=[ZERO])
    [many] = client.predict_many([b"cat"], model="older", edits=[ZERO])
    assert isinstance(many.error, ProtocolError)


@pytest.mark.parametrize(
    ("edits", "error", "words"),
    [
        (ZERO, TypeError, "edits must be a list of Edit or dict"),
        ({"layer": "a"}, TypeError, "edits must be a list of Edit or dict"),
        (["zero"], TypeError, r"edits\[0\] must be an Edit or a dict, not 'zero'"),
        ([ZERO, {"layer": "a"}], TypeError, r"edits\[1\]: layer and operation are required"),
        ([{"layer": "a", "operation": "zero", "channel": 1}], TypeError, "unknown field 'channel'; fields: layer"),
        ([{"layer": 1, "operation": "zero"}], TypeError, "layer must be a str"),
        ([{"layer": "a", "operation": "zero", "channels": []}], ValueError, "at least one channel"),
        ([{"layer": "a", "operation": "zero", "channels": "some"}], TypeError, "channels must be a sequence"),
        ([{"layer": "a", "operation": "zero", "channels": [-1]}], ValueError, "channels must be at least 0"),
        ([{"layer": "a", "operation": "zero", "channels": {"but": [1]}}], ValueError, "channels must be indexes"),
        ([{"layer": "a", "operation": "scale", "value": "2"}], TypeError, "value must be a sequence"),
        ([{"layer": "a", "operation": "scale", "value": True}], TypeError, "value must be a number"),
        ([{"layer": "a", "operation": "scale", "value": float("nan")}], ValueError, "value must be finite"),
        ([{"layer": "a", "operation": "scale", "value": 10**400}], ValueError, "value is too large"),
        ([{"layer": "a", "operation": "zero", "region": 3}], TypeError, "region must be a sequence"),
        ([{"layer": "a", "operation": "zero", "region": []}], ValueError, "region must be top, left, bottom and right"),
        ([{"layer": "a", "operation": "zero", "box": (0, 1)}], ValueError, "box must be top, left, bottom and right"),
        ([{"layer": "a", "operation": "zero", "region": (0, 0, 1.5, 1)}], TypeError, "region must be an int"),
        ([{"layer": "a", "operation": "zero", "box": (0, 0, None, 1)}], TypeError, "box must be a number"),
        ([{"layer": "a", "operation": "zero", "picture": -1}], ValueError, "picture must be at least 0"),
    ],
)
def test_what_is_no_edit_is_rejected(client: Client, stand_in: StandIn, edits: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        client.predict(b"cat", model="cifar", edits=edits)
    assert stand_in.requests == []


def test_options_that_do_not_fit_are_rejected(client: Client, stand_in: StandIn) -> None:
    with pytest.raises(ValueError, match="pass at least one in edits"):
        client.predict(b"cat", model="cifar", compare=True)
    with pytest.raises(TypeError, match="compare must be True or False"):
        client.predict(b"cat", model="cifar", edits=[ZERO], compare=1)  # type: ignore[call-overload]
    for edit in (Edit(layer="a", operation="patch", value=0), Edit(layer="a", operation="zero", picture=0)):
        with pytest.raises(ValueError, match="use predict"):
            client.predict_many([b"cat"], model="cifar", edits=[edit])
    for option in ({"edits": [ZERO]}, {"compare": True}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            client.explain(b"cat", model="cifar", **option)
    assert stand_in.requests == []
