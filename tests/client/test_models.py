"""The list of models: "model not found" names what there is, over both transports."""

from __future__ import annotations

import asyncio
import json
import pickle
import re

import convscope
import pytest
from convscope import AsyncClient, Client, ModelNotFound, ServedModel
from convscope.testing import FakeTransport

from tests.client.stand_in import StandIn
from tests.client.test_cli import run

MODELS = [ServedModel("cifar", "1.0"), ServedModel("cifar", "0.9"), ServedModel("died", "1.0")]


def test_the_client_lists_names_and_versions(client: Client, url: str, stand_in: StandIn):
    async def ask() -> list[ServedModel]:
        async with AsyncClient(url) as other:
            return await other.models(request_id="ticket-7")

    assert client.models() == asyncio.run(ask()) == MODELS
    assert stand_in.request_ids[-1] == "ticket-7"


def test_a_model_that_is_not_there_has_the_models_that_are(
    capsys: pytest.CaptureFixture[str], client: Client, url: str, monkeypatch: pytest.MonkeyPatch
):
    from tests.client import stand_in

    status, kind, _, grpc_status, _ = stand_in.MISHAPS["old"]
    words = "Model version: 9 (models: cifar/1.0, cifar/0.9, died/1.0) does not exist for model: old"
    monkeypatch.setitem(stand_in.MISHAPS, "old", (status, kind, words, grpc_status, words))
    with pytest.raises(ModelNotFound, match=re.escape(words)) as caught:
        client.predict(b"cat", model="old", version="9")
    assert caught.value.models == MODELS
    assert pickle.loads(pickle.dumps(caught.value)).models == MODELS
    status, _, err = run(capsys, "card", "old", "--version", "9", "--url", url)
    assert status == 1
    assert err.startswith(f"convscope: model_not_found: {words}")


def test_a_server_that_does_not_list_its_models_is_no_empty_list(client: Client, monkeypatch: pytest.MonkeyPatch):
    from tests.client import stand_in

    with pytest.raises(ModelNotFound) as caught:
        client.predict(b"cat", model="missing")
    assert caught.value.models is None
    monkeypatch.setitem(stand_in.MISHAPS, "-", stand_in.MISHAPS["missing"])
    with pytest.raises(convscope.ProtocolError, match="does not list its models"):
        client.models()


def test_a_fake_server_can_list_models():
    transport = FakeTransport(ModelNotFound("no", models=MODELS))
    with Client("http://fake", transport=transport) as client:
        assert client.models() == MODELS


def test_the_command_shows_each_with_its_card_or_why_there_is_none(capsys: pytest.CaptureFixture[str], url: str):
    status, out, err = run(capsys, "models", "--url", url, "--retries", "0")
    assert (status, err) == (0, "")
    header, *rows = (re.split("  +", line) for line in out.splitlines())
    assert header == ["model", "version", "input", "classes", "layers", "description"]
    assert rows[:2] == [["cifar", version, "32×32", "10", "2", "stands in"] for version in ("1.0", "0.9")]
    assert rows[2][:2] == ["died", "1.0"]
    assert rows[2][2].startswith("not ready: internal: Worker died.")
    _, out, _ = run(capsys, "models", "--url", url, "--retries", "0", "--json")
    cifar, _, died = json.loads(out)["models"]
    assert (cifar["model"], cifar["version"], cifar["layers"], cifar["error"]) == (
        "cifar",
        "1.0",
        ["conv1", "conv2"],
        None,
    )
    assert died["error"]["code"] == "internal"
