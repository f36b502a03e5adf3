"""The gateway of docker-compose.yml before stand-ins for replicas: what it starts with, keeps, counts and survives."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest

from tests.collector import SERVER, collecting
from tests.docker.stack import ROOT, Stack, make_secrets, replace, wait_until
from tests.docker.standin import METHOD

LONG_S = 10.0  # Much longer than the 3 s that a silent replica may cost, much shorter than the 120 s that it used to.


class Gateway(Stack):
    """A stack of the gateway and stand-ins alone."""

    def __init__(self, work: Path) -> None:
        super().__init__(work, models=())
        self.environment |= {
            "COMPOSE_PROJECT_NAME": f"{self.environment['COMPOSE_PROJECT_NAME']}gateway",
            "COMPOSE_FILE": f"{ROOT}/docker-compose.yml:{ROOT}/tests/docker/standins.yml",
            "CONVSCOPE_STANDIN": str(ROOT / "tests/docker/standin.py"),
        }
        self.certificate = self.secrets / "certificate"
        self.keys = self.secrets / "api-keys/keys.yaml"

    def up(self, replicas: int) -> None:
        self.compose(
            "up", "-d", "--wait", "--no-recreate", "--scale", f"torchserve={replicas}", "torchserve", "gateway"
        )
        wait_until(lambda: self.balanced() == replicas, 30)

    def start_gateway(self) -> subprocess.CompletedProcess[str]:
        """Make the gateway's container anew and wait until it is healthy, or is known not to become so."""
        command = ["docker", "compose", "up", "-d", "--no-deps", "--force-recreate", "--wait", "gateway"]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)

    def log(self) -> list[dict[str, Any]]:
        """Return the gateway's log, each line of which has to be JSON."""
        return [json.loads(line) for line in self.compose("logs", "--no-log-prefix", "gateway").splitlines() if line]

    def logged(self, **fields: Any) -> list[dict[str, Any]]:
        """Wait for the access log's lines with these fields."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [line for line in self.log() if fields.items() <= line.items()]
            return bool(found)

        wait_until(there, 30)
        return found

    def metrics(self, name: str) -> dict[str, float]:
        """Return Prometheus' series of a name, `{labels}` to value."""
        request = "GET /metrics HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n"
        script = f"exec 3<>/dev/tcp/127.0.0.1/9902; printf '{request}' >&3; cat <&3"
        text = self.compose("exec", "-T", "gateway", "bash", "-c", script)
        return {labels: float(value) for labels, value in re.findall(rf"^{name}(\{{.*\}}) (\S+)\s*$", text, re.M)}

    def rest(self, path: str, **options: Any) -> httpx.Response:
        """Send one REST request, a GET unless it has content."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        headers = {"x-api-key": self.key} | options.pop("headers", {})
        with httpx.Client(verify=context, timeout=options.pop("timeout", 60), trust_env=False) as client:
            method = options.pop("method", "POST" if "content" in options else "GET")
            return client.request(method, f"https://localhost:{self.port}{path}", headers=headers, **options)

    def rpc(
        self,
        model: str,
        *,
        timeout_s: float = 60,
        key: str | None = None,
        method: str = METHOD,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> PredictionResponse:
        """Send one gRPC request."""
        credentials = grpc.ssl_channel_credentials(self.ca_file.read_bytes())
        request = PredictionsRequest(model_name=model, input={"data": b"picture"})
        with grpc.secure_channel(
            f"localhost:{self.port}", credentials, options=[("grpc.enable_retries", 0)]
        ) as channel:
            call = channel.unary_unary(method, PredictionsRequest.SerializeToString, PredictionResponse.FromString)
            metadata = (("x-api-key", key or self.key), *metadata)
            response: PredictionResponse = call(request, timeout=timeout_s, metadata=metadata)
            return response

    def rpc_status(self, model: str, **options: Any) -> tuple[str, str]:
        """Send one gRPC request that fails; return its status and the first line of its message."""
        with pytest.raises(grpc.RpcError) as caught:
            self.rpc(model, **options)
        return caught.value.code().name, (caught.value.details() or "").split("\n")[0]  # type: ignore[attr-defined]

    def counted(self) -> dict[tuple[str, str, str, str], float]:
        """Return `envoy_gateway_requests`, by transport, status, gRPC status and attempts."""
        found: dict[tuple[str, str, str, str], float] = {}
        for labels, value in self.metrics("envoy_gateway_requests").items():
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            name = tags["transport"], tags["status"], tags["grpc_status"], tags["attempts"]
            found[name] = found.get(name, 0) + value
        return found


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    work = Path(tempfile.mkdtemp(prefix="convscope-gateway-"))
    work.chmod(0o755)
    running = Gateway(work)
    try:
        running.up(3)
        yield running
    finally:
        running.down()
        shutil.rmtree(work)


def overwrite(text: str) -> Any:
    return lambda path: path.write_text(text)


def misspell(old: str, new: str) -> Any:
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def another_key(path: Path) -> None:
    subprocess.run(
        ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-out", path], check=True, capture_output=True
    )
    path.chmod(0o644)


FILTERS = "extension_config_discovery"
FAULTS = {
    "key unreadable": ("certificate/tls.key", lambda path: path.chmod(0o600)),
    "key of another certificate": ("certificate/tls.key", another_key),
    "key missing": ("certificate/tls.key", Path.unlink),
    "certificate empty": ("certificate/tls.crt", overwrite("")),
    "certificate garbled": ("certificate/tls.crt", overwrite("garbled\n")),
    "keys misspelt": ("api-keys/keys.yaml", misspell("credentials:", "credentails:")),
    "routes misspelt": ("http.yaml", misspell("stat_prefix", "stat_prefx")),
    "routes no YAML": ("http.yaml", misspell("stat_prefix: public", "stat_prefix: [public")),
    "clusters misspelt": ("clusters.yaml", misspell("lb_policy", "lb_polcy")),
    "listener misspelt": ("tls.yaml", misspell("socket_address", "sockt_address")),
    "limits misspelt": ("limits.yaml", misspell("descriptors", "descriptrs")),
    "script broken": ("model.lua", misspell("local function", "loca function")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gateway_that_could_serve_nobody_does_not_become_healthy_and_names_the_file(
    gateway: Gateway, fault: str
) -> None:
    name, spoil = FAULTS[fault]
    folder = gateway.secrets if "/" in name else gateway.configuration
    shutil.copytree(folder, kept := folder.with_name("kept"))
    try:
        spoil(folder / name)
        assert gateway.start_gateway().returncode
        lines = [json.loads(line) for line in gateway.compose("logs", "--no-log-prefix", "gateway").splitlines()]
    finally:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        shutil.rmtree(kept)
    wanted = "http.yaml" if name.endswith(".lua") else Path(name).name
    assert [line for line in lines if line["level"] == "critical" and wanted in line["message"]]
    assert gateway.start_gateway().returncode == 0


@pytest.mark.parametrize(
    ("name", "spoil", "metric"),
    [
        ("http.yaml", misspell("stat_prefix", "stat_prefx"), f"{FILTERS}_network_filter_http_update_rejected"),
        ("http.yaml", overwrite("[\n"), f"{FILTERS}_network_filter_http_update_failure"),
        ("clusters.yaml", misspell("lb_policy", "lb_polcy"), "cluster_manager_cds_update_rejected"),
        ("tls.yaml", misspell("socket_address", "sockt_address"), "listener_manager_lds_update_rejected"),
        ("limits.yaml", misspell("descriptors", "descriptrs"), f"{FILTERS}_http_filter_key_limits_update_rejected"),
        ("keys.yaml", misspell("client: first", "clint: first"), f"{FILTERS}_http_filter_api_keys_update_rejected"),
        ("keys.yaml", overwrite("[\n"), f"{FILTERS}_http_filter_api_keys_update_failure"),
    ],
)  # fmt: skip
def test_a_bad_file_is_counted_and_the_one_before_stays_in_service(
    gateway: Gateway, name: str, spoil: Any, metric: str
) -> None:
    path = gateway.keys if name == "keys.yaml" else gateway.configuration / name
    text = path.read_text()
    before = gateway.metrics(f"envoy_{metric}")["{}"]
    spoilt = path.with_name("spoilt")
    spoilt.write_text(text)
    spoil(spoilt)
    try:
        replace(path, spoilt.read_text())
        spoilt.unlink()
        wait_until(lambda: gateway.metrics(f"envoy_{metric}")["{}"] > before, 20)
        assert gateway.rest("/predictions/any").status_code == 200
        assert gateway.rpc("any").prediction
        assert gateway.compose("exec", "-T", "gateway", "bash", "/etc/envoy/health.sh").strip() == "ready"
    finally:
        replace(path, text)
    assert gateway.logged(level="warning", logger="config")


def test_a_renewed_key_that_cannot_be_read_leaves_the_certificate_in_service_and_is_counted_and_explained(
    gateway: Gateway,
) -> None:
    def served() -> str:
        return ssl.get_server_certificate(("localhost", gateway.port))

    def number(name: str) -> float:
        return sum(gateway.metrics(name).values())

    before = served()
    failed = number("envoy_sds_key_rotation_failed")
    shutil.copytree(gateway.certificate, kept := gateway.certificate.with_name("kept"), symlinks=True)
    fresh = gateway.certificate.with_name("fresh")
    make_secrets(fresh)
    try:
        for name, mode in {"tls.crt": 0o644, "tls.key": 0o600}.items():
            file = shutil.copyfile(fresh / "certificate" / name, fresh / name)  # A link, as `make secrets` makes it.
            file.chmod(mode)
            file.rename(gateway.certificate / name)
        wait_until(lambda: number("envoy_sds_key_rotation_failed") > failed, 20)
        wait_until(lambda: any("unable to read file" in str(line.get("message")) for line in gateway.log()), 20)
        assert served() == before
        renewed = number("envoy_listener_server_ssl_socket_factory_ssl_context_update_by_sds")
        (gateway.certificate / "tls.key").chmod(0o644)
        replace(gateway.certificate / "tls.key", (gateway.certificate / "tls.key").read_text())
        wait_until(lambda: served() != before, 20)
        assert number("envoy_listener_server_ssl_socket_factory_ssl_context_update_by_sds") > renewed
    finally:
        for name in ("tls.crt", "tls.key"):
            (kept / name).rename(gateway.certificate / name)
        shutil.rmtree(kept)
        shutil.rmtree(fresh)
    wait_until(lambda: served() == before, 20)


def test_what_callers_do_wrong_gets_a_status_of_its_own_and_is_not_sent_again(gateway: Gateway) -> None:
    before = gateway.counted()
    assert gateway.rest("/predictions/missing").status_code == 404
    assert gateway.rest("/predictions/old/9").status_code == 404
    assert gateway.rest("/predictions/any?layers=all").status_code == 400
    assert gateway.rest("/models").status_code == 404
    assert gateway.rest("/predictions/any", method="DELETE").status_code == 404
    assert gateway.rest("/predictions/any", headers={"x-api-key": "wrong"}).status_code == 401
    assert gateway.rest("/predictions/any", content=bytes(64 * 2**20 + 1)).status_code == 413
    with pytest.raises(httpx.TimeoutException):
        gateway.rest("/predictions/slow-1", timeout=0.2)
    assert gateway.rpc_status("missing") == ("NOT_FOUND", "Model not found: missing")
    assert gateway.rpc_status("old") == ("NOT_FOUND", "Model version: 9 does not exist for model: old")
    assert gateway.rpc_status("") == ("INVALID_ARGUMENT", "Parameter model_name is required.")
    assert gateway.rpc_status("any", key="wrong")[0] == "UNAUTHENTICATED"
    assert gateway.rpc_status("any", method="/a.Service/Other")[0] == "UNIMPLEMENTED"
    assert gateway.rpc_status("slow-1", timeout_s=0.2)[0] == "DEADLINE_EXCEEDED"
    added: dict[tuple[str, str, str, str], float] = {}

    def count() -> bool:
        added.clear()
        added.update(
            {name: n - before.get(name, 0) for name, n in gateway.counted().items() if n > before.get(name, 0)}
        )
        return sum(added.values()) == 14

    wait_until(count, 20)
    ours = "Unknown|Internal|Unavailable|DataLoss|ResourceExhausted"
    assert not [name for name in added if name[1].startswith("5") or re.fullmatch(ours, name[2]) or name[3] == "2"]
    assert added["grpc", "200", "NotFound", "1"] == 2
    assert not gateway.metrics("envoy_gateway_abandoned")
    [line] = gateway.logged(grpc_status="NotFound", model="missing")
    assert (line["attempts"], line["grpc_message"][:24]) == (1, "Model not found: missing")


def test_a_full_queue_is_unavailable_over_grpc_and_what_a_worker_dies_of_stays_internal(gateway: Gateway) -> None:
    assert gateway.rpc_status("full")[0] == "UNAVAILABLE"
    assert gateway.rpc_status("internal")[0] == "INTERNAL"


def test_a_caller_who_gives_up_after_seconds_counts_as_failed(gateway: Gateway) -> None:
    with pytest.raises(httpx.TimeoutException):
        gateway.rest("/predictions/slow-8", timeout=6)
    assert gateway.rpc_status("slow-8", timeout_s=6)[0] == "DEADLINE_EXCEEDED"
    wait_until(lambda: sum(gateway.metrics("envoy_gateway_abandoned").values()) == 2, 20)


@pytest.mark.parametrize("transport", ["rest", "grpc"])
def test_a_request_that_takes_long_is_answered_and_once_that_is_known_not_sent_twice(
    gateway: Gateway, transport: str
) -> None:
    ask = {"rest": lambda: gateway.rest("/predictions/slow-3").json(), "grpc": lambda: gateway.rpc("slow-3")}[transport]

    def sent_twice() -> float:
        status = ("200", "") if transport == "rest" else ("200", "OK")
        return gateway.counted().get((transport, *status, "2"), 0)

    for _ in range(6):  # Each of two threads of the gateway learns by itself.
        ask()
    before = sent_twice()
    for _ in range(2):
        assert ask()
    assert sent_twice() == before


def test_a_long_grpc_request_is_not_cut_off_by_pings(gateway: Gateway) -> None:
    assert gateway.rpc("slow-8").prediction


class Callers:
    """Callers of both transports, each with a request every tenth of a second, whose waits and failures are kept."""

    def __init__(self, gateway: Gateway, model: str = "slow-0.05") -> None:
        self._gateway, self._model = gateway, model
        self._stop = threading.Event()
        self.waits: dict[str, list[tuple[float, float]]] = {"rest": [], "grpc": []}
        self.failures: list[str] = []

    def __enter__(self) -> Callers:
        self._pool = ThreadPoolExecutor(64)
        self._clock = threading.Thread(target=self._run)
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._clock.join()
        self._pool.shutdown()

    def _run(self) -> None:
        context = ssl.create_default_context(cafile=str(self._gateway.ca_file))
        limits = httpx.Limits(max_connections=64)
        url = f"https://localhost:{self._gateway.port}/predictions/{self._model}"
        headers = {"x-api-key": self._gateway.key}
        credentials = grpc.ssl_channel_credentials(self._gateway.ca_file.read_bytes())
        options = [("grpc.enable_retries", 0)]
        request = PredictionsRequest(model_name=self._model, input={"data": b"picture"})
        with (
            httpx.Client(verify=context, timeout=60, limits=limits, headers=headers, trust_env=False) as client,
            grpc.secure_channel(f"localhost:{self._gateway.port}", credentials, options=options) as channel,
        ):
            call = channel.unary_unary(METHOD, PredictionsRequest.SerializeToString, PredictionResponse.FromString)
            metadata = (("x-api-key", self._gateway.key),)
            asks = {
                "rest": lambda: client.get(url).raise_for_status(),
                "grpc": lambda: call(request, timeout=60, metadata=metadata),
            }
            pending = []
            while not self._stop.wait(0.1):
                pending += [self._pool.submit(self._time, transport, ask) for transport, ask in asks.items()]
            for one in pending:
                one.result()

    def _time(self, transport: str, ask: Any) -> None:
        started = time.monotonic()
        try:
            ask()
        except (httpx.HTTPError, grpc.RpcError) as error:
            self.failures.append(f"{transport}: {error}")
        self.waits[transport].append((started, time.monotonic() - started))

    def longest_s(self, transport: str) -> float:
        return max(wait for _, wait in self.waits[transport])


def silence(gateway: Gateway, replica: str) -> None:
    gateway.docker("pause", replica)


def kill(gateway: Gateway, replica: str) -> None:
    gateway.docker("kill", replica)


def unplug(gateway: Gateway, replica: str) -> None:
    gateway.docker("network", "disconnect", f"{gateway.environment['COMPOSE_PROJECT_NAME']}_serving", replica)


@pytest.mark.parametrize("mishap", [silence, kill, unplug])
def test_no_request_is_held_by_a_replica_that_is_silent_or_gone(gateway: Gateway, mishap: Any) -> None:
    victim = gateway.replicas()[0]
    try:
        with Callers(gateway) as callers:
            time.sleep(2)
            started = time.monotonic()
            mishap(gateway, victim)
            away_s = wait_until(lambda: gateway.balanced() == 2, 20)
            time.sleep(max(0.0, 8 - (time.monotonic() - started)))
    finally:
        if mishap is silence:
            gateway.docker("unpause", victim)
        else:
            gateway.docker("rm", "-f", victim)
            gateway.up(3)
        wait_until(lambda: gateway.balanced() == 3, 30)
    longest = {transport: callers.longest_s(transport) for transport in callers.waits}
    sent = sum(map(len, callers.waits.values()))
    print(
        f"{mishap.__name__}: away after {away_s:.1f} s; {sent} sent, {len(callers.failures)} failed; longest {longest}"
    )
    assert callers.failures == []
    assert max(longest.values()) < LONG_S


def test_requests_and_bytes_are_counted_by_the_name_of_the_key_which_a_caller_cannot_choose(gateway: Gateway) -> None:
    def series() -> dict[str, float]:
        return gateway.metrics("envoy_gateway_key_requests")

    first = '{key="first",transport="rest",status="200",grpc_status=""}'
    nobody = '{key="none",transport="rest",status="401",grpc_status=""}'
    before = series()
    size = gateway.metrics("envoy_gateway_key_request_bytes")['{key="first"}']
    for key in (gateway.key, "wrong"):
        gateway.rest("/predictions/any", content=b"0123456789", headers={"x-api-key": key, "x-convscope-caller": "me"})
    wait_until(lambda: series().get(first, 0) == before.get(first, 0) + 1, 20)
    wait_until(lambda: series().get(nobody, 0) == before.get(nobody, 0) + 1, 20)
    assert gateway.metrics("envoy_gateway_key_request_bytes")['{key="first"}'] == size + 10
    assert gateway.metrics("envoy_gateway_key_reply_bytes")['{key="first"}'] > 0
    assert not [labels for labels in series() if 'key="me"' in labels]


def test_requests_of_the_probe_are_counted_by_its_key_alone(gateway: Gateway) -> None:
    def probed() -> float:
        return gateway.metrics("envoy_gateway_key_requests").get(
            '{key="probe",transport="rest",status="200",grpc_status=""}', 0
        )

    before, counted = probed(), gateway.counted()
    key = (gateway.secrets / "probe-key").read_text().strip()
    gateway.rest("/predictions/any", content=b"0123456789", headers={"x-api-key": key})
    wait_until(lambda: probed() == before + 1, 20)
    assert gateway.counted() == counted


def test_a_key_has_a_limit_of_its_own(gateway: Gateway) -> None:
    text, limits = gateway.keys.read_text(), (gateway.configuration / "limits.yaml").read_text()
    digest = hashlib.sha256(b"second").hexdigest()
    bucket = "{max_tokens: 2, tokens_per_fill: 1, fill_interval: 60s}"
    entry = f"- {{entries: [{{key: key, value: second}}], token_bucket: {bucket}}}\n"
    default = "        - {entries: [{key: key}]"
    assert default in limits
    try:
        replace(gateway.keys, text + f"        - {{client: second, key: {digest}}}\n")
        replace(gateway.configuration / "limits.yaml", limits.replace(default, f"        {entry}{default}"))

        def refused() -> httpx.Response | None:
            answer = gateway.rest("/predictions/any", headers={"x-api-key": "second"})
            return answer if answer.status_code == 429 else None

        wait_until(lambda: refused() is not None, 20)
        answer = refused()
        assert answer is not None
        assert (answer.json()["error"]["code"], answer.headers["retry-after"]) == ("overloaded", "1")
        assert gateway.rpc_status("any", key="second")[0] == "RESOURCE_EXHAUSTED"
        assert gateway.rest("/predictions/any").status_code == 200
        assert gateway.rpc("any").prediction
    finally:
        replace(gateway.keys, text)
        replace(gateway.configuration / "limits.yaml", limits)
    gateway.logged(key="second", status=429)
    wait_until(lambda: gateway.rest("/predictions/any", headers={"x-api-key": "second"}).status_code == 401, 20)


def test_a_change_of_the_keys_is_in_the_log_with_their_names(gateway: Gateway) -> None:
    text = gateway.keys.read_text()
    digest = hashlib.sha256(b"audited").hexdigest()
    changed = text + f"        - {{client: audited, key: {digest}}}\n"
    try:
        replace(gateway.keys, changed)

        def told() -> bool:
            lines = [str(line["message"]) for line in gateway.log() if line.get("logger") == "audit"]
            return any(hashlib.sha256(changed.encode()).hexdigest() in line and "audited" in line for line in lines)

        wait_until(told, 60)
    finally:
        replace(gateway.keys, text)


def test_requests_without_a_fault_can_be_sampled_and_all_others_are_logged(gateway: Gateway) -> None:
    everything, nothing = "percent_sampled: {numerator: 100", "percent_sampled: {numerator: 0"
    taken = f"envoy_{FILTERS}_network_filter_http_update_success"
    before = gateway.metrics(taken)["{}"]
    gateway.reconfigure("http.yaml", everything, nothing)
    try:
        wait_until(lambda: gateway.metrics(taken)["{}"] > before, 20)
        for path in ("any", "slow-1.2", "missing", "internal"):
            gateway.rest(f"/predictions/{path}", headers={"x-request-id": f"sampled-{path}"})

        def ids() -> set[str]:
            return {str(line["request_id"]) for line in gateway.log() if "request_id" in line}

        wait_until(lambda: {"sampled-slow-1.2", "sampled-missing", "sampled-internal"} <= ids(), 30)
        assert "sampled-any" not in ids()
    finally:
        gateway.reconfigure("http.yaml", nothing, everything)


def test_the_gateway_is_healthy_without_a_replica_and_says_so_to_callers(gateway: Gateway) -> None:
    gateway.compose("stop", "torchserve")
    try:
        assert gateway.start_gateway().returncode == 0
        answer = gateway.rest("/predictions/any")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert "no healthy upstream" in answer.json()["error"]["message"]
        assert gateway.rpc_status("any") == ("UNAVAILABLE", "no healthy upstream")
    finally:
        gateway.compose("start", "torchserve")
        wait_until(lambda: gateway.balanced() == 3, 30)


@pytest.mark.parametrize("key", [{}, {"x-api-key": "wrong"}], ids=["no key", "wrong key"])
def test_the_description_of_the_api_needs_no_key_and_all_else_does(gateway: Gateway, key: dict[str, str]) -> None:
    context = ssl.create_default_context(cafile=str(gateway.ca_file))
    with httpx.Client(
        base_url=f"https://localhost:{gateway.port}", verify=context, trust_env=False, headers=key
    ) as caller:
        answer = caller.get("/openapi.json")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.content == (gateway.configuration / "openapi.json").read_bytes()
        for method, path in (("GET", "/predictions/any"), ("POST", "/openapi.json"), ("GET", "/openapi.json/any")):
            assert caller.request(method, path).status_code == 401
        answer = caller.get("/openapi.json", headers={"content-type": "application/grpc"})
        assert answer.headers["grpc-status"] == "16"


def test_a_new_description_is_served_without_a_restart(gateway: Gateway) -> None:
    path = gateway.configuration / "openapi.json"
    text = path.read_text()
    try:
        replace(path, '{"openapi": "3.1.0"}')
        wait_until(lambda: gateway.rest("/openapi.json").json() == {"openapi": "3.1.0"}, 20)
    finally:
        replace(path, text)
    wait_until(lambda: gateway.rest("/openapi.json").text == text, 20)


PARENT = "00f067aa0ba902b7"


def traceparent(trace: str, flags: str = "01") -> str:
    return f"00-{trace * 32}-{PARENT}-{flags}"


def ask_for_traceparents(gateway: Gateway, given: str) -> list[str]:
    """Return what a replica gets over REST and over gRPC."""
    over_rest = gateway.rest("/predictions/traceparent", headers={"traceparent": given}).text
    return [over_rest, gateway.rpc("traceparent", metadata=(("traceparent", given),)).prediction.decode()]


def envoys_command(gateway: Gateway) -> list[str]:
    words = "tr '\\0' '\\n' <$file 2>/dev/null"
    script = f"for file in /proc/[0-9]*/cmdline; do {words} | grep -q '^envoy$' && {words} && exit; done; exit 1"
    _, *arguments = gateway.compose("exec", "-T", "gateway", "bash", "-c", script).splitlines()
    return arguments


def test_without_a_collector_a_trace_context_passes_and_envoy_starts_as_ever(gateway: Gateway) -> None:
    assert ask_for_traceparents(gateway, traceparent("a")) == [traceparent("a")] * 2
    command = json.loads(gateway.compose("config", "--format", "json"))["services"]["gateway"]["command"]
    assert envoys_command(gateway) == [word.replace("$$", "$") for word in command]


def test_with_a_collector_the_gateway_has_spans_and_is_the_replicas_parent(gateway: Gateway) -> None:
    network = f"{gateway.environment['COMPOSE_PROJECT_NAME']}_door"
    here = gateway.docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", network).strip()
    with collecting("0.0.0.0") as collector:
        port = collector.endpoint.rpartition(":")[2]
        gateway.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{here}:{port}"
        try:
            assert gateway.start_gateway().returncode == 0
            wait_until(lambda: gateway.balanced() == 3, 30)
            unsampled = ask_for_traceparents(gateway, traceparent("b", "00"))
            received = ask_for_traceparents(gateway, traceparent("c"))
            gateway.reconfigure("http.yaml", "server_name: convscope", "server_name: changed")
            wait_until(lambda: gateway.rest("/predictions/any").headers["server"] == "changed", 20)
            assert gateway.make("check-config").returncode == 0
            wait_until(lambda: len(collector.of("c" * 32)) == 4, 30)
        finally:
            del gateway.environment["OTEL_EXPORTER_OTLP_ENDPOINT"]
            gateway.reconfigure("http.yaml", "server_name: changed", "server_name: convscope")
            assert gateway.start_gateway().returncode == 0
            wait_until(lambda: gateway.balanced() == 3, 30)
    assert [one[:36] + one[52:] for one in unsampled] == [traceparent("b", "00").replace(PARENT, "")] * 2
    assert not collector.of("b" * 32)
    spans = {span.id: span for span in collector.of("c" * 32)}
    for context in received:
        _, trace, span, flags = context.split("-")
        assert (trace, flags) == ("c" * 32, "01")
        outer = spans[spans[span].parent]
        assert (outer.parent, outer.kind) == (PARENT, SERVER)
        assert outer.began <= spans[span].began <= spans[span].ended <= outer.ended
        assert outer.resource["service.name"] == "convscope-gateway"
        assert "?" not in str(outer.attributes)
    assert "traceparent" in {span.attributes.get("convscope.model") for span in spans.values()}


def test_a_collector_that_cannot_be_named_so_keeps_the_gateway_from_starting(gateway: Gateway) -> None:
    gateway.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = "collector:4317"
    try:
        assert gateway.start_gateway().returncode
        assert [line for line in gateway.log() if "OTEL_EXPORTER_OTLP_ENDPOINT must be" in line.get("message", "")]
        ended = gateway.make("check-config")
        assert (ended.returncode != 0, "OTEL_EXPORTER_OTLP_ENDPOINT must be" in ended.stdout) == (True, True)
    finally:
        del gateway.environment["OTEL_EXPORTER_OTLP_ENDPOINT"]
        assert gateway.start_gateway().returncode == 0
