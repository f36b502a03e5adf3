"""What a worker counts is what it answered: exactly, with bounded labels, and across its own death."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from handlers.api import errors
from handlers.api.job import Job
from handlers.api.limits import Limits
from handlers.loading import warm_up
from handlers.networks.cifar import Cifar
from handlers.ops.metrics import MOST_CLASSES, Metrics, slot_name
from handlers.ops.telemetry import Telemetry
from handlers.outputs.response import Response
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.torchserve.patches import PATCHES
from handlers.wire import convscope_pb2 as wire
from tests.handlers.metering import IDENTITY, every, metered, scrape, value
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_message, ask_rest
from tests.pictures import colours, npy, png

ROOT = Path(__file__).resolve().parents[2]
GOOD = png(colours())
GRPC: dict[str, Any] = {}
REST = {"Host": "localhost"}
GREY = npy(np.zeros((32, 32), np.uint8))
MANY = npy(np.zeros((65, 32, 32, 3), np.uint8))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "metrics"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    monkeypatch.setattr(sys, "argv", ["worker", "--sock-type", "unix", "--sock-name", "/tmp/.ts.sock.9000"])
    return folder


@pytest.fixture
def service(directory: Path) -> Pipeline:
    return metered()


def message(*pictures: bytes, **options: Any) -> dict[str, Any]:
    return {"request": bytearray(wire.PredictRequest(pictures=pictures, **options).SerializeToString())}


def body(data: bytes) -> dict[str, Any]:
    return {"body": bytearray(data)}


# Row, properties, and what is to be counted: format and code, codes of its pictures, stages it got through.
ALL = ("read", "decode", "preprocess", "forward", "encode")
UNSEEN = ("read", "decode", "encode")  # No picture of it came to the network.
ROWS: list[tuple[dict[str, Any], dict[str, Any], str, str, tuple[str, ...], tuple[str, ...]]] = [
    (message(GOOD), GRPC, "protobuf", "ok", ("ok",), ALL),
    (message(GOOD, GOOD, layers=["all"]), GRPC, "protobuf", "ok", ("ok", "ok"), ALL),
    (message(GOOD, b"text", GREY), GRPC, "protobuf", "ok", ("ok", "bad_image", "wrong_channels"), ALL),
    (message(b"text"), GRPC, "protobuf", "bad_image", ("bad_image",), UNSEEN),
    (message(GOOD, layers=["nose"]), GRPC, "protobuf", "unknown_layer", (), ()),
    (message(MANY), GRPC, "protobuf", "too_many_images", (), ("read",)),
    ({"request": bytearray(b"\xff\xff")}, GRPC, "protobuf", "bad_request", (), ()),
    ({"data": bytearray(GOOD), "accept": bytearray(b"application/json")}, GRPC, "json", "ok", ("ok",), ALL),
    (message(GOOD, layers=["conv1"], pool=33), GRPC, "protobuf", "bad_request", ("bad_request",), ALL),
    (body(GOOD), REST, "json", "ok", ("ok",), ALL),
    (body(GOOD), REST | {"accept": "application/x-npz", "x-convscope-layers": "conv1"}, "npz", "ok", ("ok",), ALL),
    (body(GOOD), REST | {"accept": "image/png", "x-convscope-layers": "conv1"}, "png", "ok", ("ok",), ALL),
    (body(GOOD), REST | {"accept": "image/png"}, "json", "bad_request", (), ("read", "decode")),
    (body(b"text"), REST | {"accept": "image/png"}, "json", "bad_image", ("bad_image",), UNSEEN),
    (body(GOOD), REST | {"accept": "text/html"}, "json", "bad_request", (), ()),
    ({"body": b'{"data": "%%%"}'}, REST | {"content-type": "application/json"}, "json", "bad_request", (), ()),
]
CARDS: list[tuple[dict[str, Any], dict[str, Any]]] = [({"body": ""}, REST), ({"describe": bytearray(b"1")}, GRPC)]


def transport(properties: dict[str, Any]) -> str:
    return "rest" if properties else "grpc"


def counts(directory: Path, name: str) -> Counter[tuple[str, ...]]:
    """Return every sample of a metric that is not 0, by its labels' values in the order of their names."""
    found = scrape(directory).get(name, [])
    return Counter({tuple(labels[key] for key in sorted(labels)): int(number) for labels, number in found})


@pytest.mark.parametrize("batch", [1, 3, 18])
def test_every_request_is_counted_exactly_once(service: Pipeline, directory: Path, batch: int) -> None:
    rows = [(row, properties) for row, properties, *_ in ROWS] * 3 + CARDS
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        service.respond([dict(row) for row, _ in some], [properties for _, properties in some])
    asked, answered, stages = Counter[Any](), Counter[Any](), Counter[Any]()
    for _, properties, kind, code, pictures, passed in ROWS * 3:
        asked[code, kind, transport(properties)] += 1
        answered.update((picture, transport(properties)) for picture in pictures)
        stages.update((stage, transport(properties)) for stage in passed)
    assert counts(directory, "convscope_requests_total") == asked
    assert counts(directory, "convscope_pictures_total") == answered
    assert counts(directory, "convscope_stage_seconds_count") == stages
    assert counts(directory, "convscope_handler_seconds_count") == {("grpc",): 27, ("rest",): 21}
    assert counts(directory, "convscope_reply_bytes_count").total() == len(ROWS) * 3
    assert counts(directory, "convscope_cards_total") == {("ok", "grpc"): 1, ("ok", "rest"): 1}
    assert counts(directory, "convscope_batch_requests_count") == {(): -(-len(rows) // batch)}
    assert counts(directory, "convscope_batch_requests_sum") == {(): len(rows)}
    assert counts(directory, "convscope_layer_requests_total") == {("conv1",): 12, ("conv2",): 3}
    assert (
        counts(directory, "convscope_predicted_class_total").total() == answered["ok", "grpc"] + answered["ok", "rest"]
    )
    assert counts(directory, "convscope_confidence_count").total() == answered["ok", "grpc"] + answered["ok", "rest"]
    assert value(directory, "convscope_in_flight") == 0


def test_pictures_bytes_class_and_confidence_are_those_of_the_replies(service: Pipeline, directory: Path) -> None:
    message = wire.PredictRequest(pictures=[png(colours(seed)) for seed in range(5)], layers=["conv1"])
    [answer] = service.respond([{"request": bytearray(message.SerializeToString())}], [{}])
    best = [result.top[0] for result in wire.PredictReply.FromString(answer.body).results]
    assert counts(directory, "convscope_request_pictures_sum") == {("grpc",): 5}
    assert counts(directory, "convscope_reply_bytes_sum") == {("protobuf", "grpc"): len(answer.body)}
    assert counts(directory, "convscope_predicted_class_total") == Counter((score.label,) for score in best)
    assert value(directory, "convscope_confidence_sum") == pytest.approx(sum(score.probability for score in best))


def test_cards_that_are_refused_are_cards(directory: Path, tmp_path: Path) -> None:
    network = Cifar()
    service = metered(network, drain_file=tmp_path / "draining")
    (tmp_path / "draining").touch()
    assert ask_rest(service, {"body": ""}).status == 503
    (tmp_path / "draining").unlink()
    network.fc.weight.fill_(float("nan"))
    assert ask_message(service, wire.PredictRequest(describe=True)).error.code == "internal"
    assert counts(directory, "convscope_cards_total") == {("draining", "rest"): 1, ("internal", "grpc"): 1}
    assert not counts(directory, "convscope_requests_total")
    assert not counts(directory, "convscope_handler_seconds_count")


@pytest.mark.parametrize(
    ("filters", "code"),
    [("nose", "unknown_layer"), ("all", "bad_request"), ("conv1", "ok"), ("conv2", "reply_too_large")],
)
def test_filters_are_cards_whatever_becomes_of_them(directory: Path, filters: str, code: str) -> None:
    service = metered(limits=Limits(max_reply_bytes=10_000))
    ask_message(service, wire.PredictRequest(filters=filters))
    ask_message(service, wire.PredictRequest(pictures=[GOOD]))
    assert counts(directory, "convscope_cards_total") == {(code, "grpc"): 1}
    assert counts(directory, "convscope_requests_total") == {("ok", "protobuf", "grpc"): 1}


def test_what_cannot_be_recorded_once_is_missing_once(service: Pipeline, directory: Path) -> None:
    odd = Job({}, {})
    odd.response = Response([], "text/plain")
    service.telemetry.record([odd], 0.1)
    ask_message(service, wire.PredictRequest(pictures=[GOOD]))
    assert counts(directory, "convscope_requests_total") == {("ok", "protobuf", "grpc"): 1}


def test_what_warms_the_server_up_is_not_counted(directory: Path, tmp_path: Path) -> None:
    flag = tmp_path / "starting"
    flag.touch()
    service = metered(starting_file=flag)
    service.respond([message(GOOD)], [GRPC])
    warm_up(service, CIFAR_INPUT, ("conv1",), 64)
    assert not counts(directory, "convscope_requests_total")
    flag.unlink()
    warm_up(service, CIFAR_INPUT, ("conv1",), 64)
    service.respond([message(GOOD)], [GRPC])
    assert counts(directory, "convscope_requests_total") == {("ok", "protobuf", "grpc"): 1}
    assert value(directory, "convscope_batch_requests_count") == 1
    assert value(directory, "convscope_in_flight") == 0


def test_requests_are_in_flight_while_they_are_answered(service: Pipeline, directory: Path) -> None:
    seen: list[float] = []
    run = service.predictor.run
    service.predictor.run = lambda jobs: (seen.append(value(directory, "convscope_in_flight")), run(jobs))[1]  # type: ignore[method-assign,func-returns-value]
    service.respond([message(GOOD)] * 3, [GRPC] * 3)
    assert seen == [3]
    assert value(directory, "convscope_in_flight") == 0


def test_starts_load_time_and_what_answers_are_told(service: Pipeline, directory: Path) -> None:
    service.telemetry.loaded(1.5)
    service.telemetry.loaded(0.25)
    assert value(directory, "convscope_worker_starts_total") == 2
    assert value(directory, "convscope_load_seconds") == 0.25
    [(labels, number)] = scrape(directory)["convscope_model_info"]
    assert (labels["engine"], labels["device"], labels["torch"], number) == ("torch-test", "cpu", version("torch"), 1)


def test_every_patch_of_the_worker_is_told_on_or_off(service: Pipeline, directory: Path) -> None:
    for is_active in (True, False):
        service.telemetry.patched(dict.fromkeys(PATCHES, is_active))
        assert every(directory, "convscope_patch_active") == [({"patch": name}, is_active) for name in PATCHES]


def test_labels_are_bounded_whatever_callers_send(service: Pipeline, directory: Path) -> None:
    before = sizes(directory)
    for number in range(50):
        text = f"x{number}"
        ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=[text], request_id=text))
        ask_rest(service, {"body": bytearray(GOOD), text: text}, accept=f"application/{text}", x_request_id=text)
        service.respond([{"data": bytearray(GOOD), text: b""}], [GRPC])
    assert counts(directory, "convscope_requests_total").total() == 150
    assert sizes(directory) == before


def test_at_most_a_thousand_classes_have_a_name(directory: Path) -> None:
    classes = tuple(f"class {index}" for index in range(MOST_CLASSES + 200))
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(classes)))
    network[1].weight.data.zero_()
    network[1].bias.data = torch.eye(len(classes))[MOST_CLASSES + 7] * 9  # type: ignore[assignment]
    service = metered(network, classes, layers={"flat": "0"})
    ask_message(service, wire.PredictRequest(pictures=[GOOD, GOOD]))
    assert counts(directory, "convscope_predicted_class_total") == {("other",): 2}
    assert sum(b"predicted_class" in path.read_bytes() for path in directory.iterdir()) == 1
    text = (directory / "counter_slot9000.db").read_bytes()
    assert text.count(b'"convscope_predicted_class_total"') == MOST_CLASSES + 1


def test_every_code_there_is_can_be_counted() -> None:
    assert {kind.code for kind in errors.RequestError.__subclasses__()} == set(errors.CODES)
    listed = (ROOT / "proto/README.md").read_text(encoding="utf-8")
    assert all(f"| `{code}` |" in listed for code in errors.CODES)


def test_latencies_fall_into_the_buckets_that_every_part_of_the_system_shares(
    service: Pipeline, directory: Path
) -> None:
    ask_message(service, wire.PredictRequest(pictures=[GOOD]))
    ends = [float(labels["le"]) for labels, _ in every(directory, "convscope_handler_seconds_bucket")]
    shared = "0.0001 0.00025 0.0005 0.00075 0.001 0.0015 0.002 0.003 0.005 0.0075 0.01 0.015 0.02 0.03 0.05 0.075 0.1 "
    shared += "0.15 0.2 0.3 0.5 0.75 1 1.5 2 3 5 7.5 10 30 inf"
    assert sorted(set(ends)) == [float(end) for end in shared.split()]


class TestSlots:
    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            (
                ["w.py", "--sock-type", "unix", "--sock-name", "/tmp/a.b/.ts.sock.9003", "--metrics-config", "m"],
                "slot9003",
            ),
            (["w.py", "--sock-type", "tcp", "--port", "9001"], "slot9001"),
            (["w.py", "--sock-name"], None),
            (["w.py", "--sock-name", "/tmp/none"], None),
            ([], None),
        ],
    )
    def test_is_the_port_of_the_worker_or_else_its_process(self, arguments: list[str], name: str | None) -> None:
        assert slot_name(arguments) == (name or str(os.getpid()))

    def test_a_killed_workers_successor_goes_on_counting_and_has_nothing_in_flight(
        self, left: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = {path.name for path in left.iterdir()}
        assert value(left, "convscope_in_flight") == 1
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(left))
        successor = metered()
        assert value(left, "convscope_in_flight") == 0
        successor.telemetry.loaded(0.5)
        for _ in range(3):
            ask_message(successor, wire.PredictRequest(pictures=[GOOD]))
        assert counts(left, "convscope_requests_total") == {("ok", "protobuf", "grpc"): 5}
        assert counts(left, "convscope_handler_seconds_count") == {("grpc",): 5}
        assert value(left, "convscope_worker_starts_total") == 2
        assert {path.name for path in left.iterdir()} == files

    def test_two_workers_add_up(self, service: Pipeline, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "/tmp/.ts.sock.9001"])
        for worker, seconds, requests in ((service, 0.25, 1), (metered(), 0.5, 2)):
            worker.telemetry.loaded(seconds)
            for _ in range(requests):
                ask_message(worker, wire.PredictRequest(pictures=[GOOD]))
        assert counts(directory, "convscope_requests_total") == {("ok", "protobuf", "grpc"): 3}
        assert value(directory, "convscope_load_seconds") == 0.5
        assert value(directory, "convscope_worker_starts_total") == 2
        assert [number for _, number in scrape(directory)["convscope_model_info"]] == [1]
        assert {path.name.rpartition("_")[2] for path in directory.iterdir()} == {"slot9000.db", "slot9001.db"}


@pytest.fixture
def left(service: Pipeline, directory: Path, tmp_path: Path) -> Path:
    """Return what a worker leaves that is killed in its third request: its mapped files as they are then."""
    folder, run = tmp_path / "left", service.predictor.run
    service.telemetry.loaded(0.5)
    for _ in range(2):
        service.respond([message(GOOD)], [GRPC])
    service.predictor.run = lambda jobs: (shutil.copytree(directory, folder), run(jobs))[1]  # type: ignore[method-assign,func-returns-value]
    service.respond([message(GOOD)], [GRPC])
    return folder


def cut(content: bytes) -> bytes:
    return content[:100]


def emptied(content: bytes) -> bytes:
    return b""


def scribbled(content: bytes) -> bytes:
    return content[:40] + b"\xff" * 4000 + content[4040:]


def overlong(content: bytes) -> bytes:
    return struct.pack("i", 2**30) + content[4:]


def not_json(content: bytes) -> bytes:
    return content.replace(b'["convscope', b'{"convscope')


@pytest.mark.parametrize("damage", [cut, emptied, scribbled, overlong, not_json])
def test_a_damaged_file_is_begun_anew(
    left: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    for path in left.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(left))
    ask_message(metered(), wire.PredictRequest(pictures=[GOOD]))
    assert counts(left, "convscope_requests_total") == {("ok", "protobuf", "grpc"): 1}


class TestWithoutMetrics:
    """A request is answered whatever becomes of them, and the log says so once."""

    def test_where_none_are_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
        assert Telemetry.of(IDENTITY, (), CIFAR_CLASSES, Settings())._metrics is None

    def test_where_prometheus_client_is_not_installed(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.delitem(sys.modules, "handlers.ops.metrics")
        for name in [name for name in sys.modules if name.startswith("prometheus_client")]:
            monkeypatch.setitem(sys.modules, name, None)
        self.check(directory, caplog)

    def test_where_the_directory_is_missing(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        directory.rmdir()
        self.check(directory, caplog)

    @pytest.mark.parametrize("kind", ["counter", "gauge_max"])
    def test_where_a_file_cannot_be_written(self, directory: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
        (directory / f"{kind}_slot9000.db").mkdir()  # A read-only directory would not keep root out.
        self.check(directory, caplog)

    def test_where_the_disk_is_full(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            self.check(directory, caplog)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def check(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        small = nn.Sequential(nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # Its weights fit everywhere.
        service = metered(small, layers={"conv1": "0"})
        service.telemetry.loaded(1)
        for _ in range(2):
            assert not ask_message(service, wire.PredictRequest(pictures=[GOOD])).HasField("error")
        messages = [record.getMessage() for record in caplog.records]
        assert messages == ["no metrics are kept, as they could not be set up"]

    def test_when_the_directory_goes_away(self, service: Pipeline, directory: Path) -> None:
        shutil.rmtree(directory)
        for seed in range(20):
            picture = png(colours(seed))
            assert not ask_message(service, wire.PredictRequest(pictures=[picture], layers=["all"])).HasField("error")

    @pytest.mark.parametrize("method", ["record", "in_flight", "loaded"])
    def test_when_recording_fails(
        self, service: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
    ) -> None:
        def fail(*_: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(Metrics, method, fail)
        service.telemetry.loaded(1)
        for _ in range(3):
            assert not ask_message(service, wire.PredictRequest(pictures=[GOOD])).HasField("error")
        assert [record.getMessage() for record in caplog.records] == [
            "metrics could not be recorded and will be incomplete"
        ]


def sizes(directory: Path) -> dict[str, int]:
    """Return how many bytes of each file are in use, as its head says."""
    return {path.name: struct.unpack("i", path.read_bytes()[:4])[0] for path in directory.iterdir()}
