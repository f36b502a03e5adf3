"""The patches of TorchServe's worker: what they change, what they leave alone, and that they can be switched off."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from handlers.torchserve import patches

with warnings.catch_warnings():  # TorchServe leaves the file open that says its version.
    warnings.simplefilter("ignore", ResourceWarning)
    import ts
    from ts import service
    from ts.protocol import otf_message_handler

END = struct.pack("!i", -1)
HEADERS = [("accept", "application/x-protobuf"), ("host", "localhost"), ("accept", "*/*"), ("x-empty", ""), ("ü", "ß")]
PICTURE = ("data", "image/png", bytes(range(256)) * 20)
Batch = list[tuple[list[tuple[str, str]], list[tuple[str, str, bytes]]]]
BATCHES: dict[str, Batch] = {
    "none": [],
    "one": [(HEADERS, [PICTURE])],
    "over gRPC": [([], [("request", "", b"\x0a\x00")])],
    "without parameters": [(HEADERS, [])],
    "several": [(HEADERS, [("body", "application/x-protobuf", b"a")]), ([], []), (HEADERS[:1], [PICTURE])],
    "a header named as a parameter": [([("data", "text")], [PICTURE, ("top_k", "", b"3")])],
}


def field(content: bytes) -> bytes:
    return struct.pack("!i", len(content)) + content


def written(batch: Batch) -> bytes:
    """Return a batch as TorchServe's front end writes it, after the command."""
    content = b""
    for number, (headers, parameters) in enumerate(batch):
        content += field(b"id-%d" % number)
        content += b"".join(field(text.encode()) for header in headers for text in header) + END
        for name, kind, value in parameters:
            content += field(name.encode()) + field(kind.encode()) + field(value)
        content += END
    return content + END


def read(batch: Batch) -> Any:
    """Return what TorchServe's `Service` takes from a batch that came over a socket."""
    front, worker = socket.socketpair()
    with front, worker:
        thread = threading.Thread(target=front.sendall, args=(b"I" + written(batch),))
        thread.start()
        _, received = otf_message_handler.retrieve_msg(worker)
        thread.join()
    processors, rows, ids = service.Service.retrieve_data_for_inference(received)
    return [processor.get_request_properties() for processor in processors], rows, ids


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TorchServe's own code again when the test ends."""
    original = service.Service.retrieve_data_for_inference
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", otf_message_handler._retrieve_buffer)
    yield
    service.Service.retrieve_data_for_inference = staticmethod(original)


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_without_repeated_fields_is_read_as_before(name: str) -> None:
    before = read(BATCHES[name])
    patches.apply()
    patches.apply()
    assert read(BATCHES[name]) == before


def test_repeated_fields_become_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [
        ("data", "image/png", b"a"),
        ("top_k", "text/plain", b"3"),
        ("data", "image/jpeg", b"b"),
        ("data", "image/png", b"c"),
    ]
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    assert read([([], parameters)])[1] == [{"data": b"c", "top_k": b"3"}], "TorchServe itself keeps the last"
    assert patches.apply()[patches.REPEATED_FIELDS]
    [properties], [row], _ = read([([], parameters)])
    assert row == {"data": [b"a", b"b", b"c"], "top_k": b"3"}
    assert properties["data"] == {"content-type": "image/png"}


@pytest.mark.parametrize("how", ["off", "another version"])
def test_a_patch_that_is_not_wanted_or_not_known_to_fit_is_left_out_and_said_so(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = service.Service.retrieve_data_for_inference
    if how == "another version":
        monkeypatch.setattr(ts, "__version__", "0.13.0")
    with caplog.at_level(logging.INFO):
        active = patches.apply(is_wanted=how != "off")
    assert not active[patches.REPEATED_FIELDS]
    assert service.Service.retrieve_data_for_inference is original
    assert not active[patches.BUFFERED_READS]
    assert all(f"{name} off" in caplog.text for name in patches.PATCHES)


@pytest.mark.parametrize("is_wanted", [True, False])
def test_times_that_nothing_reads_are_not_formatted(is_wanted: bool) -> None:
    told: list[str] = []
    metrics = SimpleNamespace(add_time=lambda name, *_: told.append(name))
    assert patches.apply(is_wanted=is_wanted, metrics=metrics)[patches.NO_TIMES] is is_wanted
    metrics.add_time("PredictionTime", 1.5)
    assert told == ([] if is_wanted else ["PredictionTime"])


def test_every_patch_is_named_in_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        active = patches.apply()
    assert tuple(active) == patches.PATCHES == (patches.REPEATED_FIELDS, patches.BUFFERED_READS, patches.NO_TIMES)
    [line] = [record.getMessage() for record in caplog.records]
    assert all(name in line for name in patches.PATCHES)


@pytest.mark.parametrize("sizes", [(0,), (70_000, 5, 300_000), (5_000_000,)])
def test_a_batch_is_read_the_same_through_the_buffer(sizes: tuple[int, ...]) -> None:
    batch: Batch = [(HEADERS, [("body", "image/png", bytes(range(256)) * (size // 256))]) for size in sizes]
    before = read(batch)
    patches.apply()
    assert read(batch) == before


def test_several_batches_come_over_one_connection() -> None:
    patches.apply()
    front, worker = socket.socketpair()
    with front, worker:
        for _ in range(3):
            front.sendall(b"I" + written(BATCHES["one"]))
            command, [request] = otf_message_handler.retrieve_msg(worker)
            assert (command, request["parameters"][0]["value"]) == (b"I", PICTURE[2])


@pytest.mark.parametrize("kept", [0, 1, 5, 40, 200, -1])
def test_a_front_end_that_goes_away_ends_the_worker(kept: int) -> None:
    patches.apply()
    front, worker = socket.socketpair()
    with worker:
        front.sendall((b"I" + written(BATCHES["several"]))[:kept])
        front.close()
        with pytest.raises(SystemExit) as caught:
            otf_message_handler.retrieve_msg(worker)
        assert caught.value.code == 0


def test_a_service_of_torchserve_responds_through_it() -> None:
    """All of TorchServe's way from a message to its response."""
    patches.apply()

    def handle(rows: list[dict[str, Any]], context: Any) -> list[bytes]:
        for index in range(len(rows)):
            context.set_response_content_type(index, "application/json")
            context.set_response_status(200, "OK", index)
        return [json.dumps(sorted(row)).encode() for row in rows]

    class Metrics:
        request_ids: Any = None

        def add_time(self, *what: Any) -> None:
            pass

    front, worker = socket.socketpair()
    with front, worker:
        served = service.Service("cifar", "/", {}, handle, None, 8, metrics_cache=Metrics())
        served.set_cl_socket(worker)
        front.sendall(b"I" + written(BATCHES["several"]))
        _, batch = otf_message_handler.retrieve_msg(worker)
        worker.sendall(served.predict(batch))
        reply = front.recv(10_000)
    assert reply.startswith(struct.pack("!i", 200) + field(b"Prediction success") + field(b"id-0"))
    assert reply.endswith(field(b'["data"]') + END)
