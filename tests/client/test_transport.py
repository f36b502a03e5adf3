"""Opening transports: URLs, keys, certificates, proxies."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client

from tests.client.stand_in import StandIn, serve
from tests.client.wire import certificate_files, listening, outcomes, take


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8080", "must begin with"),
        ("ftp://localhost", "must begin with"),
        ("http://", "contain a host"),
        ("", "must begin with"),
        ("grpc://localhost", "grpc://host:port"),
        ("grpc://localhost:7070/path", "without the path"),
        ("http://key@localhost", "api_key"),
        ("http://localhost?key=1", "api_key"),
        ("http://localhost:99999", "[Pp]ort"),
        ("grpc://localhost:port", "[Pp]ort"),
    ],
)
def test_a_url_that_cannot_be_used_says_why(url: str, words: str):
    with pytest.raises(ValueError, match=words):
        Client(url)


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel", "secret ", " secret", "\tsecret"])
def test_a_key_that_cannot_be_a_header_is_rejected_without_being_shown(key: str):
    with pytest.raises(ValueError, match="api_key") as caught:
        Client("http://localhost:8080", api_key=key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"url": None}, {"url": b"http://localhost"}, {"api_key": 5}])
def test_what_is_not_a_str_is_a_type_error(arguments: dict[str, Any]):
    with pytest.raises(TypeError, match=r"must be a str"):
        Client(**{"url": "http://localhost:8080", **arguments})


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("proxy", ["socks5://me:secret@p:1", "ftp://me:secret@p", "http://me:secret@p:port", "http://"])
@pytest.mark.parametrize(("name", "url"), [("http", "http://a.example"), ("all", "https://a.example")])
def test_a_proxy_that_cannot_be_used_is_named_and_not_shown(
    kind: type, proxy: str, name: str, url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(f"{name}_proxy", proxy)
    with pytest.raises(ValueError, match=rf"{name}_proxy/{name.upper()}_PROXY must be http://host:port") as caught:
        kind(url)
    assert "secret" not in "".join(traceback.format_exception(caught.value))
    assert kind("http://localhost:1")  # Which needs no proxy.


def test_the_key_goes_out_with_every_request(url: str, stand_in: StandIn):
    with Client(url, api_key="open-sesame") as client:
        client.predict(b"cat", model="cifar")
        client.model_card("cifar")
        assert "open-sesame" not in repr(client)
    assert stand_in.keys == ["open-sesame", "open-sesame"]


def test_without_a_key_none_goes_out(client: Client, stand_in: StandIn):
    client.predict(b"cat", model="cifar")
    assert stand_in.keys == [None]


def test_a_slash_behind_the_port_changes_nothing(url: str):
    with Client(url + "/") as client:
        assert client.predict(b"cat", model="cifar").model == "cifar"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("path", ["/predictions/cifar", "/below/", "//"])
def test_a_url_with_a_path_is_rejected_with_what_is_wrong(kind: type, url: str, path: str):
    with pytest.raises(ValueError, match=f"without the path '{path}': the model and its version are separate"):
        kind(url + path)


@pytest.fixture(scope="module")
def secure() -> Iterator[tuple[StandIn, Path]]:
    certificate, key = certificate_files("DNS:localhost,DNS:elsewhere.invalid")
    with serve((str(certificate), str(key))) as stand_in:
        yield stand_in, certificate


@pytest.mark.parametrize("transport", ["rest_url", "grpc_url"])
def test_a_certificate_that_is_trusted_is_spoken_to_over_tls(secure: tuple[StandIn, Path], transport: str):
    stand_in, certificate = secure
    with Client(getattr(stand_in, transport), ca_file=certificate) as client:
        assert client.predict(b"cat", model="cifar").top


@pytest.mark.parametrize("transport", ["rest_url", "grpc_url"])
def test_a_certificate_that_is_not_trusted_is_a_connect_error(secure: tuple[StandIn, Path], transport: str):
    with (
        Client(getattr(secure[0], transport)) as client,
        pytest.raises(convscope.ConnectError, match=r"(?i)certificate"),
    ):
        client.predict(b"cat", model="cifar")


def test_certificates_without_tls_are_rejected(tmp_path: Path):
    for url in ("http://localhost:8080", "grpc://localhost:7070"):
        with pytest.raises(ValueError, match="ca_file"):
            Client(url, ca_file=tmp_path / "ca.pem")
    for url in ("https://localhost:8080", "grpcs://localhost:7070"):
        with pytest.raises(FileNotFoundError):
            Client(url, ca_file=tmp_path / "ca.pem")


def test_this_machine_is_reached_without_the_proxies_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Client(url) as client:
        assert client.predict(b"cat", model="cifar").top


@pytest.mark.parametrize("url", ["http://elsewhere.invalid:80", "grpc://elsewhere.invalid:80"])
def test_other_machines_are_reached_through_the_proxies_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Client(url) as client, pytest.raises(convscope.ConnectError, match=r"127\.0\.0\.1|refused"):
        client.predict(b"cat", model="cifar")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("environment", "url", "proxied"),
    [
        ({"http_proxy": "http://PROXY"}, "http://a.invalid/", True),
        ({"http_proxy": "PROXY"}, "http://a.invalid/", True),
        ({"http_proxy": "http://PROXY"}, "https://a.invalid/", False),
        ({"https_proxy": "http://PROXY"}, "https://a.invalid:8443/", True),
        ({"all_proxy": "http://PROXY"}, "https://a.invalid/", True),
        ({"all_proxy": "http://PROXY", "no_proxy": "b.invalid,.a.invalid"}, "http://x.a.invalid:80/", False),
        ({"all_proxy": "http://PROXY", "no_proxy": "*"}, "http://a.invalid/", False),
        *(
            ({"all_proxy": "http://PROXY"}, f"http://{host}:1", False)
            for host in ("localhost", "a.localhost", "127.0.0.1", "127.3.2.1", "[::1]")
        ),
        *(({"all_proxy": "http://PROXY"}, f"http://{host}", True) for host in ("localhost.example", "10.0.0.1")),
    ],
)
def test_the_environment_names_the_proxy(
    kind: type, environment: dict[str, str], url: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
):
    received = []

    def refuse(connection: socket.socket) -> None:
        received.append(take(connection).split(b"\r\n")[0])
        connection.sendall(b"HTTP/1.1 502 No\r\ncontent-length: 0\r\n\r\n")

    with listening(refuse) as where:
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("PROXY", where))
        [error] = outcomes(kind, url, 1)
    assert isinstance(error, convscope.Overloaded if proxied and url.startswith("http:") else convscope.ConnectError)
    assert len(received) == proxied
