"""Both transports through the gateway as callers meet them: TLS, keys, equal answers, limits, request ids, metrics."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import ssl

import httpx
import numpy as np
import pytest
from convscope import AuthenticationFailed, BadImage, ModelNotFound, Overloaded

from tests.docker.stack import ROOT, Stack, replace, wait_until

PICTURE = (ROOT / "samples/cat.png").read_bytes()
PATHS = {
    "rest": "/predictions/cifar",
    "grpc": "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions",
}


def http(stack: Stack, **options: object) -> httpx.Client:
    verify = ssl.create_default_context(cafile=str(stack.ca_file))
    headers = {"x-api-key": stack.key}
    return httpx.Client(
        base_url=f"https://localhost:{stack.port}", verify=verify, headers=headers, timeout=30, **options
    )


def test_both_transports_answer_the_same(stack: Stack) -> None:
    with stack.client("rest") as rest, stack.client("grpc") as grpc:
        one, other = (client.predict(PICTURE, model="cifar", layers="all") for client in (rest, grpc))
    assert one.top[0].label == other.top[0].label == "cat"
    for layer in one.maps:
        np.testing.assert_array_equal(one.maps[layer], other.maps[layer])


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_large_requests_and_replies_pass(stack: Stack, transport: str) -> None:
    pictures = np.random.default_rng(0).random((60, 300, 300, 3), np.float32)  # 65 MB as float32, so uint8 below.
    with stack.client(transport) as client:
        seen = client.predict((pictures * 255).astype(np.uint8), model="cifar", layers="all")
    assert len(seen) == 60
    assert seen[59].maps["conv1"].shape[0] == 16


@pytest.mark.parametrize("transport", ["rest", "grpc"])
@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_the_right_key_nobody_is_answered(stack: Stack, transport: str, key: str | None) -> None:
    with stack.client(transport, api_key=key) as client, pytest.raises(AuthenticationFailed):
        client.predict(PICTURE, model="cifar")


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_an_unknown_model_is_told(stack: Stack, transport: str) -> None:
    with stack.client(transport) as client, pytest.raises(ModelNotFound) as told:
        client.predict(PICTURE, model="nobody")
    found: list[dict[str, object]] = []

    def logged() -> bool:
        lines = stack.compose("logs", "--no-log-prefix", "gateway").splitlines()
        found[:] = [line for line in map(json.loads, lines) if line.get("request_id") == told.value.request_id]
        return bool(found)

    wait_until(logged, 20)
    [line] = found
    assert (line["model"], line["attempts"]) == ("nobody", 1)
    assert (line["status"], line["grpc_status"]) == {"rest": (404, None), "grpc": (200, "NotFound")}[transport]


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_requests_are_spread_over_the_replicas(stack: Stack, transport: str) -> None:
    def counts() -> dict[str, int]:
        found = re.findall(rf"^{transport}::([\d.]+):\d+::rq_success::(\d+)", stack.admin("/clusters"), re.MULTILINE)
        return {address: int(count) for address, count in found}

    before = counts()
    with stack.client(transport) as client:
        for _ in range(60):
            client.predict(PICTURE, model="cifar")
    spread = sorted(count - before.get(address, 0) for address, count in counts().items())[-3:]
    assert sum(spread) >= 60
    assert spread[0] >= 8  # Two random choices, the less busy of them: 20 each, give or take.


def test_keys_are_read_again_when_they_change(stack: Stack) -> None:
    path = stack.secrets / "api-keys/keys.yaml"
    text = path.read_text()
    second = "second-key-of-the-test-0123456789"

    def accepted(key: str) -> bool:
        with stack.client("rest", api_key=key) as client:
            try:
                client.model_card("cifar")
            except AuthenticationFailed:
                return False
            return True

    assert not accepted(second)
    replace(path, text + f"        - {{client: second, key: {hashlib.sha256(second.encode()).hexdigest()}}}\n")
    wait_until(lambda: accepted(second), 10)
    assert not accepted(hashlib.sha256(second.encode()).hexdigest())  # What the file holds is no key.
    assert accepted(stack.key)
    replace(path, text)
    wait_until(lambda: not accepted(second), 10)
    replace(path, "not: a configuration\n")  # A broken file changes nothing.
    assert accepted(stack.key)
    replace(path, text)
    log = stack.compose("logs", "gateway")
    assert second not in log
    assert stack.key not in log


def test_keys_of_any_length_are_compared_by_their_digests(stack: Stack) -> None:
    path = stack.secrets / "api-keys/keys.yaml"
    text = path.read_text()
    keys = [secrets.token_hex(129)[:length] for length in (1, 55, 56, 63, 64, 65, 119, 120, 128, 256, 257)]
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    replace(path, text + "".join(f"        - {{client: c{n}, key: {one}}}\n" for n, one in enumerate(digests)))

    def statuses() -> list[int]:
        with http(stack) as client:
            return [client.get("/predictions/cifar", headers={"x-api-key": key}).status_code for key in keys]

    wait_until(lambda: statuses() == [200] * 10 + [401], 20)  # The last is longer than a key may be.
    replace(path, text)
    wait_until(lambda: statuses() == [401] * 11, 20)


def test_a_request_id_is_made_or_kept_returned_and_logged(stack: Stack) -> None:
    with http(stack) as client:
        made = client.get("/predictions/cifar").headers["x-request-id"]
        kept = client.get("/predictions/cifar?secret=1", headers={"x-request-id": "mine-4711"}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f-]{36}", made)
    assert kept == "mine-4711"
    lines: dict[str, dict[str, object]] = {}

    def logged() -> bool:
        for line in stack.compose("logs", "--no-log-prefix", "gateway").splitlines():
            entry = json.loads(line)
            if "request_id" in entry:  # The other lines are Envoy's own.
                lines[entry["request_id"]] = entry
        return made in lines and kept in lines

    wait_until(logged, 20)
    entry = lines[kept]
    assert (entry["method"], entry["path"], entry["status"], entry["key"]) == (
        "GET",
        "/predictions/cifar",
        400,  # It had a query string, which the log does not show.
        "first",
    )


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_a_failed_request_has_one_id_in_reply_and_logs(stack: Stack, transport: str) -> None:
    with stack.client(transport) as client, pytest.raises(BadImage) as refused:
        client.predict(b"no picture", model="cifar")
    wanted = refused.value.request_id
    assert wanted

    def lines(service: str) -> list[dict[str, object]]:
        said = stack.compose("logs", "--no-log-prefix", service).splitlines()
        found = [json.loads(line) for line in said if line.startswith("{") and wanted in line]
        return [line for line in found if line["request_id"] == wanted]

    wait_until(lambda: bool(lines("gateway") and lines("torchserve")), 20)
    assert lines("gateway")[0]["path"] == PATHS[transport]
    assert [line["code"] for line in lines("torchserve")] == ["bad_image"]


def test_explanations_come_through_as_predictions_do(stack: Stack) -> None:
    with stack.client("rest") as asking:
        version = asking.model_card("cifar").version
    with http(stack) as client:
        for path in ("/explanations/cifar", f"/explanations/cifar/{version}"):
            answer = client.post(path, content=PICTURE)
            assert answer.status_code == 200
            assert answer.json()["results"][0]["explanation"]["method"] == "grad_cam"
    for transport in ("rest", "grpc"):
        with stack.client(transport) as asking:
            assert asking.explain(PICTURE, model="cifar", method="occlusion").heat.shape == (1, 32, 32)


def test_the_key_does_not_reach_the_replica_and_no_replica_is_named(stack: Stack) -> None:
    with http(stack) as client:
        headers = client.get("/predictions/cifar").headers
    assert not [name for name in headers if name.startswith("x-envoy")]
    assert "hide_credentials: true" in (stack.secrets / "api-keys/keys.yaml").read_text()


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_too_many_requests_a_second_are_told_when_to_come_back(stack: Stack, transport: str) -> None:
    bucket = "max_tokens: 2000, tokens_per_fill: 1000"
    small = "max_tokens: 3, tokens_per_fill: 1"
    stack.reconfigure("http.yaml", bucket, small)
    refusals: list[Overloaded] = []

    def refused() -> bool:
        with stack.client(transport) as client:
            for _ in range(30):
                try:
                    client.model_card("cifar")
                except Overloaded as error:
                    refusals.append(error)
        return bool(refusals)

    try:
        wait_until(refused, 20)
    finally:
        stack.reconfigure("http.yaml", small, bucket)
    assert refusals[0].retry_after_s == 1

    def let_in() -> bool:
        with stack.client(transport) as client:  # A connection keeps the configuration it was opened under.
            return all(client.ready("cifar") for _ in range(10))

    wait_until(let_in, 20)


def test_too_many_requests_at_once_are_told_when_to_come_back(stack: Stack) -> None:
    import threading

    stack.reconfigure("clusters.yaml", "max_requests: 48", "max_requests: 1")
    stack.reconfigure("clusters.yaml", "max_pending_requests: 32", "max_pending_requests: 1")
    statuses: list[tuple[int, str | None, str]] = []

    def ask() -> None:
        with http(stack) as client:
            for _ in range(20):
                answer = client.post("/predictions/cifar", content=PICTURE)
                statuses.append((answer.status_code, answer.headers.get("retry-after"), answer.text))

    try:
        wait_until(lambda: stack.statistic(r"cluster_manager\.cluster_(modified|updated)") > 0, 20)
        wait_until(lambda: stack.balanced() == 3, 20)
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stack.reconfigure("clusters.yaml", "max_requests: 1", "max_requests: 48")
        stack.reconfigure("clusters.yaml", "max_pending_requests: 1", "max_pending_requests: 32")
        wait_until(lambda: stack.balanced() == 3, 20)
    refused = [entry for entry in statuses if entry[0] != 200]
    assert refused
    for status, retry_after, body in refused:
        assert (status, retry_after) == (503, "1")
        assert json.loads(body)["error"]["code"] == "overloaded"


def test_prometheus_sees_every_replica_and_the_gateway(stack: Stack) -> None:
    def query(expression: str) -> list[tuple[dict[str, str], float]]:
        url = "http://127.0.0.1:9090"
        text = stack.compose("exec", "-T", "prometheus", "promtool", "query", "instant", "-o", "json", url, expression)
        return [(series["metric"], float(series["value"][1])) for series in json.loads(text)]

    jobs = ["alertmanager", "gateway", "probe", "prometheus", *["torchserve"] * 3]
    wait_until(lambda: sorted(m["job"] for m, up in query("up") if up == 1) == jobs, 60)
    with stack.client("rest") as client:  # Without a request there is no histogram, and Envoy renews it now and then.
        client.predict(PICTURE, model="cifar")
    buckets = 'sum by (le) (envoy_cluster_upstream_rq_time_bucket{envoy_cluster_name="rest"})'
    wait_until(lambda: {"0.5", "1", "5", "10000"} <= {metric["le"] for metric, _ in query(buckets)}, 60)


def test_the_door_speaks_no_old_tls_and_nothing_plain(stack: Stack) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{stack.port}/predictions/cifar")
    old = ssl.create_default_context(cafile=str(stack.ca_file))
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.TransportError):
        httpx.get(f"https://localhost:{stack.port}/predictions/cifar", verify=old)


def test_plain_and_keyless_are_settings_of_their_own(stack: Stack) -> None:
    network = next(name for name in stack.inspect("gateway")["NetworkSettings"]["Networks"] if name.endswith("door"))
    settings = {"CONVSCOPE_DOOR": "plain", "CONVSCOPE_API_KEYS": str(stack.configuration / "open")}
    service = json.loads(stack.compose("config", "--format", "json", **settings))["services"]["gateway"]
    keys = f"{stack.configuration}/open:/run/secrets/api_keys:ro"
    configuration = f"{stack.configuration}:/etc/envoy:ro"
    container = stack.docker(
        "run", "-d", "--rm", "--read-only", "--network", network, "--user", service["user"], "-p", "127.0.0.1::8443",
        "-v", configuration, "-v", keys, service["image"], *service["command"],
    ).strip()  # fmt: skip
    try:
        address = stack.docker("port", container, "8443").strip()

        def answer() -> str:
            try:
                return str(httpx.get(f"http://{address}/models", trust_env=False).json()["error"]["code"])
            except httpx.TransportError:
                return "nothing yet"

        wait_until(lambda: answer() == "not_found", 20)  # Plain, and past the keys.
    finally:
        stack.docker("kill", container)
