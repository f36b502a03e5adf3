"""What must not leave the client: an https request in clear text, a key to another host, a password past its proxy."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import convscope
import pytest
from convscope import Client

from tests.client.wire import BOTH, listening, outcomes, reply, run, self_signed, send, serve_tls, take

KEY = "open-sesame"
PICTURE = b"a picture that nobody else may see"
SECRETS = (KEY.encode(), PICTURE, b"/predictions/")
REFUSALS = {
    "407, empty": b"HTTP/1.1 407 Who\r\ncontent-length: 0\r\n\r\n",
    "503, empty": b"HTTP/1.1 503 No\r\ncontent-length: 0\r\nconnection: keep-alive\r\n\r\n",
    "407, without a length": b"HTTP/1.1 407 Who\r\n\r\n",
    "407, chunked": b"HTTP/1.1 407 Who\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "302": b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\ncontent-length: 0\r\n\r\n",
    "204 after 407": b"HTTP/1.1 407 Who\r\n\r\nHTTP/1.1 204 OK\r\n\r\n",
    "100 and no more": b"HTTP/1.1 100 Continue\r\ncontent-length: 0\r\n\r\n",
    "101": b"HTTP/1.1 101 Switching\r\n\r\n",
    "200 and a clear-text answer": b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "200 and nonsense instead of TLS": b"HTTP/1.1 200 OK\r\n\r\n",
}


class Proxy:
    """A proxy that answers CONNECT as it is told, answers every other request with a forged reply, and takes notes."""

    def __init__(self, says: bytes) -> None:
        self.says = says
        self.heard: list[bytes] = []

    def serve(self, connection: Any) -> None:
        connection.settimeout(10)
        while data := connection.recv(65536):
            self.heard.append(data)
            if data.startswith(b"CONNECT "):
                connection.sendall(self.says)
            elif data.startswith(b"POST "):
                send(connection, reply())
            else:
                connection.sendall(b"nonsense")

    def check(self) -> None:
        """Check that nothing but CONNECT and TLS arrived."""
        assert self.heard
        for data in self.heard:
            assert data.startswith((b"CONNECT ", b"\x16\x03")), data
            assert not any(secret in data for secret in SECRETS)


@BOTH
@pytest.mark.parametrize("says", REFUSALS.values(), ids=REFUSALS)
def test_an_https_request_never_reaches_a_proxy_that_opens_no_tunnel(
    kind: type, says: bytes, monkeypatch: pytest.MonkeyPatch
):
    proxy = Proxy(says)
    with listening(proxy.serve) as where:
        monkeypatch.setenv("https_proxy", f"http://me:secret@{where}")
        settings = {"api_key": KEY, "retries": 2, "deadline_s": 0.5}
        result = outcomes(kind, "https://elsewhere.invalid", 2, PICTURE, **settings)
    assert all(isinstance(error, convscope.TransportError) for error in result)
    proxy.check()


@BOTH
def test_nor_one_that_is_spoken_to_over_tls(kind: type, monkeypatch: pytest.MonkeyPatch):
    certificate, context = self_signed("DNS:localhost")
    proxy = Proxy(b"HTTP/1.1 407 Who\r\ncontent-length: 0\r\n\r\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with listening(serve_tls(context, proxy.serve)) as where:
        monkeypatch.setenv("https_proxy", f"https://me:secret@{where.replace('127.0.0.1', 'localhost')}")
        result = outcomes(kind, "https://elsewhere.invalid", 3, PICTURE, api_key=KEY, retries=2)
    assert all(isinstance(error, convscope.ConnectError) for error in result)
    proxy.check()


def test_a_grpcs_request_never_reaches_a_proxy_that_opens_no_tunnel(monkeypatch: pytest.MonkeyPatch):
    proxy = Proxy(b"HTTP/1.1 407 Who\r\ncontent-length: 0\r\n\r\n")
    with listening(proxy.serve) as where, monkeypatch.context() as environment:
        environment.setenv("https_proxy", f"http://me:secret@{where}")
        result = outcomes(Client, "grpcs://elsewhere.invalid:7070", 2, PICTURE, api_key=KEY, retries=2)
    assert all(isinstance(error, convscope.ConnectError) for error in result)
    proxy.check()


@BOTH
def test_a_proxy_that_responds_after_the_deadline_gets_no_request(kind: type, monkeypatch: pytest.MonkeyPatch):
    heard: list[bytes] = []
    late = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.settimeout(30)
        heard.append(connection.recv(65536))
        assert late.wait(30)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while data := connection.recv(65536):
            heard.append(data)

    async def work(predict: Callable[..., Awaitable[Any]]) -> None:
        with pytest.raises(convscope.DeadlineExceeded):
            await predict(PICTURE, deadline_s=0.3)
        late.set()
        with pytest.raises(convscope.DeadlineExceeded):  # Its own tunnel opens, but nobody speaks TLS there.
            await predict(PICTURE, deadline_s=0.3)

    with listening(serve) as where:
        monkeypatch.setenv("https_proxy", f"http://{where}")
        run(kind, "https://elsewhere.invalid", work, api_key=KEY)
    assert [data for data in heard if not data.startswith((b"CONNECT ", b"\x16\x03"))] == []


@contextmanager
def interrupted_by(kind: signal.Signals) -> Iterator[Callable[[], None]]:
    """Yield what interrupts the main thread, as Ctrl-C would."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    main, before = threading.main_thread().ident, signal.signal(kind, interrupt)
    try:
        yield lambda: signal.pthread_kill(main or 0, kind)
    finally:
        signal.signal(kind, before)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_call_interrupted_in_the_handshake_leaves_no_connection_for_the_next(
    scheme: str, monkeypatch: pytest.MonkeyPatch
):
    certificate, context = self_signed("DNS:localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connection.settimeout(10)
        while data := connection.recv(65536):
            heard.append(data)
            if data.startswith(b"CONNECT "):
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            elif data.startswith(b"\x16\x03"):
                interrupt()
            else:
                send(connection, reply())

    with (
        interrupted_by(signal.SIGUSR1) as interrupt,
        listening(serve_tls(context, serve) if scheme == "https" else serve) as where,
    ):
        monkeypatch.setenv("https_proxy", f"{scheme}://{where.replace('127.0.0.1', 'localhost')}")
        with Client("https://elsewhere.invalid", api_key=KEY) as client:
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    client.predict(PICTURE, model="cifar")
    assert [data[:8] if data.startswith(b"C") else data[:2] for data in heard] == [b"CONNECT ", b"\x16\x03"] * 2


def test_a_task_cancelled_in_the_handshake_leaves_no_connection_for_the_next(monkeypatch: pytest.MonkeyPatch):
    heard: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connection.settimeout(10)
        while data := connection.recv(65536):
            heard.append(data)
            if data.startswith(b"CONNECT "):
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

    async def work(url: str) -> None:
        async with convscope.AsyncClient(url, api_key=KEY) as client:
            for times in (1, 2):
                task = asyncio.create_task(client.predict(PICTURE, model="cifar"))
                while len(heard) < 2 * times:
                    await asyncio.sleep(0.01)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    with listening(serve) as where:
        monkeypatch.setenv("https_proxy", f"http://{where}")
        asyncio.run(asyncio.wait_for(work("https://elsewhere.invalid"), 30))
    assert [data[:8] if data.startswith(b"C") else data[:2] for data in heard] == [b"CONNECT ", b"\x16\x03"] * 2


@BOTH
def test_the_proxys_password_stays_with_the_proxy(kind: type, monkeypatch: pytest.MonkeyPatch):
    certificate, context = self_signed("DNS:elsewhere.invalid")
    connects: list[bytes] = []
    requests: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connects.append(take(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with context.wrap_socket(connection, server_side=True) as tls:  # The proxy plays the service, too.
            for _ in range(2):
                requests.append(take(tls))
                send(tls, reply())

    with listening(serve) as where:
        monkeypatch.setenv("https_proxy", f"http://me:secret@{where}")
        settings = {"api_key": KEY, "ca_file": certificate}
        assert all(result.top for result in outcomes(kind, "https://elsewhere.invalid", 2, **settings))
    known = base64.b64encode(b"me:secret")
    assert [known in head for head in connects] == [True]
    assert not any(KEY.encode() in head for head in connects)
    assert [head.split(b"\r\n")[0] for head in requests] == [b"POST /predictions/cifar HTTP/1.1"] * 2
    assert not any(known in head or b"proxy-" in head.lower() for head in requests)


@BOTH
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(kind: type, status: int):
    received: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        received.append(take(connection))
        connection.sendall(
            b"HTTP/1.1 %d Go\r\nlocation: http://%b/predictions/cifar\r\ncontent-length: 0\r\n\r\n"
            % (status, elsewhere.encode())
        )

    def never(connection: socket.socket) -> None:
        received.append(b"followed")

    with listening(never) as elsewhere, listening(serve) as where:
        [error] = outcomes(kind, f"http://{where}", 1, api_key=KEY, retries=2)
    assert isinstance(error, convscope.ProtocolError)
    assert len(received) == 1


@BOTH
@pytest.mark.parametrize(
    ("names", "host", "good"),
    [
        ("DNS:localhost", "localhost", True),
        ("DNS:localhost", "127.0.0.1", False),
        ("IP:127.0.0.1", "127.0.0.1", True),
        ("IP:127.0.0.1", "localhost", False),
        ("DNS:*.localhost", "localhost", False),
        ("DNS:elsewhere.invalid", "localhost", False),
    ],
)
@pytest.mark.parametrize("proxied", [False, True])
def test_a_certificate_must_name_the_host(
    kind: type, names: str, host: str, good: bool, proxied: bool, monkeypatch: pytest.MonkeyPatch
):
    """The service's own, or that of a proxy, which is asked for a plain http URL."""
    certificate, context = self_signed(names)
    received: list[bytes] = []

    def serve(connection: ssl.SSLSocket) -> None:
        received.append(take(connection))
        send(connection, reply())

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with listening(serve_tls(context, serve)) as where:
        url = f"https://{where.replace('127.0.0.1', host)}"
        if proxied:
            monkeypatch.setenv("http_proxy", url.replace("://", "://me:secret@"))
        [result] = outcomes(kind, "http://elsewhere.invalid" if proxied else url, 1)
    if good:
        assert result.top
    else:
        assert isinstance(result, convscope.ConnectError)
        assert "certificate" in str(result).lower()
        assert received == []


@BOTH
@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("model", name) for name in ("a\r\nx-api-key: b", "a HTTP/1.1\r\n\r\n", "a?b", "a#b")),
        *(("version", name) for name in ("1\r\n\r\n", "1 ", "1?b=c")),
        *(("request_id", name) for name in ("a\r\nb: c", "a b", "é", "")),
    ],
)
def test_what_could_add_a_header_is_a_value_error_and_nothing_is_sent(kind: type, scheme: str, option: str, value: str):
    received: list[Any] = []

    async def work(predict: Callable[..., Awaitable[Any]]) -> None:
        with pytest.raises(ValueError, match=option):
            await predict(PICTURE, **{option: value})

    with listening(received.append) as where:
        run(kind, f"{scheme}://{where}", work)
    assert received == []


@BOTH
@pytest.mark.parametrize(
    "host", ["a b", "a%20b", "a%0d%0ax-evil: 1", "a,b", "a;b", "a\\b", ".a", "a..b", "a" * 64, "a." * 127 + "a"]
)
def test_what_is_no_hosts_name_is_a_value_error(kind: type, host: str):
    for scheme in ("http", "https", "grpc", "grpcs"):
        with pytest.raises(ValueError, match=r"host|IPv"):
            kind(f"{scheme}://{host}:80")
