"""Names of models, versions and hosts: checked before anything is sent, and the same on every transport."""

from __future__ import annotations

import copy
import pickle
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import convscope
import numpy as np
import pytest
from convscope import Client, Explanation, ModelCard, Prediction

from tests.client.stand_in import StandIn
from tests.client.wire import BOTH, listening, outcomes, reply, run, self_signed, send, take

GOOD = ["a", "7", "cifar", "resnet-50", "A_b.c-D", "1.0", "a..b", "x" * 255]
BAD = [
    *("", ".", "..", "...", "-a", "_a", ".a", " ", " a", "a ", "a b", "a\n", "\na", "a\0", "a\t"),
    *("a/b", "/", "a/", "../a", "a/../b", "a\\b", "%2e%2e", "a%2fb", "a?b", "a#b", "a;b", "a:b", "a@b", "a&b=c", "a+b"),
    *("ü", "modèle", "模型", "a\u202eb", "\ud800", "１", "x" * 256, "x" * 100_000),
]


@BOTH
@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("what", ["model", "version"])
def test_a_name_that_no_model_can_have_is_a_value_error_and_nothing_is_sent(kind: type, scheme: str, what: str):
    connections: list[Any] = []

    async def work(predict: Callable[..., Awaitable[Any]]) -> None:
        for name in BAD:
            with pytest.raises(ValueError, match=f"{what} must be 1 to 255 of A-Z") as caught:
                await predict(b"cat", **{what: name})
            assert len(str(caught.value)) < 500

    with listening(connections.append) as where:
        run(kind, f"{scheme}://{where}", work)
    assert connections == []


@pytest.mark.parametrize("ask", ["model_card", "filters", "ready", "explain", "predict_many"])
@pytest.mark.parametrize(("model", "version"), [("..", "1.0"), ("cifar", "..")])
def test_every_method_checks_names(ask: str, model: str, version: str, url: str, stand_in: StandIn):
    methods: dict[str, Callable[[Client], Any]] = {
        "model_card": lambda client: client.model_card(model, version),
        "filters": lambda client: client.filters(model, "conv1", version),
        "ready": lambda client: client.ready(model, version),
        "explain": lambda client: client.explain(b"cat", model=model, version=version),
        "predict_many": lambda client: list(client.predict_many([b"cat"], model=model, version=version)),
    }
    with Client(url) as client, pytest.raises(ValueError, match="must be 1 to 255 of A-Z"):
        methods[ask](client)
    assert stand_in.requests == []


def test_a_name_that_a_model_can_have_reaches_the_server_as_it_is(url: str, stand_in: StandIn):
    with Client(url) as client:
        for name in GOOD:
            client.predict(b"cat", model=name, version=name)
    assert [request[:2] for request in stand_in.requests] == [(name, name) for name in GOOD]


HOSTS = {
    "straße.example": "xn--strae-oqa.example",
    "FAß.example": "xn--fa-hia.example",
    "bücher.example": "xn--bcher-kva.example",
    "日本語。example": "xn--wgv71a119e.example",
    "βόλος.com": "xn--nxasmm1c.com",
    "xn--strae-oqa.example": "xn--strae-oqa.example",
    "my_service": "my_service",
    "Example.COM.": "example.com.",
    "192.0.2.7": "192.0.2.7",
}


@BOTH
@pytest.mark.parametrize(("host", "ascii_host"), HOSTS.items())
def test_a_host_is_the_one_that_a_browser_would_go_to(
    kind: type, host: str, ascii_host: str, monkeypatch: pytest.MonkeyPatch
):
    heads: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heads.append(take(connection))
        send(connection, reply())

    with listening(serve) as where:
        monkeypatch.setenv("http_proxy", f"http://{where}")
        monkeypatch.setenv("https_proxy", f"http://{where}")
        assert outcomes(kind, f"http://{host}", 1)[0].top
        outcomes(kind, f"https://{host}:8443", 1)
    first, second = (head.decode().split("\r\n") for head in heads)
    assert first[:2] == [f"POST http://{ascii_host}/predictions/cifar HTTP/1.1", f"Host: {ascii_host}"]
    assert second[:2] == [f"CONNECT {ascii_host}:8443 HTTP/1.1", f"Host: {ascii_host}:8443"]


@BOTH
@pytest.mark.parametrize(("named", "good"), [("xn--strae-oqa.example", True), ("strasse.example", False)])
def test_the_certificate_of_an_internationalised_host_is_that_of_its_ascii_name(
    kind: type, named: str, good: bool, monkeypatch: pytest.MonkeyPatch
):
    certificate, context = self_signed(f"DNS:{named}")

    def serve(connection: socket.socket) -> None:
        take(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with context.wrap_socket(connection, server_side=True) as tls:  # The proxy plays the service, too.
            take(tls)
            send(tls, reply())

    with listening(serve) as where:
        monkeypatch.setenv("https_proxy", f"http://{where}")
        [result] = outcomes(kind, "https://straße.example", 1, ca_file=certificate)
    assert result.top if good else "certificate" in str(result)


@pytest.mark.parametrize("host", ["straße.example", "unix", "dns", "xds", "ipv4"])
@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_a_grpc_host_is_the_same_and_never_a_scheme(scheme: str, host: str, monkeypatch: pytest.MonkeyPatch):
    heads: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        heads.append(take(connection))

    with listening(serve) as where:
        monkeypatch.setenv("http_proxy", f"http://{where}")
        [error] = outcomes(Client, f"{scheme}://{host}:7070", 1)
    assert isinstance(error, convscope.ConnectError)
    assert f"{HOSTS.get(host, host)}:7070" in str(error)
    assert {head.split(b"\r\n")[0] for head in heads} == {f"CONNECT {HOSTS.get(host, host)}:7070 HTTP/1.1".encode()}


@BOTH
@pytest.mark.parametrize("host", ["☃.example", "i❤.ws", "\u200d.example", "ü" * 60, "a..ü", "١٢٧.0.0.1"])
def test_a_host_that_idna_does_not_allow_is_a_value_error_that_says_what_is(kind: type, host: str):
    for scheme in ("http", "https", "grpc", "grpcs"):
        with pytest.raises(ValueError, match="xn--"):
            kind(f"{scheme}://{host}:80")


def test_a_proxys_host_is_checked_too_and_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://me:secret@pro xy:1")
    with pytest.raises(ValueError, match="http_proxy/HTTP_PROXY") as caught:
        Client("http://elsewhere.invalid")
    assert "secret" not in str(caught.value)
    assert "pro xy" not in str(caught.value)


@BOTH
@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_client_cannot_be_duplicated_and_says_why(kind: type, scheme: str, duplicate: Callable[[Any], Any]):
    client = kind(f"{scheme}://localhost:1", api_key="open-sesame")
    with pytest.raises(TypeError, match=rf"{kind.__name__} cannot be pickled or copied.*in each process") as caught:
        duplicate(client)
    assert "sesame" not in str(caught.value)


def test_what_a_client_returns_can_be_pickled(url: str):
    with Client(url) as client:
        result, bad = client.predict([b"cat", b"bad"], model="cifar", layers="all", timing=True)
        card = client.model_card("cifar")
        explanation = client.explain(b"cat", model="cifar")
    for thing in (result, card, explanation):
        for again in (pickle.loads(pickle.dumps(thing)), copy.copy(thing), copy.deepcopy(thing)):
            assert type(again) is type(thing)
            if not isinstance(thing, Explanation):
                assert again == thing
    again = pickle.loads(pickle.dumps(result))
    assert isinstance(again, Prediction)
    assert again.top == result.top
    assert again.timing == result.timing
    assert again.request_id == result.request_id
    np.testing.assert_array_equal(again.maps["conv1"], result.maps["conv1"])
    error = pickle.loads(pickle.dumps(bad)).error
    assert (type(error), error.code, str(error)) == (convscope.BadImage, "bad_image", str(bad.error))
    assert isinstance(pickle.loads(pickle.dumps(card)), ModelCard)
    heat = pickle.loads(pickle.dumps(explanation))
    np.testing.assert_array_equal(heat.heat, explanation.heat)
    np.testing.assert_array_equal(heat.picture, explanation.picture)
