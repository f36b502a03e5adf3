"""The load generator, against servers whose every move is known."""

from __future__ import annotations

import random
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.load import Load, measure, run
from benchmarks.wires import Address, Grpc

Serve = Callable[[socket.socket], None]
Start = Callable[[Serve], Address]

MESSAGE = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\nhi"


def http(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


@pytest.fixture
def start() -> Iterator[Start]:
    listeners = []

    def begin(serve: Serve) -> Address:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            while True:
                try:
                    caller = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=answer, args=(caller,), daemon=True).start()

        def answer(caller: socket.socket) -> None:
            with caller:
                try:
                    serve(caller)
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        address: Address = listener.getsockname()
        return address

    yield begin
    for listener in listeners:
        listener.close()


def echo(reply: bytes, pause_s: float = 0.0) -> Serve:
    def serve(caller: socket.socket) -> None:
        while caller.recv(65536):
            time.sleep(pause_s)
            caller.sendall(reply)

    return serve


def test_a_closed_loop_waits_for_each_reply_and_stops_in_time(start: Start) -> None:
    address = start(echo(http(b"x" * 10), pause_s=0.01))
    outcome = run(Load(address, "REST", MESSAGE, 2, 0.5, size=10))
    assert not outcome.errors
    assert 2 <= len(outcome.latencies) <= 2 * 0.5 / 0.01 + 2
    assert min(outcome.latencies) >= 0.01
    assert outcome.body_bytes == 10 * len(outcome.latencies)


def test_a_reply_in_pieces_is_one_reply(start: Start) -> None:
    reply = http(b"y" * 3_000_000)

    def serve(caller: socket.socket) -> None:
        while caller.recv(65536):
            for at in (slice(0, 20), slice(20, 60), slice(60, None)):
                caller.sendall(reply[at])
                time.sleep(0.005)

    outcome = run(Load(start(serve), "REST", MESSAGE, 1, 0.2, size=3_000_000))
    assert len(outcome.latencies) >= 1
    assert not outcome.errors


def test_a_wrong_size_and_a_wrong_status_are_errors_and_not_latencies(start: Start) -> None:
    short = run(Load(start(echo(http(b"short"), 0.01)), "REST", MESSAGE, 1, 0.1, size=10))
    assert not short.latencies
    assert set(short.errors) == {"5 bytes instead of 10"}
    refused = run(Load(start(echo(http(b"", 503), 0.01)), "REST", MESSAGE, 1, 0.1, size=0))
    assert not refused.latencies
    assert set(refused.errors) == {"status 503"}


def test_a_server_that_hangs_up_is_an_error_and_asked_again(start: Start) -> None:
    def serve(caller: socket.socket) -> None:
        caller.recv(65536)
        time.sleep(0.01)

    outcome = run(Load(start(serve), "REST", MESSAGE, 1, 0.2))
    assert outcome.errors["ConnectionError"] >= 2


def test_an_open_loop_counts_the_wait_that_a_stall_causes(start: Start) -> None:
    stalled = threading.Event()

    def serve(caller: socket.socket) -> None:
        while caller.recv(65536):
            if not stalled.is_set():
                stalled.set()
                time.sleep(0.5)
            caller.sendall(http(b""))

    outcome = run(Load(start(serve), "REST", MESSAGE, 1, 1.0, size=0, rate=100))
    assert len(outcome.latencies) > 90
    assert not outcome.errors
    # About fifty requests were due during the stall; a loop that waits with the server would have seen one slow reply.
    assert sum(latency > 0.1 for latency in outcome.latencies) >= 30
    assert max(outcome.latencies) >= 0.5


def test_random_arrivals_are_as_many_as_their_gaps_leave_room_for(start: Start) -> None:
    gaps, times = random.Random(0), [0.0]
    while times[-1] <= 0.5:
        times.append(times[-1] + gaps.expovariate(200))
    outcome = run(Load(start(echo(http(b""))), "REST", MESSAGE, 4, 0.5, size=0, rate=200, poisson=True))
    assert not outcome.errors
    assert len(outcome.latencies) == len(times) - 1 != 101  # A constant rate asks 101 times.


def test_replies_are_kept_for_their_content(start: Start) -> None:
    outcome = run(Load(start(echo(http(b"hi"))), "REST", MESSAGE, 1, 0.5))
    assert not outcome.errors
    assert 1 <= len(outcome.kept) <= 8
    assert set(outcome.kept) == {b"hi"}


def test_grpc_keeps_to_the_windows_and_finds_the_status(start: Start) -> None:
    """The peer grants 10 bytes of the message at first, the rest later, and answers in two frames."""
    received = bytearray()

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload

    def serve(caller: socket.socket) -> None:
        caller.sendall(frame(4, 0, 0, struct.pack(">HI", 4, 10)))
        caller.recv(24, socket.MSG_WAITALL)
        while len(head := caller.recv(9, socket.MSG_WAITALL)) == 9:
            size = int.from_bytes(head[:3])
            payload = caller.recv(size, socket.MSG_WAITALL) if size else b""
            if head[3] == 0:
                received.extend(payload)
                assert len(payload) <= 10 or len(received) > 10
                if len(received) == 10:
                    caller.sendall(frame(8, 0, 1, struct.pack(">I", 1000)))
                if head[4] & 1:
                    caller.sendall(frame(1, 4, 1, b"\x88") + frame(0, 0, 1, b"\0\0\0\0\5he") + frame(0, 0, 1, b"llo"))
                    caller.sendall(frame(1, 5, 1, b"\x00\x0bgrpc-status\x010"))

    wire = Grpc(start(serve))
    with wire.socket:
        wire.send(b"m" * 100)
        while (reply := wire.receive()) is None:
            pass
    assert bytes(received) == b"\0\0\0\0\x64" + b"m" * 100
    assert (reply.status, bytes(reply.body)) == (200, b"hello")


def test_a_load_in_its_own_process_brings_its_outcome_back(start: Start) -> None:
    outcome = measure(Load(start(echo(http(b"abc"), 0.001)), "REST", MESSAGE, 1, 0.3, size=3))
    assert len(outcome.latencies) >= 1
    assert outcome.cpu_s > 0
    assert statistics.median(outcome.latencies) >= 0.001
