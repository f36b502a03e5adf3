"""Requests as they come over the network, by TorchServe's own reading of them: none is ignored, all mean the same."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from convscope._wire import convscope_pb2 as wire
from convscope._wire import inference_pb2

from tests.contract.requests import CARRIERS, Ask, Sent, generate, twist, write
from tests.e2e.test_refusals import CAT, METHOD
from tests.server.harness import Launched
from tests.thorough import tries

JSON = {"accept": "application/json"}
SEEDS = range(tries(20, 60))


pytestmark = pytest.mark.usefixtures("same_workers")


class Caller:
    """Sends requests as they are, over one connection a transport."""

    def __init__(self, server: Launched) -> None:
        self._rest = http.client.HTTPConnection("127.0.0.1", server.port("REST"), timeout=60)
        self._channel = grpc.insecure_channel(
            f"127.0.0.1:{server.port('gRPC')}", [("grpc.max_receive_message_length", -1)]
        )
        self._call = self._channel.unary_unary(METHOD)

    def close(self) -> None:
        self._rest.close()
        self._channel.close()

    def send(self, sent: Sent, model: str = "cifar") -> tuple[int, str, bytes]:
        """Return status, 0 over gRPC, code and body; the code is that of the body, `ok` where it has none."""
        if sent.inputs is not None:
            asked = inference_pb2.PredictionsRequest(model_name=model, input=sent.inputs)
            body = inference_pb2.PredictionResponse.FromString(
                self._call(asked.SerializeToString(), timeout=60)
            ).prediction
            return 0, code_of(body), body
        self._rest.putrequest(sent.method, sent.target(model))
        for name, value in (*sent.headers, ("Content-Length", str(len(sent.body)))):
            self._rest.putheader(name, value)
        self._rest.endheaders(sent.body)
        answer = self._rest.getresponse()
        body = answer.read()
        return answer.status, code_of(body), body


def code_of(body: bytes) -> str:
    """Return the code in a response of ours; empty for one that TorchServe wrote itself."""
    if body[:1] == b"{":
        said = json.loads(body)
        return str(said["error"]["code"]) if "error" in said else "" if "type" in said else "ok"
    if body[:2] == b"PK" or body[:4] == b"\x89PNG" or not body:
        return "ok"
    return wire.PredictReply.FromString(body).error.code or "ok"


@pytest.fixture(scope="module")
def caller(server: Launched) -> Iterator[Caller]:
    caller = Caller(server)
    yield caller
    caller.close()


def test_generated_questions_mean_the_same_in_every_carrier(caller: Caller) -> None:
    """In those that say values by their types; words are compared in tests/contract."""
    compared = 0
    for seed in SEEDS:
        asked = generate(seed)
        fields = {name: value for name, value in asked.fields.items() if name != "timing"}
        asked = Ask(asked.pictures, {**fields, **JSON, "request_id": "the-same"}, asked.path)
        found = {}
        for carrier in ("json", "protobuf", "grpc"):
            sent = write(asked, carrier)
            if sent is not None:
                _, code, body = caller.send(sent)
                found[carrier] = code if code != "ok" else body
        if "channels" not in asked.fields and "explain" not in asked.fields:  # There protobuf may say less.
            compared += len(found) > 1
            assert len(set(found.values())) == 1, (seed, asked.fields)
    assert compared > len(SEEDS) / 6


@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_ordinary_question_gets_the_same_reply(caller: Caller, carrier: str) -> None:
    fields = {"layers": ["conv2", "conv1"], "top_k": 3, "map_dtype": "uint8", "pool": 2, "channels": [3, 0], **JSON}
    asked = Ask((CAT,), fields)
    sent, plain = write(asked, carrier), write(asked, "json")
    assert sent is not None
    assert plain is not None
    said = [json.loads(caller.send(one)[2])["results"] for one in (sent, plain)]
    assert said[0] == said[1]
    assert list(said[0][0]["maps"]) == ["conv2", "conv1"]


def test_damaged_requests_are_answered_or_refused_and_never_our_fault(caller: Caller) -> None:
    for seed in SEEDS:
        for carrier in CARRIERS:
            sent = write(generate(seed), carrier)
            if sent is not None:
                damaged = twist(sent, seed)
                status, code, body = caller.send(damaged)
                if code == "" and "form" in dict(damaged.headers).get("Content-Type", ""):
                    continue  # TorchServe itself answers 500 to a form that it cannot read.
                assert status < 500, (seed, carrier)
                assert code not in ("internal", ""), (seed, carrier, body[:200])


def raw(server: Launched, request: bytes) -> tuple[int, Any]:
    """Send bytes as they are; return status and JSON."""
    with socket.create_connection(("127.0.0.1", server.port("REST")), timeout=30) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("line", "headers", "body"),
    [
        ("POST /predictions/cifar", ["Content-Length: 0", "X-Convscope-Method: POST"], b""),
        ("PUT /predictions/cifar", ["Content-Length: 0", "X-Convscope-Method: PUT"], b""),
        ("POST /predictions/cifar", ["Content-Type: image/png", "Transfer-Encoding: chunked"], b"0\r\n\r\n"),
        ("POST /predictions/cifar", ["X-Convscope-Layers: all", "Transfer-Encoding: chunked"], b"0\r\n\r\n"),
        ("POST /predictions/cifar", ["Content-Type: application/json"], b""),
        ("POST /explanations/cifar", ["Transfer-Encoding: chunked"], b"0\r\n\r\n"),
        ("GET /explanations/cifar", [], b""),
        ("GET /cifar/predict?layers=conv1", [], b""),
        ("POST /cifar/predict?layers=conv1", [f"Content-Length: {len(CAT)}"], CAT),
        ("POST /predictions/cifar/1.0/conv1", [f"Content-Length: {len(CAT)}"], CAT),
        ("POST /predictions/cifar", [f"Content-Length: {len(CAT)}", "X-Convscope-Layer: conv1"], CAT),
        ("POST /predictions/cifar", ["Content-Type: Multipart/Form-Data; boundary=x", "Content-Length: 3"], b"--x"),
        ("POST /predictions/cifar", ["Content-Type: application/json", "Content-Length: 19"], b'{"top_k":1,"top_k":'),
    ],
)
def test_what_torchserve_would_lose_is_a_bad_request(
    server: Launched, line: str, headers: list[str], body: bytes
) -> None:
    status, said = raw(server, request(line, *headers, body=body))
    assert (status, said["error"]["code"]) == (400, "bad_request")


@pytest.mark.parametrize("headers", [[], ["Content-Length: 0", "X-Convscope-Method: GET"], ["Accept: */*"]])
def test_an_empty_get_is_the_card(server: Launched, headers: list[str]) -> None:
    status, said = raw(server, request("GET /predictions/cifar", *headers))
    assert (status, len(said["classes"])) == (200, 10)


def test_a_form_with_a_field_that_is_not_ours_loses_nothing(caller: Caller) -> None:
    form = write(Ask((CAT,), {"layers": "conv1"}), "form")
    assert form is not None
    body = form.body.replace(b'name="data"; filename="a"', b'name="body"')
    status, code, said = caller.send(Sent("form", headers=form.headers, body=body))
    assert (status, code, b"data, layers" in said) == (400, "bad_request", True)


def test_json_is_known_by_its_type_in_any_case(caller: Caller) -> None:
    plain = write(Ask((CAT,), {"layers": "conv2", "request_id": "the-same"}), "json")
    assert plain is not None
    odd = Sent("json", headers=(("content-type", "application/JSON; charset=UTF-8"),), body=plain.body)
    assert caller.send(plain) == caller.send(odd)
    assert caller.send(odd)[:2] == (200, "ok")


def test_torchserves_describe_drops_no_picture(server: Launched) -> None:
    _, said = raw(server, request("POST /predictions/cifar", "describe: True", f"Content-Length: {len(CAT)}", body=CAT))
    assert said["results"][0]["top"]
