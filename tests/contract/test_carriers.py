"""Every way in which a request can travel means the same by the same value, and none ignores anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handlers.api import media
from handlers.api.errors import CODES
from handlers.images.preprocessing import Preprocessing
from handlers.outputs.response import Response
from handlers.pipeline import Pipeline
from handlers.wire import convscope_pb2 as wire
from tests.contract.requests import (
    CARRIERS,
    FIELDS,
    ODD,
    OPTIONS,
    OWN,
    TEXT,
    Ask,
    Sent,
    generate,
    meant,
    picture_files,
    to_text,
    twist,
    write,
)
from tests.handlers.support import CIFAR_CLASSES, REQUEST_ID, make_service
from tests.thorough import tries

PICTURE = picture_files()[0]
JSON = {"accept": media.JSON}
Outcome = tuple[str, str, bytes]


class Net(nn.Module):
    """A network small enough to be asked ten thousand times."""

    layers: ClassVar = {"conv1": "one", "conv2": "two"}

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1, stride=2)
        self.fc = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.two(self.one(images).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def service() -> Pipeline:
    torch.manual_seed(0)
    return make_service(Net(), Preprocessing(3, 8, 8), CIFAR_CLASSES)


def ask(service: Pipeline, sent: Sent) -> Response:
    row, properties = sent.row()
    [answer] = service.respond([row], [properties], [REQUEST_ID])
    return answer


def outcome(service: Pipeline, sent: Sent) -> Outcome:
    """Return the code of a response, and if it is `ok` its media type and body."""
    answer = ask(service, sent)
    code = code_of(answer)
    return (code, answer.media_type, answer.body) if code == "ok" else (code, "", b"")


def code_of(answer: Response) -> str:
    """Return the code of a response, from whatever it is encoded in."""
    code = "ok"
    if answer.media_type == media.JSON:
        code = json.loads(answer.body).get("error", {}).get("code", "ok")
    elif answer.media_type == media.PROTOBUF:
        code = wire.PredictReply.FromString(answer.body).error.code or "ok"
    assert code in ("ok", *CODES)
    assert (answer.status == 200) == (code == "ok") or not answer.status
    return code


def outcomes(
    service: Pipeline, asked: Ask, carriers: tuple[str, ...] = tuple(CARRIERS)
) -> Iterator[tuple[str, Outcome]]:
    for carrier in carriers:
        sent = write(asked, carrier)
        if sent is not None:
            yield carrier, outcome(service, sent)


def as_meant(asked: Ask, carrier: str) -> Ask:
    """Return what a carrier that writes words is to make of a question, as JSON says it."""
    words = OPTIONS if carrier in ("json and headers", "protobuf and headers") else (*OPTIONS, "describe", "filters")
    read = {name: meant(name, to_text(name, value)) for name, value in asked.fields.items() if name in words}
    return Ask(asked.pictures, {**asked.fields, **read}, asked.path)


def check(service: Pipeline, asked: Ask) -> None:
    """Hold that all carriers that can say this mean the same by it."""
    known: dict[bytes, Outcome] = {}
    for carrier, found in outcomes(service, asked):
        if carrier not in TEXT and says_nothing(asked):
            continue
        as_json = write(as_meant(asked, carrier) if carrier in TEXT else asked, "json")
        assert as_json is not None
        if as_json.body not in known:
            known[as_json.body] = outcome(service, as_json)
        expected = known[as_json.body]
        assert found[:2] == expected[:2], (carrier, asked.fields)
        assert found == expected, (carrier, asked.fields)


def says_nothing(asked: Ask) -> bool:
    """Tell whether a field holds what protobuf cannot tell from a field that is not set."""
    explain = asked.fields.get("explain")
    numbers = [explain.get("method"), explain.get("layer")] if isinstance(explain, dict) else []
    return asked.fields.get("channels") in ([], 0) or "" in numbers


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("accept", "request_id", "timing")])
def test_a_value_means_the_same_in_every_carrier(service: Pipeline, name: str) -> None:
    for value in ODD + OWN.get(name, ()):
        fields: dict[str, Any] = {"layers": ["conv2"], **JSON, name: value}
        check(service, Ask((PICTURE,), fields))


def test_a_timing_that_is_not_asked_for_is_refused_or_not_there(service: Pipeline) -> None:
    for value in ODD:
        if value not in (True, 1, [1], "1", "true", "TRUE"):
            check(service, Ask((PICTURE,), {"timing": value, **JSON}))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_timing_that_is_asked_for_is_there(service: Pipeline, carrier: str) -> None:
    sent = write(Ask((PICTURE,), {"timing": True, **JSON}), carrier)
    assert sent is not None
    assert "timing" in json.loads(ask(service, sent).body)


def test_a_format_is_the_same_in_every_carrier(service: Pipeline) -> None:
    for value in (*ODD, "image/png", "image/*", "application/x-npz, */*;q=0.1", "text/html"):
        text = to_text("accept", value)
        found = dict(outcomes(service, Ask((PICTURE,), {"layers": ["conv2"], "accept": text})))
        if not text.strip(" ,") or "*" in text:  # The default holds, which is another one over gRPC.
            assert found.pop("grpc") == found.pop("plain keys"), value
        assert len(set(found.values())) == 1, value


@settings(max_examples=tries(30, 75), deadline=None)
@given(seed=st.integers(0, 2**32))
@example(seed=7138)  # An empty header is no option, also where the path asks for an explanation.
def test_a_question_means_the_same_in_every_carrier(service: Pipeline, seed: int) -> None:
    asked = generate(seed)
    fields = {name: value for name, value in asked.fields.items() if name not in ("timing", "request_id")}
    accept = fields.get("accept", "")
    if not isinstance(accept, str) or "*" in accept or not accept.strip(" ,"):
        fields |= JSON  # Else the transport's own default holds.
    check(service, Ask(asked.pictures, fields, asked.path))


@settings(max_examples=tries(50, 150), deadline=None)
@given(seed=st.integers(0, 2**32), carrier=st.sampled_from(sorted(CARRIERS)))
def test_a_damaged_request_is_answered_or_refused_and_never_our_fault(
    service: Pipeline, seed: int, carrier: str
) -> None:
    sent = write(generate(seed), carrier)
    if sent is not None:
        answer = ask(service, twist(sent, seed + 1))
        assert code_of(answer) != "internal"


def test_every_option_of_the_contract_is_generated() -> None:
    fields = set(wire.PredictRequest.DESCRIPTOR.fields_by_name)
    # A trace context changes no answer; tests/handlers/test_tracing.py has it.
    assert set(FIELDS) == fields - {"pictures", "traceparent", "tracestate"} | {"accept"}
    seen = {name for seed in range(500) for name in generate(seed).fields}
    assert seen == set(FIELDS)
    assert set(OPTIONS) < seen
