"""The timing in a reply equals what the histograms count; and every reply has its request's id."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handlers.entry import ConvscopeHandler
from handlers.networks.cifar import Cifar
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.handlers.metering import metered, scrape
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, REQUEST_ID, ask_json, ask_message, ask_rest, make_service
from tests.pictures import colours, png

GOOD = png(colours())
STAGES = ("read", "decode", "preprocess", "forward", "encode")
FIELDS = {*(f"{stage}_s" for stage in STAGES), "handler_s", "batch_requests"}
JSON = {"content_type": "application/json"}
FORM = {"content_type": "multipart/form-data; boundary=x"}


def whole(arrays: Any) -> Any:
    return json.loads(str(arrays["reply"]))


def breakdown(body: bytes, media_type: str) -> dict[str, float] | None:
    """Return the timing in a reply, whatever its format, or None."""
    if media_type == "application/x-protobuf":
        message = wire.PredictReply.FromString(body)
        fields = wire.Timing.DESCRIPTOR.fields_by_name
        return {name: getattr(message.timing, name) for name in fields} if message.HasField("timing") else None
    values = whole(np.load(io.BytesIO(body))) if media_type == "application/x-npz" else json.loads(body)
    found = values.get("timing")
    assert found is None or isinstance(found, dict)
    return found


class TestTiming:
    @pytest.mark.parametrize("accept", ["application/json", "application/x-protobuf", "application/x-npz"])
    @pytest.mark.parametrize("wanted", [True, False])
    def test_comes_in_every_format_when_asked_for(self, service: Pipeline, accept: str, wanted: bool) -> None:
        headers = {"accept": accept, "x_convscope_layers": "all", "x_convscope_timing": str(int(wanted))}
        answer = ask_rest(service, {"body": bytearray(GOOD)}, **headers)
        timing = breakdown(answer.body, answer.media_type)
        assert answer.media_type == accept
        if not wanted:
            assert timing is None
            return
        assert timing is not None
        assert set(timing) == FIELDS
        assert all(timing[f"{stage}_s"] > 0 for stage in STAGES)
        assert sum(timing[f"{stage}_s"] for stage in STAGES) <= timing["handler_s"] < 60
        assert timing["batch_requests"] == 1

    def test_a_picture_cannot_carry_it(self, service: Pipeline) -> None:
        headers = {"accept": "image/png", "x_convscope_layers": "conv1", "x_convscope_timing": "1"}
        answer = ask_rest(service, {"body": bytearray(GOOD)}, **headers)
        assert answer.media_type == "image/png"
        assert answer.body.startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("row", "headers"),
        [
            ({"body": bytearray(GOOD)}, {"X_Convscope_Timing": "1"}),
            ({"body": bytearray(GOOD)}, {"x_convscope_timing": "True"}),
            ({"body": {"data": base64.b64encode(GOOD).decode(), "timing": True}}, JSON),
            ({"body": {"data": base64.b64encode(GOOD).decode()}}, JSON | {"x_convscope_timing": "1"}),
            ({"data": bytearray(GOOD), "timing": bytearray(b"1")}, FORM),
            ({"data": bytearray(GOOD), "timing": bytearray(b"true")}, FORM | {"x_convscope_timing": "0"}),
        ],
    )
    def test_is_asked_for_in_every_body(self, service: Pipeline, row: dict[str, Any], headers: dict[str, str]) -> None:
        assert set(ask_json(service, row, **headers)["timing"]) == FIELDS

    @pytest.mark.parametrize("value", ["yes", "2", "[1]", "1,1"])
    def test_is_true_or_false(self, service: Pipeline, value: str) -> None:
        values = ask_json(service, {"body": bytearray(GOOD)}, x_convscope_timing=value)
        assert values["error"]["code"] == "bad_request"
        assert "timing must be true or false" in values["error"]["message"]

    def test_goes_by_plain_keys_and_messages_on_grpc(self, service: Pipeline) -> None:
        [answer] = service.respond([{"data": bytearray(GOOD), "timing": bytearray(b"1")}], [{}])
        assert breakdown(answer.body, answer.media_type) is not None
        assert ask_message(service, wire.PredictRequest(pictures=[GOOD], timing=True)).HasField("timing")
        assert not ask_message(service, wire.PredictRequest(pictures=[GOOD])).HasField("timing")

    def test_changes_nothing_else(self, service: Pipeline) -> None:
        message = wire.PredictRequest(pictures=[GOOD, b"text"], layers=["all"], top_k=0)
        plain = ask_message(service, message)
        message.timing = True
        timed = ask_message(service, message)
        timed.ClearField("timing")
        assert timed == plain

    def test_a_refusal_has_the_stages_it_got_through(self, service: Pipeline) -> None:
        timing = ask_json(service, {"body": bytearray(b"text")}, x_convscope_timing="1")["timing"]
        assert timing["decode_s"] > 0
        assert timing["preprocess_s"] == timing["forward_s"] == 0
        timing = ask_json(service, {"body": bytearray(GOOD)}, x_convscope_timing="1", x_convscope_layers="nose")[
            "timing"
        ]
        assert [timing[f"{stage}_s"] for stage in STAGES] == [0] * 5
        assert timing["handler_s"] > 0

    def test_tells_a_slow_network_from_the_rest(self) -> None:
        class Slow(Cifar):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                time.sleep(0.1)
                return super().forward(images)

        service = make_service(Slow(), CIFAR_INPUT, CIFAR_CLASSES)
        timing = ask_message(service, wire.PredictRequest(pictures=[GOOD], timing=True)).timing
        assert timing.forward_s >= 0.1
        assert timing.handler_s >= 0.1
        assert timing.decode_s + timing.encode_s < timing.handler_s - 0.1 + 1e-6

    def test_a_batch_shares_its_passes_and_its_end(self, service: Pipeline) -> None:
        message = wire.PredictRequest(pictures=[GOOD], layers=["all"], timing=True)
        rows = [{"request": bytearray(message.SerializeToString())} for _ in range(4)]
        answers = service.respond([*rows, {"body": ""}], [{}] * 4 + [{"Host": "x"}])
        timings = [wire.PredictReply.FromString(answer.body).timing for answer in answers[:4]]
        assert {timing.batch_requests for timing in timings} == {5}
        assert len({(timing.handler_s, timing.forward_s, timing.preprocess_s) for timing in timings}) == 1
        assert len({timing.decode_s for timing in timings}) > 1

    def test_the_histograms_hold_the_very_same_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        service = metered()
        told = dict.fromkeys((*STAGES, "handler"), 0.0)
        for accept in ("application/json", "application/x-protobuf", "application/x-npz") * 3:
            headers = {"Host": "x", "accept": accept, "x-convscope-layers": "all", "x-convscope-timing": "1"}
            for answer in service.respond([{"body": bytearray(GOOD)}] * 3, [headers] * 3):
                timing = breakdown(answer.body, answer.media_type)
                assert timing is not None
                for name in told:
                    told[name] += timing[f"{name}_s"]
        found = scrape(tmp_path)
        sums = {labels["stage"]: value for labels, value in found["convscope_stage_seconds_sum"]}
        [(_, sums["handler"])] = found["convscope_handler_seconds_sum"]
        assert sums == pytest.approx(told, rel=1e-9)


class TestRequestId:
    @pytest.mark.parametrize(
        ("row", "headers"),
        [
            ({"body": bytearray(GOOD)}, {"X_Request_Id": "mine-1"}),
            ({"body": {"data": base64.b64encode(GOOD).decode(), "request_id": "mine-1"}}, JSON),
            ({"data": bytearray(GOOD), "request_id": bytearray(b"mine-1")}, FORM),
            ({"data": bytearray(GOOD), "request_id": bytearray(b"yours")}, FORM | {"x_request_id": "mine-1"}),
            ({"data": bytearray(GOOD), "request_id": bytearray(b"mine-1")}, FORM | {"x_request_id": "no id"}),
            ({"data": bytearray(b"text"), "request_id": bytearray(b"mine-1")}, FORM),
            ({"data": bytearray(GOOD), "request_id": bytearray(b"mine-1"), "layer": bytearray(b"a")}, FORM),
            ({"body": {"data": "%%%", "request_id": "mine-1"}}, JSON),
            ({"body": bytearray(GOOD)}, {"x_request_id": "mine-1", "accept": "text/html"}),
        ],
    )
    def test_is_the_headers_or_else_the_fields(
        self, service: Pipeline, row: dict[str, Any], headers: dict[str, str]
    ) -> None:
        assert ask_json(service, row, **headers)["request_id"] == "mine-1"

    @pytest.mark.parametrize(
        "message",
        [
            wire.PredictRequest(pictures=[GOOD], request_id="mine-1"),
            wire.PredictRequest(pictures=[GOOD], request_id="mine-1", layers=["nose"]),
            wire.PredictRequest(request_id="mine-1"),
            wire.PredictRequest(request_id="mine-1", describe=True),
        ],
    )
    def test_comes_with_the_message_on_grpc(self, service: Pipeline, message: wire.PredictRequest) -> None:
        assert ask_message(service, message).request_id == "mine-1"

    def test_comes_with_the_plain_key_on_grpc(self, service: Pipeline) -> None:
        row = {"data": bytearray(GOOD), "request_id": bytearray(b"mine-1")}
        [answer] = service.respond([row], [{}], [REQUEST_ID])
        assert wire.PredictReply.FromString(answer.body).request_id == "mine-1"

    def test_stands_in_the_json_of_an_npz(self, service: Pipeline) -> None:
        answer = ask_rest(service, {"body": bytearray(GOOD)}, accept="application/x-npz", x_request_id="mine-1")
        assert whole(np.load(io.BytesIO(answer.body)))["request_id"] == "mine-1"

    @pytest.mark.parametrize("text", ["", "a b", "a\n", "é", "x" * 65, "../etc", "a\x00", '"', "½", "١"])
    def test_what_is_none_is_ignored(self, service: Pipeline, text: str) -> None:
        row = {"data": bytearray(GOOD), "request_id": bytearray(text.encode())}
        assert ask_json(service, row, x_request_id=text)["request_id"] == REQUEST_ID
        values = ask_json(service, {"body": {"data": base64.b64encode(GOOD).decode(), "request_id": text}}, **JSON)
        assert (values["request_id"], "error" in values) == (REQUEST_ID, False)

    @pytest.mark.parametrize("value", [None, 7, ["a"], {"a": 1}, True, bytearray(b"\xff")])
    def test_of_another_type_is_ignored(self, service: Pipeline, value: Any) -> None:
        values = ask_json(service, {"data": bytearray(GOOD), "request_id": value}, **FORM)
        assert (values["request_id"], "error" in values) == (REQUEST_ID, False)

    @pytest.mark.parametrize("text", ["a", "x" * 64, "A.b_c-9", "0af7651916cd43dd8448eb211c80319c"])
    def test_may_be_up_to_64_of_these(self, service: Pipeline, text: str) -> None:
        assert ask_json(service, {"body": bytearray(GOOD)}, x_request_id=text)["request_id"] == text

    def test_is_torchserves_own_where_none_is_sent(self, service: Pipeline) -> None:
        class Context:
            def get_all_request_header(self, index: int) -> dict[str, str]:
                return [{"Host": "x"}, {}, {"Host": "x", "x-request-id": "mine-1"}][index]

            def get_request_id(self, index: int) -> str:
                return f"torchserve-{index}"

            def set_response_content_type(self, index: int, value: str) -> None: ...

            def set_response_status(self, code: int, phrase: str, index: int) -> None: ...

            def set_response_header(self, index: int, key: str, value: str) -> None:
                assert (index, key, value) == (1, "ts_stream_next", "false"), "for gRPC alone: REST would wait for more"

        handler = ConvscopeHandler()
        handler._pipeline = service
        rows = [{"body": bytearray(GOOD)}, {"data": bytearray(GOOD)}, {"body": bytearray(GOOD)}]
        bodies = handler.handle(rows, Context())
        assert json.loads(bodies[0])["request_id"] == "torchserve-0"
        assert wire.PredictReply.FromString(bodies[1]).request_id == "torchserve-1"
        assert json.loads(bodies[2])["request_id"] == "mine-1"

    def test_is_made_where_nobody_gives_one_and_differs(self, service: Pipeline) -> None:
        answers = service.respond([{"data": bytearray(GOOD)}] * 2, [{}] * 2)
        ids = {wire.PredictReply.FromString(answer.body).request_id for answer in answers}
        assert len(ids) == 2
        assert all(ids)

    def test_is_all_that_is_new_in_a_reply(self, service: Pipeline) -> None:
        values = ask_json(service, {"body": bytearray(GOOD)})
        assert set(values) == {"model", "version", "engine", "device", "scores", "request_id", "results"}
        assert "request_id" not in ask_json(service, {"body": ""})  # The model card in JSON is the card alone.


def test_a_timing_that_cannot_be_told_is_an_error_and_no_reply_without_it(
    service: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret path /etc")

    monkeypatch.setattr("handlers.api.job.Job.timing", fail)
    answered = ask_json(service, {"data": GOOD, "timing": b"true", "accept": b"application/json"})
    assert answered["error"]["code"] == "internal"
    assert "results" not in answered or answered["results"] == []
    assert "/etc" not in json.dumps(answered)
