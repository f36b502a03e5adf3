"""Traces: what is taken for a trace context, and spans that cost no request anything. See `tests.tracing` too."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from time import time_ns
from typing import Any

import pytest

from handlers.api.job import Job
from handlers.networks.cifar import Cifar
from handlers.ops.telemetry import Telemetry
from handlers.ops.tracing import Spans
from handlers.outputs.response import Identity
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.collector import Collector, collecting
from tests.handlers.support import CIFAR_CLASSES, CIFAR_INPUT, ask_message, ask_rest, make_service, unpack
from tests.pictures import colours, png
from tests.server.harness import poll
from tests.tracing import PARENT, PICTURE, STAGES, trace, traceparent

ROOT = Path(__file__).parents[2]
IDENTITY = Identity("cifar", "1.0", "torch-test", "cpu")
GOOD = traceparent("good")

INVALID = (
    *("", "00", GOOD[:-1], GOOD + "0", GOOD + "-00", "ff" + GOOD[2:], "0g" + GOOD[2:], GOOD.upper(), GOOD + ","),
    *(GOOD.replace(PARENT, "0" * 16), GOOD.replace(trace("good"), "0" * 32), GOOD.replace("-", "_"), f"{GOOD}\n"),
    *("01" + GOOD[2:] + "x", " " + GOOD),
    *(f"{GOOD},{GOOD}", "\u0664" + GOOD[1:], "x" * 10_000),
)


@pytest.mark.parametrize("given", [GOOD, "01" + GOOD[2:], "fe" + GOOD[2:] + "-more.of it"])
def test_a_trace_context_comes_in_a_header_a_plain_key_or_a_field(given: str) -> None:
    for job in (
        Job({}, {"traceparent": given, "tracestate": "a=1"}),
        Job({"traceparent": bytearray(given.encode()), "tracestate": b"a=1"}, {}),
    ):
        assert (job.trace_id, job.traceparent, job.tracestate) == (trace("good"), GOOD, "a=1")
    job = Job({}, {})
    job.identify("", given, None)
    assert (job.trace_id, job.traceparent, job.tracestate) == (trace("good"), GOOD, "")


@pytest.mark.parametrize("given", [*INVALID, None, 5, [GOOD], b"\xff"])
def test_a_malformed_one_is_as_if_it_were_not_there(given: Any) -> None:
    job = Job({"traceparent": given}, {"traceparent": given} if isinstance(given, str) else {})
    assert (job.trace_id, job.traceparent) == ("", "")
    job.identify("", GOOD, "")
    assert job.trace_id == trace("good")


def test_a_header_goes_before_a_field() -> None:
    job = Job({"traceparent": traceparent("key")}, {"traceparent": GOOD})
    job.identify("", traceparent("field"), "b=2")
    assert (job.traceparent, job.tracestate) == (GOOD, "")


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "True"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_spans_are_sent_where_the_standard_variables_say_so(environment: dict[str, str], wanted: bool) -> None:
    assert Settings.from_environment(environment).sends_spans is wanted


@pytest.fixture(scope="module")
def collector() -> Any:
    with collecting() as running:
        yield running


def traced(network: Cifar, endpoint: str, patch: pytest.MonkeyPatch, **variables: str) -> Pipeline:
    """Make a service that sends spans."""
    for name, value in {"EXPORTER_OTLP_ENDPOINT": endpoint, "BSP_SCHEDULE_DELAY": "50", **variables}.items():
        patch.setenv(f"OTEL_{name}", value)
    telemetry = Telemetry.of(IDENTITY, (), (), Settings(sends_spans=True))
    return make_service(network, CIFAR_INPUT, CIFAR_CLASSES, telemetry=telemetry)


def test_each_request_of_a_batch_has_its_own_spans(
    network: Cifar, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = traced(network, collector.endpoint, monkeypatch, SERVICE_NAME="mine")
    names = [f"batch {number}" for number in range(3)]
    messages = [wire.PredictRequest(pictures=[PICTURE] * 3, layers=["all"], traceparent=traceparent(n)) for n in names]
    began = time_ns()
    service.respond([{"request": message.SerializeToString()} for message in messages], [{}] * 3)
    ended = time_ns()
    for name in names:
        request, stages = collector.await_request(trace(name))
        assert (request.parent, request.resource["service.name"]) == (PARENT, "mine")
        assert request.attributes["convscope.batch_requests"] == 3
        assert list(stages) == STAGES
        assert began - 10**6 <= request.began < request.ended <= ended + 10**6  # Two clocks may drift apart a little.
        assert all(request.began <= span.began < span.ended <= request.ended for span in stages.values())


def test_the_sampler_is_what_its_variable_says(
    network: Cifar, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, sampler in (("off", "always_off"), ("on", "parentbased_always_off")):
        service = traced(network, collector.endpoint, monkeypatch, TRACES_SAMPLER=sampler)
        ask_rest(service, {"body": PICTURE}, traceparent=traceparent(f"sampler {name}"))
        ask_rest(service, {"body": PICTURE}, x_request_id="no-parent")
    collector.await_request(trace("sampler on"))
    assert not collector.of(trace("sampler off"))
    assert not [span for span in collector.spans if span.attributes.get("convscope.request_id") == "no-parent"]


def test_a_card_has_a_span_only_if_its_caller_traces_it(
    network: Cifar, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = traced(network, collector.endpoint, monkeypatch)
    ask_message(service, wire.PredictRequest(describe=True, request_id="probe"))
    ask_message(service, wire.PredictRequest(describe=True, traceparent=traceparent("card")))
    request, stages = collector.await_request(trace("card"))
    assert (request.name, stages) == ("describe cifar", {})
    assert not [span for span in collector.spans if span.attributes.get("convscope.request_id") == "probe"]


def test_what_fails_in_tracing_costs_no_request_and_is_told_once(
    network: Cifar, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    service = traced(network, "http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(Spans, "record", fail)
    for _ in range(2):
        assert not ask_message(service, wire.PredictRequest(pictures=[PICTURE])).HasField("error")
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("handlers")]
    assert messages == ["spans could not be recorded and will be incomplete"]


WORKER = """
import json, sys
from pathlib import Path
from handlers import loading
from handlers.ops import log
log.set_up("digits", "1.0")
service = loading.load(Path(sys.argv[1]), model="digits", version="1.0", config={}, batch_size=1, gpu=None)
picture = bytes.fromhex(sys.argv[2])
[response] = service.respond([{"data": picture, "traceparent": sys.argv[3].encode()}], [{}], ["id"])
[failed] = service.respond([{"data": b"text", "traceparent": sys.argv[3].encode()}], [{}], ["id"])
imported = sorted(name for name in sys.modules if name.partition(".")[0] == "opentelemetry" and sys.modules[name])
print(json.dumps({"size": len(response.body), "imported": imported}), flush=True)
"""


def test_off_nothing_of_opentelemetry_is_imported_and_jobs_keep_no_times(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, unpack("digits", tmp_path), png(colours()).hex(), GOOD],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    failure, found = map(json.loads, done.stdout.splitlines())
    assert (failure["code"], failure["trace_id"]) == ("bad_image", trace("good"))
    assert (found["size"] > 100, found["imported"]) == (True, [])
    assert Job({}, {}).intervals is None


def entries(service: Pipeline, output: io.StringIO) -> list[dict[str, Any]]:
    """Have a request answered, and return what is in the log."""
    assert not ask_message(service, wire.PredictRequest(pictures=[PICTURE])).HasField("error")
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_asked_for_without_opentelemetry_the_log_says_so_once(
    network: Cifar, monkeypatch: pytest.MonkeyPatch, output: io.StringIO
) -> None:
    monkeypatch.delitem(sys.modules, "handlers.ops.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    [entry] = entries(traced(network, "http://127.0.0.1:9", monkeypatch), output)
    assert entry["level"] == "warning"
    assert entry["message"].startswith("no spans are sent, though OTEL_EXPORTER_OTLP_ENDPOINT is set: opentelemetry-")


def test_a_protocol_that_is_not_there_is_told(
    network: Cifar, monkeypatch: pytest.MonkeyPatch, output: io.StringIO
) -> None:
    [entry] = entries(traced(network, "http://127.0.0.1:9", monkeypatch, EXPORTER_OTLP_PROTOCOL="grpc"), output)
    assert entry["message"] == (
        "no spans are sent: they can be sent by http/protobuf alone, not by the protocol that the variables ask for"
    )


def test_a_collector_that_is_gone_is_told_in_the_log_and_costs_nothing(
    network: Cifar, monkeypatch: pytest.MonkeyPatch, output: io.StringIO
) -> None:
    service = traced(network, "http://127.0.0.1:9", monkeypatch, EXPORTER_OTLP_TIMEOUT="1")
    assert entries(service, output) == []
    [line] = poll(output.getvalue).splitlines()  # type: ignore[attr-defined]
    entry = json.loads(line)
    assert (entry["level"], entry["model"]) == ("error", "cifar")
    assert entry["message"].startswith("Failed to export spans batch")
