"""The trace of the caller: given, or that of OpenTelemetry's current span, which the client never imports."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from convscope import Client
from convscope.testing import FakeTransport, prediction

from tests.client.stand_in import StandIn
from tests.client.test_request_ids import BOTH, ask

GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
LATER = f"01{GIVEN[2:]}-more"


def sent(stand_in: StandIn) -> list[tuple[str | None, str | None]]:
    """Return the trace contexts of the requests; a header and its field are the same."""
    fields = [(request.traceparent or None, request.tracestate or None) for *_, request in stand_in.requests]
    assert fields == stand_in.traces
    return fields


@BOTH
def test_a_given_context_travels_in_header_and_message(kind: type, url: str, stand_in: StandIn) -> None:
    options: dict[str, Any] = {"model": "cifar", "traceparent": GIVEN, "tracestate": "vendor=1,other=2"}
    ask(kind, url, lambda client: client.predict(b"cat", **options))
    ask(kind, url, lambda client: client.explain(b"cat", model="cifar", traceparent=LATER))
    assert sent(stand_in) == [(GIVEN, "vendor=1,other=2"), (LATER, None)]


def test_every_request_of_a_stream_has_it(client: Client, stand_in: StandIn) -> None:
    assert len(list(client.predict_many([b"one", b"two"], model="cifar", traceparent=GIVEN))) == 2
    assert sent(stand_in) == [(GIVEN, None)] * 2


@pytest.mark.parametrize("given", ["", "00", f"{GIVEN}-", f"ff{GIVEN[2:]}", f"{GIVEN}\r\nx-api-key: 1", GIVEN.upper()])
def test_a_malformed_one_is_not_sent(client: Client, stand_in: StandIn, given: str) -> None:
    client.predict(b"cat", model="cifar", traceparent=given, tracestate="vendor=1")
    client.predict(b"cat", model="cifar", traceparent=GIVEN, tracestate="vendor=1\r\nx-api-key: 1")
    client.predict(b"cat", model="cifar")
    assert sent(stand_in) == [(None, None), (GIVEN, None), (None, None)]


def test_one_of_another_type_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="traceparent must be a str or None, not 7"):
        client.predict(b"cat", model="cifar", traceparent=7)  # type: ignore[call-overload]


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What OpenTelemetry's API says of the current span."""
    context = SimpleNamespace(
        is_valid=True, trace_id=int(GIVEN[3:35], 16), span_id=int(GIVEN[36:52], 16), trace_flags=1
    )
    context.trace_state = SimpleNamespace(to_header=lambda: "vendor=1")
    module = SimpleNamespace(
        get_current_span=lambda: SimpleNamespace(get_span_context=lambda: context),
        format_trace_id=lambda number: format(number, "032x"),
        format_span_id=lambda number: format(number, "016x"),
    )
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", module)  # type: ignore[arg-type]
    return context


@BOTH
def test_the_current_span_is_the_parent_unless_one_is_given(
    kind: type, url: str, stand_in: StandIn, current: SimpleNamespace
) -> None:
    ask(kind, url, lambda client: client.predict(b"cat", model="cifar"))
    ask(kind, url, lambda client: client.model_card("cifar"))
    ask(kind, url, lambda client: client.filters("cifar", "conv1"))
    ask(kind, url, lambda client: client.predict(b"cat", model="cifar", traceparent=LATER))
    current.is_valid = False
    ask(kind, url, lambda client: client.predict(b"cat", model="cifar"))
    assert sent(stand_in) == [(GIVEN, "vendor=1")] * 3 + [(LATER, None), (None, None)]


def test_the_real_library_is_understood() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    tracer = sdk.TracerProvider(shutdown_on_exit=False).get_tracer("test")
    transport = FakeTransport(prediction({"cat": 1.0}))
    with Client("http://fake", transport=transport) as client, tracer.start_as_current_span("caller") as span:
        client.predict(b"cat", model="cifar")
    context = span.get_span_context()
    assert (
        transport.requests[0].traceparent
        == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    )


def test_opentelemetry_is_not_imported() -> None:
    program = (
        "import sys, convscope\n"
        "from convscope.testing import FakeTransport, prediction\n"
        "with convscope.Client('http://fake', transport=FakeTransport(prediction({'cat': 1.0}))) as client:\n"
        "    client.predict(b'cat', model='cifar')\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
