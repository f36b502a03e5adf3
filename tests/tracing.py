"""The same requests to either host, and what their spans and log lines must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx
import pytest
from convscope import Client, UnknownLayer

from tests.collector import Collector, Span
from tests.pictures import colours, png

PICTURE = png(colours())
PARENT = "00f067aa0ba902b7"
STAGES = ["read", "decode", "preprocess", "forward", "encode"]
MALFORMED = "00-4bf92f3577b34da6a3ce929d0e0e473G-00f067aa0ba902b7-01"
# Spans wait in the workers for ten minutes: what comes earlier was sent because the server stopped.
PATIENT = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}


def trace(name: str) -> str:
    """Return the id of the trace that a request of that name belongs to."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def traceparent(name: str, flags: str = "01") -> str:
    """Return the trace context of the caller of a request of that name."""
    return f"00-{trace(name)}-{PARENT}-{flags}"


@dataclass(frozen=True)
class Asked:
    """What came of the requests.

    Attributes:
        collector: Where their spans are.
        log: What the server wrote to standard error, lines of JSON among it.
        forward_s: By name, what `timing` in the reply says of the forward pass.
    """

    collector: Collector
    log: str
    forward_s: dict[str, float]

    def request(self, name: str) -> tuple[Span, list[Span]]:
        """Return the span of a request, and those inside it in the order of their beginnings."""
        [request] = [span for span in self.collector.of(trace(name)) if span.parent == PARENT]
        inside = [span for span in self.collector.spans if span.parent == request.id]
        return request, sorted(inside, key=lambda span: span.began)

    def line(self, request_id: str) -> dict[str, Any]:
        """Return the line of the log about a request."""
        found = []
        for line in self.log.splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        [entry] = [entry for entry in found if isinstance(entry, dict) and entry.get("request_id") == request_id]
        return dict(entry)


def ask(url: str, rest: Client, rpc: Client) -> dict[str, float]:
    """Send the requests to `cifar` on a host; return `Asked.forward_s`."""
    forward_s = {}
    for transport, client in (("rest", rest), ("grpc", rpc)):
        options: dict[str, Any] = {"model": "cifar", "layers": ["conv1"], "tracestate": "vendor=1"}
        seen = client.predict([PICTURE] * 2, timing=True, traceparent=traceparent(transport), **options)
        assert seen[0].timing is not None
        forward_s[transport] = seen[0].timing.forward_s
        client.predict(PICTURE, model="cifar", traceparent=traceparent(f"unsampled {transport}", "00"))
        named = {"request_id": f"e-{transport}", "traceparent": traceparent(f"error {transport}")}
        with pytest.raises(UnknownLayer):
            client.predict(PICTURE, model="cifar", layers="x", **named)
        client.model_card("cifar")
    rest.explain(PICTURE, model="cifar", method="occlusion", traceparent=traceparent("explain"))
    rest.predict([PICTURE, b"text"], model="cifar", traceparent=traceparent("part"))
    for context in (MALFORMED, "", "\u00e9", traceparent("zero").replace(PARENT, "0" * 16)):
        headers = {"traceparent": context.encode("latin-1"), "tracestate": b"?", "x-request-id": b"malformed"}
        assert httpx.post(f"{url}/predictions/cifar", content=PICTURE, headers=headers).status_code == 200
    return forward_s


def check_parents_and_stages(asked: Asked) -> None:
    for transport in ("rest", "grpc"):
        request, stages = asked.request(transport)
        assert (request.name, request.kind, request.state, request.is_error) == ("predict cifar", 2, "vendor=1", False)
        assert [stage.name for stage in stages] == STAGES
        times = [request.began, *(time for stage in stages for time in (stage.began, stage.ended)), request.ended]
        assert all(later - earlier >= -2 for earlier, later in pairwise(times))  # Times are rounded to nanoseconds.
        forward = stages[STAGES.index("forward")]
        assert (forward.ended - forward.began) / 1e9 == pytest.approx(asked.forward_s[transport], abs=1e-6)


def check_attributes(asked: Asked) -> None:
    request, _ = asked.request("grpc")
    assert request.resource["service.name"] == "convscope"
    assert request.resource["deployment.environment.name"] == "test"
    wanted = {"model": "cifar", "transport": "grpc", "pictures": 2, "picture_errors": 0, "batch_requests": 1}
    assert {f"convscope.{name}": value for name, value in wanted.items()}.items() <= request.attributes.items()
    assert {"convscope.version", "convscope.engine", "convscope.request_id"} <= request.attributes.keys()
    assert "error.type" not in request.attributes


def check_errors(asked: Asked) -> None:
    for transport in ("rest", "grpc"):
        request, stages = asked.request(f"error {transport}")
        assert (request.is_error, request.attributes["error.type"]) == (True, "unknown_layer")
        assert "there is no layer 'x'" in request.message
        assert not stages
        entry = asked.line(f"e-{transport}")
        assert (entry["code"], entry["trace_id"]) == ("unknown_layer", trace(f"error {transport}"))
        assert list(entry).index("trace_id") == list(entry).index("request_id") + 1
    request, _ = asked.request("part")
    assert (request.is_error, request.attributes["convscope.picture_errors"]) == (False, 1)


def check_explanation(asked: Asked) -> None:
    request, stages = asked.request("explain")
    assert request.name == "explain cifar"
    assert [stage.name for stage in stages] == [*STAGES, "explain", "encode"]


def check_sampling(asked: Asked) -> None:
    for transport in ("rest", "grpc"):
        assert asked.collector.of(trace(f"unsampled {transport}")) == []


def check_malformed_contexts(asked: Asked) -> None:
    roots = [span for span in asked.collector.spans if span.attributes.get("convscope.request_id") == "malformed"]
    assert len({span.trace for span in roots}) == 4
    assert {(span.parent, span.state) for span in roots} == {("", "")}
    assert MALFORMED not in asked.log
    assert trace("zero") not in asked.log


def check_cards(asked: Asked) -> None:
    """Readiness asks for them all the time."""
    assert not [span for span in asked.collector.spans if span.name.startswith("describe")]


CHECKS: list[Callable[[Asked], None]] = [
    *(check_parents_and_stages, check_attributes, check_errors, check_explanation, check_sampling),
    *(check_malformed_contexts, check_cards),
]
