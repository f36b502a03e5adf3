"""The worker's log: a line of JSON for each request that failed, whatever a caller put into it."""

from __future__ import annotations

import io
import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from handlers.images.preprocessing import Preprocessing
from handlers.loading import warm_up
from handlers.networks.cifar import Cifar
from handlers.ops import log
from handlers.ops.log import JsonLines, Samples, quiet_torchserve
from handlers.ops.telemetry import Telemetry
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import (
    CIFAR_CLASSES,
    CIFAR_INPUT,
    REQUEST_ID,
    ask_json,
    ask_message,
    make_service,
)
from tests.pictures import colours, npy, png

GOOD = png(colours())
FIELDS = ["time", "level", "model", "version", "request_id", "transport", "code", "message"]


def lines(output: io.StringIO) -> list[dict[str, Any]]:
    text = output.getvalue()
    assert text.isascii()
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_asked_to_warm_the_server_up_is_not_logged(tmp_path: Path, output: io.StringIO) -> None:
    flag = tmp_path / "starting"
    flag.touch()
    service = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, starting_file=flag)
    ask_json(service, {"body": bytearray(b"text")})
    ask_json(service, {"body": bytearray()})
    warm_up(service, CIFAR_INPUT, ("conv1",), 64)
    assert not output.getvalue()
    flag.unlink()
    ask_json(service, {"body": bytearray(b"text")})
    assert len(lines(output)) == 1


def test_torchserves_lines_of_every_batch_can_be_switched_off() -> None:
    before = logging.getLogger().level
    try:
        logging.getLogger().setLevel(logging.INFO)
        quiet_torchserve()
        metrics = logging.getLogger("ts.metrics.caching_metric")
        assert not logging.getLogger().isEnabledFor(logging.INFO)
        assert not metrics.isEnabledFor(logging.INFO)
        assert metrics.isEnabledFor(logging.WARNING)
    finally:
        logging.getLogger().setLevel(before)


def test_a_failed_request_is_one_line(service: Pipeline, output: io.StringIO) -> None:
    ask_json(service, {"body": bytearray(b"text")}, x_request_id="mine-1")
    [line] = lines(output)
    assert list(line) == FIELDS
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "warning",
        "model": "cifar",
        "version": "1.0",
        "request_id": "mine-1",
        "transport": "rest",
        "code": "bad_image",
        "message": "the first bytes are not those of a picture; send a PNG, JPEG or WebP file, or a .npy array",
    }


def test_each_failed_request_of_a_batch_is_one_and_good_ones_are_none(service: Pipeline, output: io.StringIO) -> None:
    unknown = wire.PredictRequest(pictures=[GOOD], layers=["nose"], request_id="b").SerializeToString()
    part = wire.PredictRequest(pictures=[GOOD, b"text"], request_id="c").SerializeToString()
    rows = [{"data": bytearray(b"text")}, {"request": bytearray(unknown)}, {"request": bytearray(part)}, {"body": ""}]
    service.respond(rows, [{}, {}, {}, {"Host": "x"}], ["a", "1", "2", "d"])
    found = [(line["request_id"], line["transport"], line["code"], line["level"]) for line in lines(output)]
    assert found == [("a", "grpc", "bad_image", "warning"), ("b", "grpc", "unknown_layer", "warning")]


@pytest.mark.parametrize(
    "text",
    ["a\n[METRICS]x.Count:1|#Level:Model", "a\r\n", "a\u2028b\u0085c", "Torch worker started.", "é½\x00\x1b[31m"],
)
def test_a_callers_text_cannot_leave_its_line(service: Pipeline, output: io.StringIO, text: str) -> None:
    ask_message(service, wire.PredictRequest(pictures=[GOOD], layers=[text]))
    ask_json(service, {text: bytearray(b"")})
    found = lines(output)
    assert [line["code"] for line in found] == ["unknown_layer", "bad_request"]
    assert repr(text[:40]) in found[0]["message"]


def test_what_is_ours_to_mend_comes_with_its_traceback_and_no_caller_sees_it(
    service: Pipeline, output: io.StringIO
) -> None:
    class Hostile(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            raise RuntimeError("secret path /etc")

    rows = [Hostile(body=bytearray(GOOD)), {"body": bytearray(GOOD)}]
    answer, neighbour = service.respond(rows, [{"Host": "x"}] * 2, [REQUEST_ID, "next"])
    assert (answer.status, neighbour.status) == (500, 200)
    [line] = lines(output)
    assert (line["level"], line["code"], line["request_id"]) == ("error", "internal", REQUEST_ID)
    assert line["traceback"].endswith("RuntimeError: secret path /etc")
    assert "in __contains__" in line["traceback"]
    assert b"/etc" not in answer.body


def test_a_failing_forward_pass_is_told_for_each_request_it_took_with_it(output: io.StringIO) -> None:
    network = Cifar()
    service = make_service(network, CIFAR_INPUT, CIFAR_CLASSES)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory in /dev/nvidia0")

    network.register_forward_hook(fail)
    rows = [{"data": bytearray(GOOD)}, {"data": bytearray(b"text")}, {"data": bytearray(GOOD)}]
    answers = service.respond(rows, [{}] * 3, ["a", "b", "c"])
    found = lines(output)
    assert [(line["request_id"], line["code"], line["level"]) for line in found] == [
        ("a", "internal", "error"),
        ("b", "bad_image", "warning"),
        ("c", "internal", "error"),
    ]
    assert all("/dev/nvidia0" in line["traceback"] for line in (found[0], found[2]))
    assert all(b"/dev" not in answer.body for answer in answers)


def test_what_a_network_of_any_size_made_of_a_picture_can_be_looked_into(output: io.StringIO) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 7))
    service = make_service(network, Preprocessing(1, None, None), (), layers={"conv1": "0"})
    small, large = (npy(np.zeros((side, side), np.uint8)) for side in (3, 9))
    reply = ask_message(service, wire.PredictRequest(pictures=[large, small], layers=["conv1"]))
    assert [result.error.code for result in reply.results] == ["", "bad_image"]
    assert "3×3" in reply.results[1].error.message
    [line] = lines(output)
    assert (line["level"], line["code"]) == ("error", "bad_image")
    assert "Kernel size can't be greater" in line["traceback"]


def test_a_traceback_of_any_length_stays_within_bounds(output: io.StringIO) -> None:
    network = Cifar()
    service = make_service(network, CIFAR_INPUT, CIFAR_CLASSES)

    def fail(*_: Any) -> None:
        raise RuntimeError("x" * 1_000_000 + "end")

    network.register_forward_hook(fail)
    ask_message(service, wire.PredictRequest(pictures=[GOOD]))
    [line] = lines(output)
    assert len(line["traceback"]) < 30_000
    assert line["traceback"].startswith("Traceback")
    assert line["traceback"].endswith("end")


def test_other_loggers_stay_as_they_are(output: io.StringIO) -> None:
    logging.getLogger("handlers.networks").info("ours")
    logging.getLogger("users.network").warning("the user's")
    assert [line["message"] for line in lines(output)] == ["ours"]
    assert not any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def test_one_answered_request_is_logged_now_and_then_with_what_it_took(
    output: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(log, "monotonic", lambda: now[0])
    telemetry = Telemetry(samples=Samples(2.0))
    service = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, telemetry=telemetry)
    logged = []
    for seconds in (0.0, 1.0, 0.5, 1.0):  # At 100.0, 101.0, 101.5 and 102.5 s.
        now[0] += seconds
        ask_json(service, {"body": bytearray(GOOD)})
        logged.append(len(lines(output)))
    assert logged == [1, 1, 1, 2]
    [entry, _] = lines(output)
    assert (entry["level"], entry["transport"], entry["pictures"], entry["batch_requests"]) == ("info", "rest", 1, 1)
    assert entry["message"].startswith("answered 1 picture in ")
    assert "code" not in entry
    assert entry["reply_bytes"] > 0
    assert 0 < entry["forward_s"] < entry["handler_s"]


def test_neither_a_card_nor_a_failed_request_takes_the_place_of_an_answered_one(output: io.StringIO) -> None:
    service = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES, telemetry=Telemetry(samples=Samples(3600)))
    ask_json(service, {"body": bytearray()})
    ask_json(service, {"body": bytearray(b"text")})
    assert [entry["level"] for entry in lines(output)] == ["warning"]
    ask_json(service, {"body": bytearray(GOOD)})
    assert [entry["level"] for entry in lines(output)] == ["warning", "info"]


def test_without_being_asked_to_answered_requests_are_not_logged(output: io.StringIO) -> None:
    service = make_service(Cifar, CIFAR_INPUT, CIFAR_CLASSES)
    ask_json(service, {"body": bytearray(GOOD)})
    assert lines(output) == []
