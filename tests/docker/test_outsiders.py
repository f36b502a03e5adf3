"""What callers without permission may try: each attempt is rejected with the right code, and harms nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import grpc
import pytest
from convscope import ImageTooLarge
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest

from tests.docker.bytewise import connect, head, receive
from tests.docker.stack import ROOT, WORKER, Stack

SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"
PICTURE = (ROOT / "samples/cat.png").read_bytes()
MEGABYTE = 1024 * 1024


@pytest.fixture(autouse=True)
def unharmed(stack: Stack) -> Iterator[None]:
    """After every attempt the same workers live, no container has restarted, and callers are answered."""

    def state() -> list[tuple[str, list[str], str]]:
        restarts = "{{.RestartCount}} {{.State.StartedAt}}"
        return [
            (replica, stack.processes(replica, WORKER), stack.docker("inspect", "-f", restarts, replica))
            for replica in sorted(stack.replicas())
        ] + [("gateway", [], stack.docker("inspect", "-f", restarts, stack.inspect("gateway")["Id"]))]

    before = state()
    yield
    assert state() == before
    for transport in ("rest", "grpc"):
        with stack.client(transport) as client:
            assert client.predict(PICTURE, model="cifar").top[0].label == "cat"


def raw(stack: Stack, request: bytes) -> tuple[list[int], str]:
    """Send bytes as they are; return the status of every answer that came, and all that came."""
    with connect(stack) as connection:
        connection.sendall(request)
        said = receive(connection).decode("latin-1")
    return [int(part.split(" ", 1)[0]) for part in said.split("HTTP/1.1 ")[1:]], said


def error_of(said: str) -> str:
    return str(json.loads(said.partition("\r\n\r\n")[2])["error"]["code"])


@pytest.mark.parametrize(
    "line",
    [
        "GET /models",
        "POST /models?url=http://127.0.0.1/x.mar",
        "DELETE /models/cifar",
        "PUT /models/cifar?min_worker=9",
        "POST /workflows?url=http://169.254.169.254/latest",
        "GET /wfpredict/x",
        "GET /ping",
        "GET /metrics",
        "GET /api-description",
        "OPTIONS /",
        "OPTIONS /predictions/cifar",
        "DELETE /predictions/cifar",
        "TRACE /predictions/cifar",
        "HEAD /admin",
        "POST /v1/models/cifar:predict",
        "POST /v2/models/cifar/infer",
        "DELETE /explanations/cifar",
        "GET /explanations/",
        "GET /explanations/cifar/1.0/more",
        "POST /invocations",
        "GET /predictions/",
        "GET /predictions/cifar/1.0/more",
        "GET /stats",
        "POST /quitquitquit",
        "GET /config_dump",
        "GET /",
        "GET /predictions/../models",
        "GET /predictions/cifar/../../models",
        "GET //models",
    ],
)
def test_other_paths_and_methods_do_not_exist(stack: Stack, line: str) -> None:
    statuses, said = raw(stack, head(stack, line, "Content-Length: 0"))
    assert statuses == [404]
    if not line.startswith("HEAD"):
        assert error_of(said) == "not_found"


@pytest.mark.parametrize(
    "path",
    [
        "/predictions/%2e%2e%2fmodels",
        "/predictions/..%2Fmodels",
        "/predictions/..%5cmodels",
        "/predictions/%2e%2e/models",
    ],
)
def test_paths_do_not_climb(stack: Stack, path: str) -> None:
    statuses, said = raw(stack, head(stack, f"GET {path}"))
    assert statuses in ([400], [404])
    assert error_of(said) in ("bad_request", "not_found")


@pytest.mark.parametrize("key", ["", "wrong", "x" * 4000])
def test_a_wrong_key_is_refused_on_every_path(stack: Stack, key: str) -> None:
    for line in ("POST /predictions/cifar", "GET /models", "GET /predictions/nobody"):
        statuses, said = raw(stack, head(stack, line, "Content-Length: 0", key=key))
        assert statuses == [401]
        assert error_of(said) == "unauthorized"


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 4", "Transfer-Encoding: chunked"],
        ["Content-Length: 4", "Content-Length: 5"],
        ["Content-Length: 4, 5"],
        ["Content-Length: -1"],
        ["Content-Length: 0x4"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding : chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: cow"],
        ["Transfer-Encoding:\x0bchunked"],
    ],
    ids=str,
)
def test_no_request_is_smuggled_inside_another(stack: Stack, headers: list[str]) -> None:
    inner = head(stack, "GET /predictions/digits")
    statuses, said = raw(stack, head(stack, "POST /predictions/cifar", *headers) + b"0\r\n\r\n" + inner)
    assert len(statuses) == 1
    assert statuses[0] in (400, 501)
    assert '"model"' not in said


@pytest.mark.parametrize("value", ["a\rb: c", "a\nb: c", "a\0b", "a\r\n b"], ids=repr)
def test_control_characters_in_a_header_are_refused_or_harmless(stack: Stack, value: str) -> None:
    statuses, said = raw(
        stack, head(stack, "GET /predictions/cifar", f"X-Convscope-Layers: {value}", f"X-Request-Id: {value}")
    )
    assert statuses in ([400], [200])
    assert "\r\nb: c" not in said
    assert "\nb: c" not in said


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize(
    "path", ["/predictions/cifar?layers=conv1", "/explanations/cifar/1.0?", "/predictions/cifar?%00"]
)
def test_a_query_string_is_refused_and_not_dropped(stack: Stack, method: str, path: str) -> None:
    statuses, said = raw(stack, head(stack, f"{method} {path}", f"Content-Length: {len(PICTURE)}") + PICTURE)
    assert statuses == [400]
    assert error_of(said) == "bad_request"
    assert "query string" in said


def test_a_query_string_on_another_path_changes_nothing(stack: Stack) -> None:
    statuses, said = raw(stack, head(stack, "GET /ping?layers=conv1"))
    assert (statuses, error_of(said)) == ([404], "not_found")


@pytest.mark.parametrize("length", [[], ["Content-Length: 0"], ["content-length: 0"], ["Transfer-Encoding: chunked"]])
@pytest.mark.parametrize("lie", [[], ["X-Convscope-Method: GET"], ["X-Convscope-Method: POST"]])
def test_the_card_is_for_an_empty_get_alone(stack: Stack, length: list[str], lie: list[str]) -> None:
    end = b"0\r\n\r\n" if length == ["Transfer-Encoding: chunked"] else b""
    statuses, said = raw(stack, head(stack, "GET /predictions/cifar", *length, *lie) + end)
    assert (statuses, '"classes"' in said) == ([200], True)
    for method in ("POST", "PUT"):
        statuses, said = raw(stack, head(stack, f"{method} /predictions/cifar", *length, *lie) + end)
        assert (statuses, error_of(said)) == ([400], "bad_request")


def test_a_repeated_header_is_joined(stack: Stack) -> None:
    headers = ["X-Convscope-Layers: conv2", "Accept: image/gif", "x-convscope-layers: conv1", "Accept: application/*"]
    statuses, said = raw(
        stack, head(stack, "POST /predictions/cifar", *headers, f"Content-Length: {len(PICTURE)}") + PICTURE
    )
    assert statuses == [200]
    assert list(json.loads(said.partition("\r\n\r\n")[2])["results"][0]["maps"]) == ["conv2", "conv1"]


def test_a_header_that_is_not_known_is_refused(stack: Stack) -> None:
    length = f"Content-Length: {len(PICTURE)}"
    statuses, said = raw(stack, head(stack, "POST /predictions/cifar", "X-Convscope-Layer: conv1", length) + PICTURE)
    assert (statuses, error_of(said)) == ([400], "bad_request")


def test_a_thousand_headers_are_refused(stack: Stack) -> None:
    statuses, said = raw(stack, head(stack, "GET /predictions/cifar", *(f"x-{number}: 1" for number in range(1000))))
    assert statuses == [431]
    assert error_of(said) == "bad_request"


def test_a_large_header_is_refused(stack: Stack) -> None:
    statuses, _ = raw(stack, head(stack, "GET /predictions/cifar", "x-large: " + "x" * 20000))
    assert statuses == [431]


def test_an_oversized_body_is_refused(stack: Stack) -> None:
    with connect(stack) as connection:
        connection.sendall(head(stack, "POST /predictions/cifar", f"Content-Length: {65 * MEGABYTE}"))
        try:
            for _ in range(65):
                connection.sendall(bytes(MEGABYTE))
        except OSError:
            pass  # It answered and closed before all was sent.
        said = receive(connection).decode("latin-1")
    assert said.startswith("HTTP/1.1 413")
    with stack.client("rest") as client, pytest.raises(ImageTooLarge):
        client.predict([bytes(13 * MEGABYTE)] * 5, model="cifar")


def test_an_oversized_grpc_message_is_refused(stack: Stack) -> None:
    with stack.client("grpc") as client, pytest.raises(ImageTooLarge):
        client.predict([bytes(13 * MEGABYTE)] * 5, model="cifar")


def test_a_slow_body_is_cut_off(stack: Stack) -> None:
    started = time.monotonic()
    with connect(stack) as connection:
        connection.sendall(head(stack, "POST /predictions/cifar", "Content-Length: 1000") + b"x")
        said = receive(connection).decode("latin-1")
    assert said.startswith("HTTP/1.1 408")
    assert error_of(said) == "deadline_exceeded"
    assert time.monotonic() - started < 15


def test_slow_headers_are_cut_off(stack: Stack) -> None:
    started = time.monotonic()
    with connect(stack) as connection:
        connection.sendall(b"POST /predictions/cifar HTTP/1.1\r\nHost: localhost\r\n")
        said = receive(connection).decode("latin-1")
    assert said.startswith("HTTP/1.1 408")
    assert time.monotonic() - started < 20


def test_errors_that_a_caller_causes_take_no_replica_away(stack: Stack) -> None:
    """TorchServe itself answers a form that it cannot read, and over gRPC INTERNAL where it has no such model."""
    form = b'--x\r\nContent-Dispositio: form-data; name="data"\r\n\r\nabc\r\n--x--\r\n'
    headers = ["Content-Type: multipart/form-data; boundary=x", f"Content-Length: {len(form)}", "Connection: close"]
    with channel(stack) as opened:
        call = opened.unary_unary(f"{SERVICE}/Predictions", PredictionsRequest.SerializeToString, None)
        for _ in range(40):
            assert raw(stack, head(stack, "POST /predictions/cifar", *headers) + form)[0] == [400]
            with pytest.raises(grpc.RpcError):
                call(PredictionsRequest(model_name="nobody"), timeout=20, metadata=(("x-api-key", stack.key),))
    assert stack.statistic(r"cluster\.(?:rest|grpc)\.outlier_detection\.ejections_enforced_total") == 0
    assert stack.balanced() == 3


def channel(stack: Stack) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(stack.ca_file.read_bytes())
    return grpc.secure_channel(f"localhost:{stack.port}", credentials)


@pytest.mark.parametrize(
    "method",
    [
        f"{SERVICE}/StreamPredictions",
        f"{SERVICE}/StreamPredictions2",
        f"{SERVICE}/Ping",
        f"{SERVICE}/Unheard",
        "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer",
        "/org.pytorch.serve.grpc.management.ManagementAPIsService/UnregisterModel",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_other_grpc_methods_are_unimplemented(stack: Stack, method: str) -> None:
    request = PredictionsRequest(model_name="cifar", input={"data": PICTURE})
    with channel(stack) as opened:
        call = opened.unary_stream(method, PredictionsRequest.SerializeToString, PredictionResponse.FromString)
        with pytest.raises(grpc.RpcError) as refused:
            list(call(request, timeout=20, metadata=(("x-api-key", stack.key),)))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_grpc_without_a_key_is_unauthenticated(stack: Stack) -> None:
    with channel(stack) as opened:
        call = opened.unary_unary(f"{SERVICE}/Predictions", PredictionsRequest.SerializeToString, None)
        for metadata in ((), (("x-api-key", "wrong"),)):
            with pytest.raises(grpc.RpcError) as refused:
                call(PredictionsRequest(model_name="cifar"), timeout=20, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_nothing_but_the_door_can_be_reached(stack: Stack) -> None:
    gateway = stack.inspect("gateway")["NetworkSettings"]["Networks"]
    address = next(facts["IPAddress"] for name, facts in gateway.items() if name.endswith("serving"))
    probe = (
        "import socket, sys; s = socket.socket(); s.settimeout(2); print(s.connect_ex((sys.argv[1], int(sys.argv[2]))))"
    )
    replica = stack.replicas()[0]
    assert stack.docker("exec", replica, "python", "-c", probe, address, "9901").strip() != "0"  # The admin interface.
    assert stack.docker("exec", replica, "python", "-c", probe, address, "8443").strip() == "0"
    other = stack.inspect("torchserve")["NetworkSettings"]["Networks"]
    theirs = next(facts["IPAddress"] for name, facts in other.items() if name.endswith("serving"))
    assert stack.docker("exec", replica, "python", "-c", probe, theirs, "8081").strip() != "0"  # Management.
