"""Connections that the server closed, or whose responses are ambiguous, are closed in time."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import convscope
import pytest

from tests.client.stand_in import StandIn
from tests.client.wire import BOTH, HEAD, listening, outcomes, reply, run, send, take

MANY = 12


@BOTH
@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 408 Timeout\r\ncontent-length: 0\r\n\r\n"], ids=["closed", "408"])
def test_idle_connections_that_the_server_closed_are_closed_at_the_next_call(kind: type, says: bytes):
    """Else they stay in CLOSE_WAIT, a file descriptor each, while a single one serves the calls."""
    together = threading.Barrier(MANY)
    idle = threading.Event()
    ended, closed = threading.Semaphore(0), threading.Semaphore(0)
    connections: list[Any] = []

    def serve(connection: socket.socket) -> None:
        connections.append(connection)
        take(connection)
        together.wait(30)
        send(connection, reply())
        while not select.select([connection], [], [], 0.01)[0]:
            if idle.is_set():
                connection.sendall(says)
                connection.shutdown(socket.SHUT_WR)
                ended.release()
                connection.settimeout(60)
                with suppress(ConnectionResetError):  # The client has closed its end, perhaps before it read all.
                    assert connection.recv(65536) == b""
                closed.release()
                return
        while take(connection):
            send(connection, reply())

    async def work(predict: Callable[..., Awaitable[Any]]) -> None:
        await asyncio.gather(*(predict(b"cat") for _ in range(MANY)))
        await predict(b"cat")
        idle.set()
        for _ in range(MANY - 1):
            assert await asyncio.to_thread(ended.acquire, timeout=20)
        assert (await predict(b"cat")).top
        for _ in range(MANY - 1):
            assert await asyncio.to_thread(closed.acquire, timeout=20)

    with listening(serve) as where:
        run(kind, f"http://{where}", work)
    assert len(connections) == MANY


@BOTH
@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3,
    ],
)
def test_interim_responses_are_skipped(kind: type, interim: bytes):
    def serve(connection: socket.socket) -> None:
        for _ in range(2):
            take(connection)
            connection.sendall(interim)
            send(connection, reply())

    with listening(serve) as where:
        assert all(result.top for result in outcomes(kind, f"http://{where}", 2))


@BOTH
@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\ncontent-length: 3\r\n\r\nabc",
        b"HTTP/1.1 100 Continue\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ],
)
def test_an_interim_response_with_a_body_is_a_protocol_error(kind: type, interim: bytes):
    connections: list[Any] = []

    def serve(connection: socket.socket) -> None:
        connections.append(connection)
        take(connection)
        connection.sendall(interim)
        send(connection, reply())
        connection.recv(1)

    with listening(serve) as where:
        result = outcomes(kind, f"http://{where}", 2)
    assert all(isinstance(error, convscope.ProtocolError) for error in result)
    assert len(connections) == 2


@BOTH
def test_a_response_after_its_deadline_is_not_returned_for_another_request(kind: type):
    """The call that gave up takes its connection with it."""
    late = threading.Event()
    connections: list[Any] = []

    def serve(connection: socket.socket) -> None:
        connections.append(connection)
        number = len(connections)
        take(connection)
        if number == 1:
            late.wait(30)
        body = reply().replace(b"a class", b"late cl" if number == 1 else b"a class")
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)

    async def work(predict: Callable[..., Awaitable[Any]]) -> None:
        with pytest.raises(convscope.DeadlineExceeded):
            await predict(b"cat", deadline_s=0.3)
        late.set()
        await asyncio.sleep(0.1)
        assert (await predict(b"cat")).top[0].label == "a class"

    with listening(serve) as where:
        run(kind, f"http://{where}", work)
    assert len(connections) == 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the sockets of this process off /proc")
def test_grpc_gives_up_a_connection_on_which_nothing_is_acknowledged(stand_in: StandIn) -> None:
    port = int(stand_in.grpc_url.rpartition(":")[2])
    with convscope.Client(stand_in.grpc_url) as client:
        assert client.ready("cifar")
        assert [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for one in sockets_to(port)] == [20_000]


def sockets_to(port: int) -> Iterator[socket.socket]:
    """Yield duplicates of this process's TCP sockets that are connected to a port."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as found:
                    if found.type == socket.SOCK_STREAM and found.getpeername()[1:2] == (port,):
                        yield found
