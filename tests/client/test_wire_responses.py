"""Responses of HTTP in every form and cut anywhere, through the public clients and a scripted server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import convscope
import pytest

from tests.client.wire import BOTH, EVERY, HEAD, listening, outcomes, reply, run, take

BODY = reply()


def chunked(body: bytes, sizes: Iterable[int], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    """Write a body in chunks of these sizes, and the rest in one."""
    written, start = b"", 0
    for size in (*sizes, len(body)):
        piece = body[start : start + size]
        written += b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) if piece else b""
        start += size
    return written + b"0%b\r\n%b\r\n" % (extension, trailer)


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
# The response, and whether its connection may be used again.
COMPLETE = {
    "of a length": (HEAD + LENGTH + b"\r\n" + BODY, True),
    "chunked": (CHUNKED + chunked(BODY, [1, 7]), True),
    "with chunk extensions": (CHUNKED + chunked(BODY, [7], extension=b';a=b;c="d"'), True),
    "with trailers": (CHUNKED + chunked(BODY, [], trailer=b"content-type: text/html\r\nx-sum: 1\r\n"), True),
    "after interim responses": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + HEAD + LENGTH + b"\r\n" + BODY,
        True,
    ),
    "without a reason": (HEAD.replace(b" OK", b"") + LENGTH + b"\r\n" + BODY, True),
    "in other cases": (HEAD.replace(b"content-type: a", b"CONTENT-TYPE:A") + LENGTH + b"\r\n" + BODY, True),
    "the last": (HEAD + b"connection: close\r\n" + LENGTH + b"\r\n" + BODY, False),
    "of HTTP/1.0": (HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + LENGTH + b"\r\n" + BODY, False),
    "ended by its connection": (HEAD + b"\r\n" + BODY, False),
}  # fmt: skip
NO_HTTP = {
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\r\n\r\n",
    "version 2": b"HTTP/2.0 200 OK\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n!",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    "a blank in a name": b"HTTP/1.1 200 OK\r\nna me: x\r\n\r\n",
    "a bad chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
}


def in_pieces(response: bytes, cuts: list[int]) -> Callable[[socket.socket], None]:
    """Make a server that sends a response in pieces, then closes the connection."""

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        take(connection)
        for start, end in zip((0, *cuts), (*cuts, len(response)), strict=True):
            connection.sendall(response[start:end])

    return serve


@BOTH
@pytest.mark.parametrize("form", COMPLETE)
def test_a_response_is_the_same_wherever_it_is_cut(kind: type, form: str):
    response, _ = COMPLETE[form]
    cuts = [*range(0, len(response), 9), len(response)]
    servers = iter([in_pieces(response, [cut]) for cut in cuts] + [in_pieces(response, list(range(1, len(response))))])

    with listening(lambda connection: next(servers)(connection)) as where:

        async def work(predict: Callable[..., Awaitable[Any]]) -> list[Any]:
            return [await predict(b"cat") for _ in range(len(cuts) + 1)]

        # A connection is closed behind its response, which a client may find out too late.
        result = run(kind, f"http://{where}", work, retries=3)
    assert [one.top[0].label for one in result] == ["a class"] * (len(cuts) + 1)


@EVERY
@pytest.mark.parametrize("form", COMPLETE)
def test_a_connection_is_used_again_where_it_may_be(kind: type, form: str):
    response, again = COMPLETE[form]
    connections: list[int] = []

    def serve(connection: socket.socket) -> None:
        connections.append(0)
        while take(connection):
            connections[-1] += 1
            connection.sendall(response)
            if not again:
                return

    with listening(serve) as where:
        assert all(result.top for result in outcomes(kind, f"http://{where}", 2))
    assert connections == ([2] if again else [1, 1])


@EVERY
@pytest.mark.parametrize("form", [form for form in COMPLETE if form != "ended by its connection"])
def test_a_response_that_ends_early_is_a_connect_error(kind: type, form: str):
    response, _ = COMPLETE[form]
    cuts = iter(range(0, len(response), 5))
    count = len(range(0, len(response), 5))

    with listening(lambda connection: in_pieces(response[: next(cuts)], [])(connection)) as where:
        result = outcomes(kind, f"http://{where}", count)
    assert [type(error) for error in result] == [convscope.ConnectError] * count


@EVERY
@pytest.mark.parametrize("form", NO_HTTP)
def test_what_is_not_http_is_a_protocol_error(kind: type, form: str):
    with listening(in_pieces(NO_HTTP[form], [])) as where:
        [error] = outcomes(kind, f"http://{where}", 1)
    assert isinstance(error, convscope.ProtocolError)


@BOTH
def test_a_service_is_reached_over_ipv6(kind: type):
    def serve(connection: socket.socket) -> None:
        heads.append(take(connection))
        connection.sendall(COMPLETE["of a length"][0])

    heads: list[bytes] = []
    with listening(serve, family=socket.AF_INET6) as where:
        [result] = outcomes(kind, f"http://{where}", 1)
    assert result.top
    assert f"host: {where}" in heads[0].decode().lower()


@BOTH
@pytest.mark.parametrize("chunk", [False, True])
def test_a_reply_over_the_clients_limit_is_not_read_to_its_end(
    kind: type, chunk: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("convscope._rest.MAX_MESSAGE_BYTES", 1000)

    def serve(connection: socket.socket) -> None:
        take(connection)
        connection.sendall(CHUNKED if chunk else HEAD + b"content-length: 1001\r\n\r\n")
        while chunk:
            connection.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
        connection.recv(100)  # The client closes the connection.

    with listening(serve) as where:
        [error] = outcomes(kind, f"http://{where}", 1)
    assert isinstance(error, convscope.ReplyTooLarge)
    assert "over this client's limit" in str(error)


@pytest.mark.parametrize("before", [0, 1], ids=["a new connection", "a used one"])
def test_a_task_may_be_cancelled_at_any_turn_of_the_loop(before: int):
    """No connection stays open but those that wait for the next request, and the client goes on."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
                writer.write(COMPLETE["of a length"][0])
        except (asyncio.IncompleteReadError, ConnectionError):
            open_now.discard(writer)
            writer.close()

    async def cancelled_after(turns: int, url: str) -> bool:
        async with convscope.AsyncClient(url, retries=0) as client:
            for _ in range(before):
                await client.predict(b"cat", model="cifar")
            task = asyncio.create_task(client.predict(b"cat", model="cifar"))
            for _ in range(turns):
                await asyncio.sleep(0)
            late = not task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert (await client.predict(b"cat", model="cifar")).top
        for _ in range(1000):
            if not open_now:
                return late
            await asyncio.sleep(0.01)
        raise AssertionError(f"cancelled after {turns} turns, a connection stays open")

    async def sweep() -> int:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        turns = 0
        async with server:
            while not await cancelled_after(turns, url):
                turns += 1
        return turns

    open_now: set[asyncio.StreamWriter] = set()
    assert asyncio.run(asyncio.wait_for(sweep(), 120)) > 3  # It was cancelled under way, and more than once.
