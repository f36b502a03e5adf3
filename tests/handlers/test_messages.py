"""Tests of the worker's messages: TorchServe's own code reads and writes the same, repeated fields apart."""

import json
import socket
import struct
import threading
import warnings
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest

from handlers import messages
from handlers.connection import Improved, improve

with warnings.catch_warnings():  # TorchServe leaves a file open that says its version.
    warnings.simplefilter("ignore", ResourceWarning)
    from ts import service
    from ts.context import Context, RequestProcessor
    from ts.protocol import otf_message_handler

END = struct.pack("!i", -1)
HEADERS = [("accept", "application/x-protobuf"), ("host", "localhost"), ("accept", "*/*"), ("x-empty", ""), ("ü", "ß")]
PICTURE = ("data", "image/png", bytes(range(256)) * 20)
BATCHES: dict[str, list[tuple[list[tuple[str, str]], list[tuple[str, str, bytes]]]]] = {
    "none": [],
    "one": [(HEADERS, [PICTURE])],
    "over gRPC": [([], [("request", "", b"\x0a\x00")])],
    "without parameters": [(HEADERS, [])],
    "empty": [(HEADERS, [("body", "", b"")])],
    "several": [(HEADERS, [("body", "application/x-protobuf", b"a")]), ([], []), (HEADERS[:1], [PICTURE])],
    "JSON": [(HEADERS, [("body", "application/json", b'{"top_k": 3, "layers": ["conv1"]}')])],
    "no JSON": [(HEADERS, [("body", "application/json", b"{"), ("data", "application/json", b"\xff")])],
    "JSON too deep": [(HEADERS, [("body", "application/json", b"[" * 100_000)])],
    "text": [(HEADERS, [("layers", "text/plain; charset=UTF-8", "größe".encode()), ("pool", "text/plain", b"\xff")])],
    "a header named as a parameter": [([("data", "text")], [PICTURE, ("top_k", "", b"3")])],
    "long": [(HEADERS, [("body", "image/png", bytes(3_000_000))])] * 2,
}


def field(content: bytes) -> bytes:
    return struct.pack("!i", len(content)) + content


def written(batch: list[tuple[list[tuple[str, str]], list[tuple[str, str, bytes]]]]) -> bytes:
    """Return a batch as TorchServe's front end writes it, after the command."""
    content = b""
    for number, (headers, parameters) in enumerate(batch):
        content += field(b"id-%d" % number)
        content += b"".join(field(text.encode()) for header in headers for text in header) + END
        for name, kind, value in parameters:
            content += field(name.encode()) + field(kind.encode()) + field(value)
        content += END
    return content + END


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe's code, by our module until the test ends."""
    for owner, name in (
        (otf_message_handler, "_retrieve_inference_msg"),
        (service.Service, "retrieve_data_for_inference"),
        (service, "create_predict_response"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    messages.install()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """TorchServe's end and the worker's."""
    front, worker = socket.socketpair()
    with front, worker:
        yield front, worker


def read(ends: tuple[socket.socket, socket.socket], content: bytes) -> Any:
    """Return what TorchServe's `Service` takes from a batch."""
    front, worker = ends
    thread = threading.Thread(target=front.sendall, args=(b"I" + content,))
    thread.start()
    command, batch = otf_message_handler.retrieve_msg(worker)
    thread.join()
    assert command == b"I"
    processors, rows, ids = service.Service.retrieve_data_for_inference(batch)
    return [processor.get_request_properties() for processor in processors], rows, ids


@pytest.fixture
def own_reading() -> dict[str, Any]:
    """What TorchServe's own code reads of each batch."""
    found = {}
    for name, batch in BATCHES.items():
        front, worker = socket.socketpair()
        with front, worker:
            found[name] = read((front, worker), written(batch))
    return found


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_read_as_torchserve_reads_it(name: str, own_reading: dict[str, Any], installed: None, ends: Any):
    for _ in range(2):  # The first message meets with a connection that is not improved yet.
        assert read(ends, written(BATCHES[name])) == own_reading[name]
    assert isinstance(ends[1], Improved)


def test_repeated_fields_become_a_list(installed: None, ends: Any):
    parameters = [
        ("data", "image/png", b"a"),
        ("top_k", "text/plain", b"3"),
        ("data", "image/jpeg", b"b"),
        ("data", "application/json", b'["c", "d"]'),
        ("layers", "application/json", b'["conv1"]'),
        ("layers", "text/plain", b"conv2"),
    ]
    [properties], [row], _ = read(ends, written([([], parameters)]))
    assert row == {"data": [b"a", b"b", ["c", "d"]], "top_k": "3", "layers": ["conv1", "conv2"]}
    assert properties["data"] == {"content-type": "image/png"}


@pytest.mark.parametrize("kept", [1, 5, 40, 200, -1])
def test_a_front_end_that_goes_away_ends_the_worker(kept: int, installed: None, ends: Any):
    front, worker = ends
    front.sendall(b"I" + written(BATCHES["several"])[:kept])
    front.close()
    with pytest.raises(SystemExit) as caught:
        otf_message_handler.retrieve_msg(worker)
    assert caught.value.code == 0


def test_a_connection_of_another_kind_is_read_too(installed: None):
    """One that gives what has come, and no more."""

    class Own(socket.socket):
        pass

    front, worker = socket.socketpair()
    with front, Own(fileno=worker.detach()) as own:
        _, [row, *_], ids = read((front, own), written(BATCHES["long"]))
        assert row == {"body": bytes(3_000_000)}
        assert ids == {0: "id-0", 1: "id-1"}


def asked(connection: socket.socket, count: int) -> Context:
    """Return TorchServe's context of a batch whose requests were answered."""
    context = Context("cifar", "/", {}, count, None, "0.12.0")
    context.cl_socket = connection
    context.request_processor = [RequestProcessor({}) for _ in range(count)]
    for index in range(count):
        status = (200, 400, 503)[index % 3]
        context.set_response_content_type(index, ("application/json", "application/x-protobuf")[index % 2])
        context.set_response_status(status, HTTPStatus(status).phrase, index)
    return context


@pytest.mark.parametrize("sizes", [(10,), (0, 3), (100_000, 50, 20_000), (2_000_000,) * 3, ()])
def test_replies_are_written_as_torchserve_writes_them(sizes: Any, ends: Any):
    front, worker = ends
    improve(worker)
    bodies = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    ids = {number: f"id-{number}-ü" for number in range(len(sizes))}
    context = asked(worker, len(sizes))
    wanted = otf_message_handler.create_predict_response(bodies, ids, "Prediction success", 200, context=context)
    answers = [body if number % 2 else [body[:1], memoryview(body)[1:]] for number, body in enumerate(bodies)]
    reply = messages.write_replies(answers, ids, "Prediction success", 200, context=context)
    assert isinstance(reply, list)
    assert all(any(piece is body for piece in reply) for body in bodies[1::2]), "a body was copied"
    thread = threading.Thread(target=worker.sendall, args=(reply,))
    thread.start()
    came = front.recv(len(wanted), socket.MSG_WAITALL)
    thread.join()
    assert came == wanted


def test_a_status_or_header_that_nobody_set_is_written_too(ends: Any):
    _, worker = ends
    improve(worker)
    context = Context("cifar", "/", {}, 1, None, "0.12.0")
    context.cl_socket = worker
    context.request_processor = [RequestProcessor({})]
    wanted = otf_message_handler.create_predict_response([b"body"], {0: "id"}, "fine", 200, context=context)
    assert b"".join(messages.write_replies([b"body"], {0: "id"}, "fine", 200, context=context)) == wanted  # type: ignore[arg-type]
    context.set_response_header(0, "x-more", "1")
    wanted = otf_message_handler.create_predict_response([b"body"], {0: "id"}, "fine", 200, context=context)
    assert b"".join(messages.write_replies([b"body"], {0: "id"}, "fine", 200, context=context)) == wanted  # type: ignore[arg-type]


def test_a_failure_of_the_whole_batch_and_other_connections_are_left_to_torchserve(ends: Any):
    _, worker = ends
    wanted = otf_message_handler.create_predict_response(None, {0: "id"}, "Prediction failed", 503)
    assert messages.write_replies(None, {0: "id"}, "Prediction failed", 503) == wanted
    context = asked(worker, 1)  # Which is not improved.
    wanted = otf_message_handler.create_predict_response([b"body"], {0: "id"}, "fine", 200, context=context)
    reply = messages.write_replies([b"body"], {0: "id"}, "fine", 200, context=context)
    assert isinstance(reply, bytearray)
    assert reply == wanted


def test_a_service_of_torchserve_answers_by_it(installed: None, ends: Any):
    """All of TorchServe's way from a message to its reply."""
    front, worker = ends

    def handle(rows: list[dict[str, Any]], context: Context) -> list[bytes]:
        for index in range(len(rows)):
            context.set_response_content_type(index, "application/json")
            context.set_response_status(200, "OK", index)
        return [json.dumps(sorted(row)).encode() for row in rows]

    class Metrics:
        request_ids: Any = None

        def add_time(self, *what: Any) -> None:
            pass

    served = service.Service("cifar", "/", {}, handle, None, 8, metrics_cache=Metrics())
    served.set_cl_socket(worker)
    front.sendall(b"I" + written(BATCHES["several"]))
    _, batch = otf_message_handler.retrieve_msg(worker)
    worker.sendall(served.predict(batch))
    reply = front.recv(10_000)
    assert reply.startswith(struct.pack("!i", 200) + field(b"Prediction success") + field(b"id-0"))
    assert reply.endswith(field(b'["data"]') + END)
    assert reply.count(field(b"application/json")) == 6
