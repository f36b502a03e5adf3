"""REST on the network: responses in pieces, large ones, proxies, and connections that broke."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import convscope
import numpy as np
import pytest
from convscope import AsyncClient, Client
from convscope._wire import convscope_pb2 as wire

from tests.client.stand_in import StandIn
from tests.client.test_async import in_async
from tests.client.test_transport import secure as secure  # A fixture.
from tests.client.wire import BOTH, HEAD, listening, reply, run, send, take, take_request

CELLS = np.arange(3 * 700 * 700, dtype="<f4").reshape(3, 700, 700)


def ask(kind: type, url: str, picture: bytes = b"cat", **settings: Any) -> Any:
    """Ask twice, one after the other, and never again; return the last answer."""

    def question(client: Any) -> Any:
        return client.predict(picture, model="cifar")

    if kind is AsyncClient:

        async def twice(client: Any) -> Any:
            await question(client)
            return await question(client)

        return in_async(url, twice, **settings)
    with Client(url, retries=0, **settings) as client:
        question(client)
        return question(client)


@BOTH
def test_the_head_names_the_host_and_says_no_more_than_it_must(kind: type):
    heads = []

    def serve(connection: socket.socket) -> None:
        for _ in range(2):
            heads.append(take(connection))
            send(connection, reply())

    with listening(serve) as where:
        ask(kind, f"http://{where}/", api_key="open-sesame")
    first, *lines = heads[0].decode().split("\r\n")
    fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert first == "POST /predictions/cifar HTTP/1.1"
    assert fields["host"] == where
    assert set(fields) == {
        *("host", "accept", "content-type", "user-agent", "x-api-key", "content-length", "x-request-id")
    }


@BOTH
@pytest.mark.parametrize("size", [10, 100_000, 9_000_000])
def test_pictures_of_any_size_arrive_whole(kind: type, size: int, stand_in: StandIn):
    picture = np.random.default_rng(size).bytes(size)
    ask(kind, stand_in.rest_url, picture)
    assert [list(request.pictures) for *_, request in stand_in.requests] == [[picture]] * 2
    assert len(stand_in.connections) == (1 if size < 2**23 else 2)  # A large upload has a connection of its own.


@BOTH
@pytest.mark.parametrize("chunked", [False, True])
def test_a_reply_of_megabytes_arrives_whole(kind: type, chunked: bool):
    body = reply(CELLS)

    def serve(connection: socket.socket) -> None:
        for _ in range(2):
            take(connection)
            if not chunked:
                send(connection, body)
                continue
            connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            for start in range(0, len(body), 70_000):
                piece = body[start : start + 70_000]
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            connection.sendall(b"0\r\n\r\n")

    with listening(serve) as where:
        result = ask(kind, f"http://{where}")
    np.testing.assert_array_equal(result.maps["conv1"], CELLS)


@BOTH
@pytest.mark.parametrize("says_so", [False, True])
def test_a_connection_that_the_server_closed_is_not_used_again(kind: type, says_so: bool):
    received = []

    def serve(connection: socket.socket) -> None:
        received.append(take(connection))
        send(connection, reply(), b"connection: close\r\n" if says_so else b"")
        connection.shutdown(socket.SHUT_RDWR)
        gone.set()

    gone = threading.Event()
    with listening(serve) as where:
        url = f"http://{where}"
        if kind is Client:
            with Client(url, retries=0) as client:
                for _ in range(3):
                    client.predict(b"cat", model="cifar")
                    assert gone.wait(10)
                    gone.clear()
        else:

            async def thrice(client: Any) -> None:
                for _ in range(3):
                    await client.predict(b"cat", model="cifar")
                    assert await asyncio.to_thread(gone.wait, 10)
                    gone.clear()
                    await asyncio.sleep(0)

            in_async(url, thrice)
    assert len(received) == 3


@BOTH
@pytest.mark.parametrize("proxy", [False, True])
@pytest.mark.parametrize("surplus", ["H", "HTTP/1.1 2", "again"])
def test_surplus_bytes_are_not_the_next_response(
    kind: type, surplus: str, proxy: bool, monkeypatch: pytest.MonkeyPatch
):
    """httpx takes it for that. The next call finds out, and a retry goes over a new connection."""
    received: list[tuple[str, int]] = []

    def serve(connection: socket.socket) -> None:
        while request := take_request(connection):
            received.append(connection.getpeername())
            body = wire.PredictReply(model="cifar", request_id=request.request_id, results=[wire.Result()])
            body.results[0].top.add(label=request.pictures[0].decode())
            response = HEAD + b"content-length: %d\r\n\r\n" % body.ByteSize() + body.SerializeToString()
            connection.sendall(response + (response if surplus == "again" else surplus.encode()))

    async def work(predict: Any) -> list[str]:
        return [(await predict(picture)).top[0].label for picture in (b"one", b"two", b"three")]

    with listening(serve) as where:
        if proxy:
            monkeypatch.setenv("http_proxy", f"http://{where}")
        url = "http://elsewhere.invalid" if proxy else f"http://{where}"
        assert run(kind, url, work, retries=1) == ["one", "two", "three"]
    assert len(set(received)) == 3  # Each connection answered one call.


@pytest.mark.parametrize("tls", [False, True])
def test_closing_a_client_ends_the_waiting_of_its_threads(tls: bool, stand_in: StandIn, secure: tuple[StandIn, Path]):
    running, certificate = secure if tls else (stand_in, None)
    running.requests.clear()
    errors: list[Exception] = []
    client = Client(running.rest_url, ca_file=certificate, deadline_s=60)

    def question() -> None:
        try:
            client.predict(b"cat", model="slow")
        except Exception as error:
            errors.append(error)

    running.release.clear()
    try:
        threads = [threading.Thread(target=question) for _ in range(2)]
        for thread in threads:
            thread.start()
        while sum(len(request.pictures) for *_, request in running.requests) < 2:
            threads[0].join(0.01)
        client.close()
        for thread in threads:
            thread.join(30)  # The server answers only when it is told to.
            assert not thread.is_alive()
    finally:
        running.release.set()
    assert [type(error) for error in errors] == [convscope.ConnectError] * 2
    assert all("client was closed during the call" in str(error) for error in errors)


def test_closing_a_client_ends_a_handshake_of_its_threads():
    text, over = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        assert connection.recv(65536)
        text.set()
        over.wait(60)

    errors: list[Exception] = []

    def question() -> None:
        try:
            client.predict(b"cat", model="cifar")
        except Exception as error:
            errors.append(error)

    with listening(serve) as where:
        client = Client(f"https://{where}", deadline_s=60)
        thread = threading.Thread(target=question)
        thread.start()
        assert text.wait(30)
        client.close()
        thread.join(30)
        over.set()
    assert [type(error) for error in errors] == [convscope.ConnectError]
    assert "client was closed during the call" in str(errors[0])


@BOTH
def test_an_http_proxy_gets_the_whole_url_with_its_password(kind: type, monkeypatch: pytest.MonkeyPatch):
    heads = []

    def serve(connection: socket.socket) -> None:
        for _ in range(2):
            heads.append(take(connection))
            send(connection, reply())

    with listening(serve) as where:
        monkeypatch.setenv("http_proxy", f"http://me:pass%20word@{where}")
        ask(kind, "http://elsewhere.invalid")
    lines = heads[0].decode().lower().split("\r\n")
    assert lines[0] == "post http://elsewhere.invalid/predictions/cifar http/1.1"
    assert "host: elsewhere.invalid" in lines
    known = base64.b64encode(b"me:pass word").decode().lower()
    assert f"proxy-authorization: basic {known}" in lines


@BOTH
@pytest.mark.parametrize("proxy", ["http", "https"])
def test_tls_goes_through_a_proxys_tunnel(
    kind: type, proxy: str, secure: tuple[StandIn, Path], monkeypatch: pytest.MonkeyPatch
):
    stand_in, certificate = secure
    port = stand_in.rest_url.rpartition(":")[2]
    received = []

    def pump(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def serve(connection: socket.socket) -> None:
        if proxy == "https":
            connection = identify(connection, certificate)
        received.append(take(connection).split(b"\r\n")[0])
        with connection, socket.create_connection(("127.0.0.1", int(port))) as beyond:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(beyond, connection), daemon=True)
            back.start()
            pump(connection, beyond)
            back.join(10)

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # Whom to trust as a proxy.
    with listening(serve) as where:
        monkeypatch.setenv("https_proxy", f"{proxy}://{where.replace('127.0.0.1', 'localhost')}")
        assert ask(kind, f"https://elsewhere.invalid:{port}", ca_file=certificate).top
    assert received == [f"CONNECT elsewhere.invalid:{port} HTTP/1.1".encode()]


def identify(connection: socket.socket, certificate: Path) -> ssl.SSLSocket:
    """Speak TLS as a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    return context.wrap_socket(connection, server_side=True)


@BOTH
def test_a_proxy_over_tls_gets_the_whole_url(kind: type, secure: tuple[StandIn, Path], monkeypatch: pytest.MonkeyPatch):
    _, certificate = secure
    heads = []

    def serve(connection: socket.socket) -> None:
        with identify(connection, certificate) as secured:
            for _ in range(2):
                heads.append(take(secured))
                send(secured, reply())

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with listening(serve) as where:
        monkeypatch.setenv("http_proxy", f"https://{where.replace('127.0.0.1', 'localhost')}")
        assert ask(kind, "http://elsewhere.invalid:81").top
    assert [head.split(b"\r\n")[:2] for head in heads] == [
        [b"POST http://elsewhere.invalid:81/predictions/cifar HTTP/1.1", b"Host: elsewhere.invalid:81"]
    ] * 2


@BOTH
@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (b"HTTP/1.1 407 Who are you\r\ncontent-length: 2\r\n\r\nno", convscope.ConnectError, "407 Who are you"),
        (b"HTTP/1.1 200 OK\r\n\r\nsurplus", convscope.ConnectError, "connection to .* failed"),
        (b"SSH-2.0\r\n\r\n", convscope.ProtocolError, "invalid HTTP response"),
        (b"", convscope.ConnectError, "disconnected"),
    ],
)
def test_a_proxy_that_opens_no_way_is_an_error_that_says_so(
    kind: type, said: bytes, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
):
    def serve(connection: socket.socket) -> None:
        take(connection)
        connection.sendall(said)

    with listening(serve) as where:
        monkeypatch.setenv("https_proxy", f"http://me:secret@{where}")
        with pytest.raises(error, match=words) as caught:
            ask(kind, "https://elsewhere.invalid")
    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_asyncio_speaks_tls_and_trusts_whom_it_is_told_to(secure: tuple[StandIn, Path]):
    stand_in, certificate = secure
    assert ask(AsyncClient, stand_in.rest_url, np.random.default_rng(0).bytes(9_000_000), ca_file=certificate).top
    with pytest.raises(convscope.ConnectError, match=r"(?i)certificate"):
        ask(AsyncClient, stand_in.rest_url)


@BOTH
def test_a_host_that_does_not_exist_is_a_connect_error(kind: type):
    with pytest.raises(convscope.ConnectError, match=r"elsewhere\.invalid"):
        ask(kind, "http://elsewhere.invalid:80")


@pytest.mark.parametrize(
    ("scheme", "line"), [("http", b"POST http://2001:db8::1/"), ("https", b"CONNECT 2001:db8::1:443 ")]
)
def test_an_ipv6_address_reaches_a_proxy_without_its_brackets(
    scheme: str, line: bytes, monkeypatch: pytest.MonkeyPatch
):
    """A limitation of httpx that the README states: when this fails, it is gone."""
    received: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        received.append(take(connection))
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    with listening(serve) as where:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://{where}")
        with Client(f"{scheme}://[2001:db8::1]", retries=0) as client, pytest.raises(convscope.ConvscopeError):
            client.predict(b"cat", model="cifar")
    assert received[0].startswith(line), received
