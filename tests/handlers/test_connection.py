"""Tests of the worker's connection: messages are TorchServe's, read by its own worker code."""

import select
import socket
import struct
import threading
import warnings
from collections.abc import Iterator

import pytest

from handlers.connection import Improved, improve

with warnings.catch_warnings():  # TorchServe leaves a file open that says its version.
    warnings.simplefilter("ignore", ResourceWarning)
    from ts.protocol.otf_message_handler import retrieve_msg

HEADERS = {"accept": "application/x-protobuf", "content-type": "application/x-protobuf", "host": "localhost"}


def field(content: bytes) -> bytes:
    return struct.pack("!i", len(content)) + content


def message(*bodies: bytes) -> bytes:
    """Return a batch as TorchServe's front end writes it."""
    end = struct.pack("!i", -1)
    headers = b"".join(field(name.encode()) + field(value.encode()) for name, value in HEADERS.items())
    requests = [
        field(b"id-%d" % number) + headers + end + field(b"body") + field(b"image/png") + field(body) + end
        for number, body in enumerate(bodies)
    ]
    return b"I" + b"".join(requests) + end


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """TorchServe's end and the worker's, the latter improved."""
    front, worker = socket.socketpair()
    with front, worker:
        improve(worker)
        yield front, worker


def send(front: socket.socket, content: bytes) -> threading.Thread:
    thread = threading.Thread(target=front.sendall, args=(content,))
    thread.start()
    return thread


def test_a_message_is_read_in_one_call(ends):
    front, worker = ends
    front.sendall(message(b"png" * 1000))
    assert bytes(worker.recv(1)) == b"I"
    assert select.select([worker], [], [], 0)[0] == []


@pytest.mark.parametrize("sizes", [(0,), (1,), (2_600,), (70_000, 5, 300_000), (20_000_000,)])
def test_messages_are_those_that_torchserve_reads_itself(sizes, ends):
    bodies = [bytes(range(256)) * (size // 256) + bytes(size % 256) for size in sizes]
    plain_front, plain_worker = socket.socketpair()
    with plain_front, plain_worker:
        thread = send(plain_front, message(*bodies))
        wanted = retrieve_msg(plain_worker)
        thread.join()
    front, worker = ends
    for _ in range(2):
        thread = send(front, message(*bodies))
        assert retrieve_msg(worker) == wanted
        thread.join()
    assert [bytes(row["parameters"][0]["value"]) for row in wanted[1]] == bodies


def test_a_message_may_come_in_pieces(ends):
    front, worker = ends
    content = message(b"picture")

    def trickle() -> None:
        for byte in content:
            front.sendall(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    _, rows = retrieve_msg(worker)
    thread.join()
    assert bytes(rows[0]["parameters"][0]["value"]) == b"picture"


def test_a_front_end_that_goes_away_ends_the_worker(ends):
    front, worker = ends
    front.sendall(message(b"picture")[:-10])
    front.close()
    with pytest.raises(SystemExit):
        retrieve_msg(worker)


def test_replies_go_out_as_before_and_its_buffer_is_wide(ends):
    front, worker = ends
    worker.sendall(b"reply")
    assert front.recv(100) == b"reply"
    plain, other = socket.socketpair()
    with plain, other:
        usual = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert worker.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= usual


@pytest.mark.parametrize("sizes", [(), (0,), (5, 7), (5, 300_000, 0, 7), (9_000_000, 100), (20,) * 2_000])
def test_pieces_go_out_one_after_the_other(sizes, ends):
    front, worker = ends
    front.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    pieces = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    thread = threading.Thread(target=worker.sendall, args=(pieces,))
    thread.start()
    came = front.recv(sum(sizes), socket.MSG_WAITALL)
    thread.join()
    assert came == b"".join(pieces)
    assert select.select([front], [], [], 0)[0] == []


def test_what_a_call_leaves_unsent_is_sent_after_it(ends, monkeypatch):
    front, worker = ends
    sent = []

    def send_some(self: socket.socket, pieces: list[bytes]) -> int:
        sent.append(len(pieces))
        return socket.socket.send(self, b"".join(pieces)[:25_000])

    monkeypatch.setattr(Improved, "sendmsg", send_some, raising=False)
    pieces = [b"a" * 20_000, b"b" * 20_000, b"c" * 10_000, b"d" * 5_000]
    worker.sendall(pieces)
    assert front.recv(100_000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == b"".join(pieces)
    assert sent == [4, 2]


def test_a_connection_is_improved_once(ends):
    front, worker = ends
    kind = type(worker)
    front.sendall(b"ab")
    assert worker.recv(1) == b"a"
    improve(worker)
    assert type(worker) is kind
    assert worker.recv(1) == b"b"


def test_another_kind_of_connection_is_read_as_it_is():
    class Own(socket.socket):
        pass

    front, worker = socket.socketpair()
    with front, Own(fileno=worker.detach()) as own:
        improve(own)
        assert type(own) is Own
        front.sendall(b"ab")
        assert own.recv(1) == b"a"
        assert select.select([own], [], [], 0)[0] == [own]
