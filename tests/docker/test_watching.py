"""The gateway's metrics in the running stack: every query that needs them has a result, and counts are exact."""

from __future__ import annotations

import json
import math
import re
import socket
import ssl
import time
from collections import Counter

import grpc
import httpx
import pytest
from convscope import AuthenticationFailed, Client

from tests.docker.stack import ROOT, Stack, wait_until
from tests.watching.promql import Query, alerts, documented, needs, panel_queries, rule_queries, selectors

PICTURE = (ROOT / "samples/cat.png").read_bytes()
SCRAPES_S = 12.0  # Two scrapes of 5 s, and some.
Sample = tuple[dict[str, str], float]


def ask(stack: Stack, text: str) -> list[Sample]:
    """Ask the stack's own Prometheus."""
    url = "http://127.0.0.1:9090"
    said = stack.compose("exec", "-T", "prometheus", "promtool", "query", "instant", "-o", "json", url, text)
    return [(series["metric"], float(series["value"][1])) for series in json.loads(said)]


def outcomes(stack: Stack) -> Counter[tuple[str, str, str, str]]:
    """Return the requests the gateway has counted, by transport, status, gRPC status and whether a replica saw them."""
    samples = ask(stack, "envoy_gateway_requests")
    found: Counter[tuple[str, str, str, str]] = Counter()
    for labels, value in samples:
        sent = "refused" if labels["attempts"] == "0" else "sent on"
        found[labels.get("transport", ""), labels["status"], labels.get("grpc_status", ""), sent] += int(value)
    return found


def send(stack: Stack) -> Counter[tuple[str, str, str, str]]:
    """Send good, refused and misled requests; return what the gateway must have counted."""
    for transport in ("rest", "grpc"):
        with stack.client(transport) as client:
            for _ in range(10):
                client.predict(PICTURE, model="cifar", layers="conv1")
        with stack.client(transport, api_key="wrong") as client:
            for _ in range(2):
                refuse(client)
    with plain(stack) as http:
        assert http.get("/models").status_code == 404
        assert http.post("/predictions/cifar", content=b"no picture").status_code == 400
    assert no_http(stack).startswith(b"HTTP/1.1 400 ")
    credentials = grpc.ssl_channel_credentials(stack.ca_file.read_bytes())
    with grpc.secure_channel(f"localhost:{stack.port}", credentials) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/nobody/Nothing")(b"", metadata=[("x-api-key", stack.key)], timeout=30)
    return Counter(
        {
            ("rest", "200", "", "sent on"): 10,
            ("grpc", "200", "OK", "sent on"): 10,
            ("rest", "401", "", "refused"): 2,
            ("grpc", "200", "Unauthenticated", "refused"): 2,
            ("none", "404", "", "refused"): 1,
            ("", "400", "", "refused"): 1,
            ("rest", "400", "", "sent on"): 1,
            ("none", "200", "Unimplemented", "refused"): 1,
        }
    )


def plain(stack: Stack) -> httpx.Client:
    trusted = ssl.create_default_context(cafile=str(stack.ca_file))
    url = f"https://localhost:{stack.port}"
    return httpx.Client(base_url=url, verify=trusted, headers={"x-api-key": stack.key}, timeout=30, trust_env=False)


def no_http(stack: Stack) -> bytes:
    """Send what Envoy cannot read; return the beginning of what it says."""
    trusted = ssl.create_default_context(cafile=str(stack.ca_file))
    with (
        socket.create_connection(("localhost", stack.port), 30) as plain,
        trusted.wrap_socket(plain, server_hostname="localhost") as sealed,
    ):
        sealed.sendall(b"no HTTP\r\n\r\n")
        return sealed.recv(100)


def refuse(client: Client) -> None:
    with pytest.raises(AuthenticationFailed):
        client.predict(PICTURE, model="cifar")


@pytest.fixture(scope="module")
def asked(stack: Stack) -> Stack:
    """Send, let Prometheus look, send again, so that every rate has something to show."""
    for _ in range(2):
        send(stack)
        time.sleep(SCRAPES_S)
    wait_until(lambda: bool(ask(stack, 'transport:slo_errors:ratio{window="1h"} >= 0')), 120)
    return stack


def test_the_gateway_counts_every_request_once(asked: Stack) -> None:
    before = outcomes(asked)
    time.sleep(SCRAPES_S)
    # Nobody else is counted: health checks do not come through the door, and the probe is counted by its key alone.
    assert outcomes(asked) == before
    sent = send(asked)
    wait_until(lambda: (outcomes(asked) - before).total() >= sent.total(), 60)
    assert outcomes(asked) - before == sent


def test_every_request_is_counted_by_a_keys_name(asked: Stack) -> None:
    names = {labels.get("key") for labels, _ in ask(asked, "envoy_gateway_key_requests")}
    assert names >= {"first", "none", "probe", "unread"}
    assert None not in names


def test_the_gateway_times_every_answer(asked: Stack) -> None:
    time.sleep(SCRAPES_S)  # Envoy counts at once, but brings its histograms up to date every 5 s.
    before = {labels["transport"]: value for labels, value in timed(asked, "count")}
    summed = {labels["transport"]: value for labels, value in timed(asked, "sum")}
    waited = {}
    for transport in ("rest", "grpc"):
        with asked.client(transport) as client:
            started = time.monotonic()
            for _ in range(20):
                client.predict(PICTURE, model="cifar")
            waited[transport] = time.monotonic() - started
    wait_until(lambda: all(value - before[labels["transport"]] == 20 for labels, value in timed(asked, "count")), 60)
    for labels, value in timed(asked, "sum"):
        spent = (value - summed[labels["transport"]]) / 1e6
        assert 0 < spent < waited[labels["transport"]]


def timed(stack: Stack, what: str) -> list[Sample]:
    good = 'transport=~"rest|grpc", status="200", grpc_status=~"|OK"'
    return ask(stack, f"sum by (transport) (envoy_gateway_request_us_{what}{{{good}}})")


def test_the_gateways_buckets_are_the_workers(asked: Stack) -> None:
    def bounds(metric: str) -> set[float]:
        return {float(labels["le"]) for labels, _ in ask(asked, f"count by (le) ({metric})")}

    workers = {bound * 1e6 for bound in bounds("convscope_handler_seconds_bucket")}
    assert {round(bound, 3) for bound in workers} == bounds("envoy_gateway_request_us_bucket")
    assert bounds("envoy_gateway_answer_us_bucket") == bounds("envoy_gateway_request_us_bucket")


# What is absent while all is well.
CALM = ("gateway_rejected:time", "envoy_gateway_abandoned")
QUERIES = [
    query
    for query in panel_queries() + rule_queries()
    if any(needs(query.text, prefix) for prefix in ("envoy_", "convscope_probe", "alertmanager_", "prometheus_"))
    and "file:gateway_rejected:time" not in str(query)
]


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_a_query_about_the_gateway_returns_data(asked: Stack, query: Query) -> None:
    samples = ask(asked, query.text)
    assert any(math.isfinite(value) for _, value in samples)
    for label in set(re.findall(r"{{(\w+)}}", query.legend)) - {"transport", "grpc_status"}:  # Those may be empty.
        assert all(label in labels for labels, _ in samples), label


WATCHED = [name for name, rule in alerts().items() if not needs(rule["expr"], "convscope_gpu_")]


@pytest.mark.parametrize("alert", WATCHED)
def test_an_alert_watches_series_that_there_are(asked: Stack, alert: str) -> None:
    for selector in selectors(alerts()[alert]["expr"]):
        if any(word in selector for word in CALM):
            continue
        # Nothing is refused or sent again here.
        bare = re.sub(r',? *(flags|attempts|grpc_status|status)=~"[^"]*"', "", selector).replace("{,", "{")
        assert ask(asked, bare), bare


@pytest.mark.parametrize("query", panel_queries("1m"), ids=str)
def test_a_panel_has_no_row_of_nan(asked: Stack, query: Query) -> None:
    """Nobody asks for `digits` here, and most kinds of requests were not sent."""
    assert all(math.isfinite(value) for _, value in ask(asked, query.text))


@pytest.mark.parametrize("name", [name for name in documented() if name.startswith("envoy_") and name not in CALM])
def test_a_documented_metric_of_the_gateway_is_there(asked: Stack, name: str) -> None:
    metric = documented()[name]
    extra = {"__name__", "instance", "job", "le", "envoy_listener_address"}
    for series in metric.series:
        samples = ask(asked, series)
        assert samples, series
        assert all(set(labels) - extra <= metric.labels for labels, _ in samples)


def test_no_label_of_the_gateway_holds_what_a_caller_sent(asked: Stack) -> None:
    secret = "Caller-Chosen-4711"
    with plain(asked) as http:
        for path in (f"/{secret}", f"/predictions/{secret}", f"/predictions/cifar?{secret}"):
            http.get(path, headers={secret: secret, "x-request-id": secret})
    time.sleep(SCRAPES_S)
    text = asked.compose(
        "exec", "-T", "prometheus", "promtool", "query", "series", "--match", '{job="gateway"}', "http://127.0.0.1:9090"
    )
    assert "envoy_gateway_requests" in text
    assert secret.lower() not in text.lower()
