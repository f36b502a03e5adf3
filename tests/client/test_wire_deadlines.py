"""A deadline bounds a whole call, whatever the peer does; an answer that comes while a request is sent is heard.

No bound here is tight: a call with a deadline of half a second may take ten. Without a bound each would take a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import convscope
import pytest
from convscope import AsyncClient, Client

from tests.client.wire import (
    BOTH,
    EVERY,
    HEAD,
    drain,
    listening,
    outcomes,
    reply,
    run,
    self_signed,
    send,
    serve_tls,
    take,
)
from tests.thorough import variants

DEADLINE_S = 0.5
PATIENCE_S = 10.0
FOR_LONG = 60.0
UPLOAD = bytes(15_000_000)  # More than the buffers on the way hold.
TUNNEL = b"HTTP/1.1 200 OK\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # HTTP/2's first frame, empty.


over = threading.Event()  # The test is: its server may go.


@pytest.fixture(autouse=True)
def begin() -> None:
    over.clear()


def trickle(connection: socket.socket, data: bytes) -> None:
    """Send a byte every 20 ms, for a minute."""
    for byte in data:
        connection.sendall(bytes([byte]))
        if over.wait(0.02):
            return


def nothing(connection: socket.socket) -> None:
    over.wait(FOR_LONG)


def a_head(connection: socket.socket) -> None:
    take(connection)
    trickle(connection, HEAD + b"x-padding: %b\r\n\r\n" % (b"x" * 3000))


def a_body(connection: socket.socket) -> None:
    take(connection)
    connection.sendall(HEAD + b"content-length: 100000\r\n\r\n")
    trickle(connection, bytes(3000))


def chunks(connection: socket.socket) -> None:
    take(connection)
    connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
    trickle(connection, b"1\r\nx\r\n" * 500)


def interim_answers(connection: socket.socket) -> None:
    take(connection)
    trickle(connection, b"HTTP/1.1 102 Processing\r\n\r\n" * 120)


def a_body_without_end(connection: socket.socket) -> None:
    take(connection)
    connection.sendall(HEAD + b"\r\n")
    trickle(connection, bytes(3000))


def a_tls_record(connection: socket.socket) -> None:
    connection.recv(65536)  # The client's part.
    trickle(connection, b"\x16\x03\x03\x40\x00" + bytes(3000))


def a_tunnel(connection: socket.socket) -> None:
    take(connection)
    trickle(connection, b"HTTP/1.1 200 OK\r\nx-padding: %b\r\n\r\n" % (b"x" * 3000))


def nothing_behind_a_tunnel(connection: socket.socket) -> None:
    take(connection)
    connection.sendall(TUNNEL)
    nothing(connection)


def a_tls_record_behind_a_tunnel(connection: socket.socket) -> None:
    take(connection)
    connection.sendall(TUNNEL)
    a_tls_record(connection)


def asked(kind: type, url: str, picture: bytes = b"cat", **settings: Any) -> None:
    """Check that a call that cannot be answered ends by its deadline."""
    began = time.monotonic()
    [result] = outcomes(kind, url, 1, picture, **{"deadline_s": DEADLINE_S, "retries": 3, **settings})
    took_s = time.monotonic() - began
    over.set()
    assert isinstance(result, convscope.DeadlineExceeded), result
    assert took_s < PATIENCE_S


@EVERY
@pytest.mark.parametrize("serve", [nothing, a_head, a_body, chunks, interim_answers, a_body_without_end])
def test_a_server_that_is_slow_to_answer(kind: type, serve: Callable[[Any], None]):
    with listening(serve) as where:
        asked(kind, f"http://{where}")


@BOTH
@pytest.mark.parametrize("serve", [nothing, a_tls_record])
def test_a_server_that_is_slow_to_shake_hands(kind: type, serve: Callable[[Any], None]):
    with listening(serve) as where:
        asked(kind, f"https://{where}")


@BOTH
@pytest.mark.parametrize("serve", [nothing, a_tunnel, nothing_behind_a_tunnel, a_tls_record_behind_a_tunnel])
@pytest.mark.parametrize("proxy", ["http", "https"])
def test_a_proxy_that_is_slow(kind: type, serve: Callable[[Any], None], proxy: str, monkeypatch: pytest.MonkeyPatch):
    certificate, context = self_signed("IP:127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with listening(serve if proxy == "http" else serve_tls(context, serve)) as where:
        monkeypatch.setenv("https_proxy", f"{proxy}://{where}")
        asked(kind, "https://elsewhere.invalid")


@BOTH
def test_a_slow_handshake_behind_an_encrypted_proxy_does_not_respond_to_another_request(
    kind: type, monkeypatch: pytest.MonkeyPatch
):
    """TLS within TLS, whose records come in pieces of a byte."""
    certificate, context = self_signed("DNS:localhost,IP:127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    def serve(connection: ssl.SSLSocket) -> None:
        take(connection)
        connection.sendall(TUNNEL)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        inner = context.wrap_bio(incoming, outgoing, server_side=True)
        with contextlib.suppress(ssl.SSLWantReadError):
            while True:
                incoming.write(connection.recv(65536))
                inner.do_handshake()
                break
        trickle(connection, outgoing.read())

    with listening(serve_tls(context, serve)) as where:
        monkeypatch.setenv("https_proxy", f"https://{where}")
        asked(kind, "https://elsewhere.invalid")


@contextlib.contextmanager
def full(count: int) -> Iterator[list[tuple[str, int]]]:
    """Yield addresses that take no connection, and refuse none: the queues of their sockets are full."""
    with contextlib.ExitStack() as opened:
        port = 0
        addresses: list[tuple[str, int]] = []
        for number in range(count):
            server = opened.enter_context(socket.socket())
            server.bind((f"127.0.0.{number + 2}", port))
            server.listen(0)
            port = server.getsockname()[1]
            addresses.append(server.getsockname())
            for _ in range(3):
                waiting = opened.enter_context(socket.socket())
                waiting.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    waiting.connect(addresses[-1])
        yield addresses


@BOTH
def test_a_host_none_of_whose_addresses_takes_a_connection(kind: type, monkeypatch: pytest.MonkeyPatch):
    with full(4) as addresses:
        look_up = socket.getaddrinfo

        def several(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
            if host not in ("several.invalid", b"several.invalid"):
                return look_up(host, port, *arguments, **options)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", several)
        asked(kind, f"http://several.invalid:{addresses[0][1]}")


@BOTH
def test_a_host_whose_addresses_are_not_found(kind: type, monkeypatch: pytest.MonkeyPatch):
    result = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        result.wait(FOR_LONG)
        raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()

    async def work(predict: Callable[..., Awaitable[Any]]) -> float:
        with pytest.raises(convscope.DeadlineExceeded):
            await predict(b"cat")
        result.set()  # asyncio waits for its threads when a program ends.
        return time.monotonic() - began

    assert run(kind, "http://slow.invalid", work, deadline_s=DEADLINE_S) < PATIENCE_S


@BOTH
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_server_that_takes_a_long_upload_slowly(kind: type, scheme: str):
    """At some 5 MB/s, so that no part of the upload has to wait for as long as the deadline."""

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        if scheme == "grpc":
            connection.sendall(SETTINGS)
        while connection.recv(65536) and not over.wait(0.01):
            pass

    with listening(serve) as where:
        asked(kind, f"{scheme}://{where}", 3 * UPLOAD, deadline_s=1)


@BOTH
def test_a_server_that_takes_a_long_upload_slowly_over_tls(kind: type):
    certificate, context = self_signed("IP:127.0.0.1")

    def serve(connection: ssl.SSLSocket) -> None:
        while connection.recv(16384) and not over.wait(0.002):
            pass

    with listening(serve_tls(context, serve)) as where:
        asked(kind, f"https://{where}", 6 * UPLOAD, deadline_s=2, ca_file=certificate)


@BOTH
@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_a_grpc_server_that_says_nothing(kind: type, scheme: str):
    with listening(nothing) as where:
        asked(kind, f"{scheme}://{where}")


@BOTH
def test_a_client_all_of_whose_connections_are_in_use(kind: type):
    """The hundred and first call waits for one, and no longer than its own deadline."""
    arrived = threading.Semaphore(0)

    def serve(connection: socket.socket) -> None:
        take(connection)
        arrived.release()
        over.wait(FOR_LONG)
        send(connection, reply())

    async def others(predict: Callable[..., Awaitable[Any]]) -> None:
        tasks = [asyncio.create_task(predict(b"cat", deadline_s=120)) for _ in range(100)]
        for _ in tasks:
            while not arrived.acquire(blocking=False):
                await asyncio.sleep(0.01)
        began = time.monotonic()
        with pytest.raises(convscope.DeadlineExceeded):
            await predict(b"cat", deadline_s=DEADLINE_S)
        assert time.monotonic() - began < PATIENCE_S
        over.set()
        assert all(result.top for result in await asyncio.gather(*tasks))

    with listening(serve) as where:
        run(kind, f"http://{where}", others)


def refuse(connection: Any, answer: bytes) -> None:
    """Read a request's head and some of its body, answer, and read no more."""
    data = b""
    while len(data) < 100_000:
        data += connection.recv(65536)
    connection.sendall(answer)


EARLY: dict[str, tuple[Any, ...]] = {
    "413": (b"HTTP/1.1 413 Too large\r\ncontent-length: 0\r\n\r\n", convscope.ImageTooLarge),
    "413, the last": (
        b"HTTP/1.1 413 Too large\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno",
        convscope.ImageTooLarge,
    ),
    "401": (b"HTTP/1.1 401 Who\r\ncontent-length: 0\r\n\r\n", convscope.AuthenticationFailed),
    "503": (b"HTTP/1.1 503 Full\r\ncontent-length: 0\r\n\r\n", convscope.Overloaded),
    "no HTTP": (b"SSH-2.0\r\n\r\n", convscope.ProtocolError),
    "announced": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 413 Too large\r\ncontent-length: 0\r\n\r\n",
        convscope.ImageTooLarge,
    ),
}


@BOTH
@pytest.mark.parametrize("then", ["stays", "half-closes", "closes"])
@pytest.mark.parametrize(
    ("tls", "answer"),
    variants(
        [*((False, name) for name in ("413", "413, the last", "no HTTP", "announced")), (True, "413")],
        [(False, "401"), (False, "503"), (True, "announced")],
    ),
)
def test_an_early_response_ends_the_upload_and_its_connection(kind: type, then: str, tls: bool, answer: str):
    certificate, context = self_signed("IP:127.0.0.1") if tls else (None, None)
    connections: list[Any] = []
    says, *errors = EARLY[answer]
    unheard = tls and then == "stays"  # httpx reads nothing of TLS while it writes.
    if unheard:
        errors = [convscope.DeadlineExceeded]
    if kind is AsyncClient and then == "closes":
        errors.append(convscope.ConnectError)  # asyncio reads no more from a connection reset while it writes.

    def serve(connection: socket.socket) -> None:
        connections.append(connection)
        if len(connections) == 1:
            refuse(connection, says)
            if then == "half-closes":
                connection.shutdown(socket.SHUT_WR)
            if then != "closes":
                over.wait(FOR_LONG)
        else:
            take(connection)
            send(connection, reply())

    async def work(predict: Callable[..., Awaitable[Any]]) -> None:
        with pytest.raises(tuple(errors)):
            await predict(UPLOAD, deadline_s=2 if unheard else 30)
        assert (await predict(b"cat")).top  # Not behind the rest of the upload.
        over.set()

    with listening(serve if context is None else serve_tls(context, serve)) as where:
        settings = {"ca_file": certificate} if tls else {}
        run(kind, f"http{'s' * tls}://{where}", work, deadline_s=30, **settings)
    assert len(connections) == 2


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_server_that_closes_while_it_is_sent_an_upload_is_a_connect_error(kind: type):
    def serve(connection: socket.socket) -> None:
        connection.recv(100_000)

    with listening(serve) as where:
        [error] = outcomes(kind, f"http://{where}", 1, UPLOAD)
    assert isinstance(error, convscope.ConnectError)


@BOTH
def test_session_tickets_are_not_an_early_response(kind: type):
    """TLS 1.3 sends them behind the handshake, so that the socket has something to be read while a request is sent."""
    certificate, context = self_signed("IP:127.0.0.1")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 8

    def serve(connection: ssl.SSLSocket) -> None:
        over.wait(0.5)  # The upload fills the buffers on the way meanwhile.
        drain(connection)
        send(connection, reply())

    with listening(serve_tls(context, serve)) as where:
        [result] = outcomes(kind, f"https://{where}", 1, UPLOAD, ca_file=certificate)
    assert result.top
