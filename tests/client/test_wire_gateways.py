"""What gateways answer in place of the service, over HTTP/1.1 and as an HTTP answer to a gRPC call."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import convscope
import pytest
from convscope import Client

from tests.client.wire import BOTH, listening, outcomes, reply, send, take

# Status: the exception, and how often the request is sent when it is all that comes.
STATUSES = {
    302: (convscope.ProtocolError, 1),
    400: (convscope.BadRequest, 1),
    401: (convscope.AuthenticationFailed, 1),
    403: (convscope.AuthenticationFailed, 1),
    404: (convscope.ProtocolError, 1),
    408: (convscope.DeadlineExceeded, 2),
    413: (convscope.ImageTooLarge, 1),
    429: (convscope.Overloaded, 4),
    500: (convscope.ServerError, 1),
    502: (convscope.Overloaded, 4),
    503: (convscope.Overloaded, 4),
    504: (convscope.DeadlineExceeded, 2),
}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Write a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def over_http(status: int, asked: list[int]) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        while take(connection):
            asked.append(status)
            connection.sendall(b"HTTP/1.1 %d as it is\r\ncontent-length: 0\r\n\r\n" % status)

    return serve


def over_grpc(status: int, asked: list[int]) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.sendall(frame(4, 0, 0) + frame(4, 1, 0))  # Settings, and that the client's were read.
        heard = b""
        for stream in range(1, 99, 2):
            while b"a picture" not in heard:
                heard += (data := connection.recv(65536))
                if not data:
                    return
            heard = heard.partition(b"a picture")[2]
            asked.append(status)
            connection.sendall(frame(1, 5, stream, b"\x48\x03%d" % status))  # `:status`, the whole answer.

    return serve


@BOTH
@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize(("status", "error", "sent"), [(status, *means) for status, means in STATUSES.items()])
def test_a_gateways_response_means_the_same_on_both_transports(
    kind: type, scheme: str, status: int, error: type[Exception], sent: int
):
    received: list[int] = []
    serve = (over_http if scheme == "http" else over_grpc)(status, received)
    with listening(serve) as where:
        [result] = outcomes(kind, f"{scheme}://{where}", 1, b"a picture", retries=3, deadline_s=60)
    assert type(result) is error
    assert str(status) in str(result)
    assert len(received) == sent


@BOTH
@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_single_failure_of_a_gateway_is_not_seen_by_the_caller(kind: type, status: int):
    received: list[Any] = []

    def serve(connection: socket.socket) -> None:
        while take(connection):
            received.append(status)
            if len(received) == 1:
                connection.sendall(b"HTTP/1.1 %d as it is\r\ncontent-length: 0\r\n\r\n" % status)
            else:
                send(connection, reply())

    with listening(serve) as where:
        assert outcomes(kind, f"http://{where}", 1, retries=3)[0].top
    assert len(received) == 2


@pytest.mark.parametrize("status", [502, 503])
def test_a_gateway_that_asks_for_more_time_than_there_is_gets_it(status: int):
    received: list[Any] = []

    def serve(connection: socket.socket) -> None:
        received.append(take(connection))
        connection.sendall(b"HTTP/1.1 %d No\r\nretry-after: 60\r\ncontent-length: 0\r\n\r\n" % status)

    with listening(serve) as where:
        [error] = outcomes(Client, f"http://{where}", 1, retries=3, deadline_s=30)
    assert error.retry_after_s == 60
    assert len(received) == 1
