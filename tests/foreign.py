"""Requests outside the contract, for every path and method that TorchServe has on its public ports, from a seed.

    for call in foreign(random.Random(1), Target("127.0.0.1", 8080, 7070, "cifar", "1.0")):
        print(call.name, call.send())

`send` returns what came: an HTTP status, a gRPC status, or `hung up` where the caller itself left. It raises
AssertionError where nothing came in `PATIENCE_S`. What comes is TorchServe's business; that something comes, and that
the worker lives on, is ours.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from tests.pictures import colours, png

PATIENCE_S = 60.0  # A good answer takes milliseconds.
PICTURE = png(colours())
HUNG_UP = "hung up"

METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "BREW")
PATHS = (
    *("/", "//", "/ping", "/api-description", "/metrics", "/models", "/models/{m}", "/models/{m}/{v}", "/workflows"),
    *("/invocations", "/invocations?model_name={m}", "/invocations/{m}", "/models/{m}/invoke", "/models/nobody/invoke"),
    *("/{m}/predict", "/{m}/{v}/predict", "/nobody/predict", "/wfpredict/{m}", "/wfpredict", "/favicon.ico"),
    *("/predictions", "/predictions/", "/predictions/{m}", "/predictions/{m}/", "/predictions/{m}/{v}"),
    *("/predictions/{m}/{v}/extra/path", "/predictions/{m}//x", "/predictions/{m}/9.9", "/predictions/nobody"),
    *(
        "/predictions/{m}?layers=conv1",
        "/predictions/{m}?model_name=nobody&a=%00",
        "/predictions/%00",
        "/predictions/..",
    ),
    *(
        "/explanations/{m}",
        "/explanations/{m}/{v}",
        "/explanations/{m}/{v}/extra",
        "/explanations",
        "/explanations/nobody",
    ),
    *("/v1/models", "/v1/models/{m}", "/v1/models/{m}:predict", "/v1/models/{m}:explain", "/v1/models/nobody:predict"),
    *("/v1/models/:predict", "/v1/models/{m}:predict:explain", "/v2", "/v2/models/{m}", "/v2/models/{m}/infer"),
    *("/v2/models/{m}/explain", "/v2/models/{m}/ready", "/v2/models/{m}/versions/{v}/infer", "/v2/models/nobody/infer"),
    *("/v2/health/live", "/v2/health/ready", "*", "http://elsewhere/predictions/{m}", "/predictions/{m}" + "/x" * 500),
)
HEADERS = (
    *(("describe", "True"), ("describe", "False"), ("explain", "True"), ("explain", "x"), ("url_path", "../..")),
    *(("ts_request_sequence_id", "1"), ("ts_request_sequence_start", "true"), ("ts_request_sequence_end", "true")),
    *(("ts_stream_next", "true"), ("ts_stream_next", "false"), ("x-request-id", "a" * 300), ("data", "text/plain")),
    *(("body", "application/json"), ("Authorization", "Bearer x"), ("Accept", "text/html"), ("Accept", "\u00e9")),
    *(("Accept", "image/png"), ("Upgrade", "h2c"), ("Connection", "Upgrade, HTTP2-Settings"), ("HTTP2-Settings", "AA")),
    *(("Connection", "close"), ("X-Empty", ""), ("X-Long", "x" * 4000), ("X-Convscope-Layers", "conv1")),
    *(("Expect", "100-continue"), ("Expect", "200-ok"), ("Transfer-Encoding", "gzip"), ("Cookie", "a=b")),
)
INFERENCE, MANAGEMENT = "org.pytorch.serve.grpc.inference", "org.pytorch.serve.grpc.management"
SERVICES = {
    f"{INFERENCE}.InferenceAPIsService": ("Ping", "Predictions", "StreamPredictions", "StreamPredictions2", "Unheard"),
    f"{MANAGEMENT}.ManagementAPIsService": (
        *("DescribeModel", "ListModels", "RegisterModel", "ScaleWorker", "SetDefault", "UnregisterModel"),
    ),
    "org.pytorch.serve.grpc.openinference.GRPCInferenceService": (
        *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
    ),
    "inference.GRPCInferenceService": ("ServerLive", "ModelInfer"),
    "grpc.health.v1.Health": ("Check", "Watch"),
    "grpc.reflection.v1.ServerReflection": ("ServerReflectionInfo",),
    "grpc.reflection.v1alpha.ServerReflection": ("ServerReflectionInfo",),
    "": ("", "x"),
}
PREDICTIONS = f"/{INFERENCE}.InferenceAPIsService/Predictions"


@dataclass(frozen=True)
class Target:
    """A server without a gateway, and one model of it.

    Attributes:
        host: Its address.
        rest: REST port.
        grpc: gRPC port.
        model: Name of the model.
        version: Its version.
    """

    host: str
    rest: int
    grpc: int
    model: str
    version: str


@dataclass(frozen=True)
class Call:
    """One thing to try.

    Attributes:
        name: What it is, with the seed's choices.
        send: Tries it and returns what came.
    """

    name: str
    send: Callable[[], str]


def foreign(
    rng: random.Random, target: Target, *, rest: bool = True, grpc: bool = True, pipelined: bool = True
) -> Iterator[Call]:
    """Yield calls without end, of both transports in turns unless one is left out, some sent before the last reply."""
    makers = [maker for maker, wanted in ((partial(rest_call, pipelined=pipelined), rest), (grpc_call, grpc)) if wanted]
    for maker in itertools.cycle(makers):
        yield maker(rng, target)


def rest_call(rng: random.Random, target: Target, *, pipelined: bool = True) -> Call:
    """Make a call over REST: a path, a method, headers, a body, and a way to send them."""
    method = rng.choice(METHODS)
    path = rng.choice(PATHS).format(m=target.model, v=target.version)
    content_type, body = _body(rng)
    headers = rng.sample(HEADERS, rng.choice((0, 0, 1, 3)))
    if content_type:
        headers.append(("Content-Type", content_type))
    manner = rng.choice(("plain", "plain", "plain", "chunked", "old", "half", "reset", *["pipelined"] * pipelined))
    name = f"{method} {path[:80]} {[header[:40] for header in map(': '.join, headers)]} {len(body)} bytes {manner}"
    return Call(name, partial(_send_rest, target, method, path, headers, body, manner, rng.random()))


def grpc_call(rng: random.Random, target: Target) -> Call:
    """Make a call over gRPC: any method, as any kind of call, with any messages, perhaps cancelled."""
    service = rng.choice([*SERVICES, *3 * [f"{INFERENCE}.InferenceAPIsService"]])
    method = rng.choice(SERVICES[service])
    kind = rng.choice(("unary_unary", "unary_stream", "stream_unary", "stream_stream"))
    messages = [_message(rng, target) for _ in range(rng.choice((0, 1, 1, 2, 5)) if kind.startswith("stream") else 1)]
    cancel_s = rng.choice((None, None, 0.0, rng.uniform(0, 0.02)))
    sizes = [len(message) for message in messages]
    name = f"/{service}/{method} as {kind}, messages of {sizes} bytes, cancelled: {cancel_s}"
    return Call(name, partial(_send_grpc, target, f"/{service}/{method}", kind, messages, cancel_s))


def good_calls(target: Target) -> list[Call]:
    """Return a good request on each transport; each returns `ok` or raises."""
    return [Call("good REST", partial(_good_rest, target)), Call("good gRPC", partial(_good_grpc, target))]


def predictions_request(model: str, entries: dict[bytes, bytes], version: str = "", sequence_id: str = "") -> bytes:
    """Return a serialized PredictionsRequest; keys of `input` need not be UTF-8."""
    pairs = (_field(1, key) + _field(2, value) for key, value in entries.items())
    message = _field(1, model.encode()) + b"".join(_field(3, pair) for pair in pairs)
    if version:
        message += _field(2, version.encode())
    return message + (_field(4, sequence_id.encode()) if sequence_id else b"")


def _body(rng: random.Random) -> tuple[str, bytes]:
    """Return a content type, or none, and a body."""
    form = "multipart/form-data; boundary=b"
    head = b'--b\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
    return rng.choice(
        (
            ("", b""),
            ("", PICTURE),
            ("image/png", PICTURE),
            ("text/plain; charset=x", b"\xff\xfe"),
            ("application/json", json.dumps({"data": base64.b64encode(PICTURE).decode()}).encode()),
            ("application/json", json.dumps({"instances": [[1, 2]], "inputs": [{"name": "a", "data": [1]}]}).encode()),
            ("application/json", b"[" * 20_000),
            ("application/x-protobuf", rng.randbytes(50)),
            ("application/x-www-form-urlencoded", b"model_name=nobody&data=%ff&layers"),
            (form, head + PICTURE + b"\r\n--b--\r\n"),
            (form, head + PICTURE[:100]),
            (form, head.replace(b' name="data";', b"") + PICTURE + b"\r\n--b--\r\n"),
            (form, head.replace(b"name", b'name=""; x') + b"\r\n--b--\r\n"),
            (form, b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--\r\n"),
            ("multipart/form-data", head + b"--b--"),
            (form, b""),
            ("/", rng.randbytes(200)),
        )
    )


def _send_rest(
    target: Target, method: str, path: str, headers: list[tuple[str, str]], body: bytes, manner: str, share: float
) -> str:
    version = "1.0" if manner == "old" else "1.1"
    lines = [f"{method} {path} HTTP/{version}", *(["Host: x"] if version == "1.1" else [])]
    lines += [f"{name}: {value}" for name, value in headers]
    if manner == "chunked":
        lines.append("Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:100], body[100:]) if part) + b"0\r\n\r\n"
    elif body:
        lines.append(f"Content-Length: {len(body)}")
    message = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body
    times = 3 if manner == "pipelined" else 1
    with socket.create_connection((target.host, target.rest), PATIENCE_S) as connection:
        try:
            if manner in ("half", "reset"):
                connection.sendall(message[: max(1, int(share * len(message)))])
                if manner == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return HUNG_UP
            connection.sendall(message * times)
            with connection.makefile("rb") as stream:
                return " ".join(read_responses(stream, method, times))
        except TimeoutError as error:
            raise AssertionError("no answer") from error
        except ConnectionError:
            return "connection closed"  # After an error of its own TorchServe does not read what else comes.


def read_responses(stream: io.BufferedReader, method: str, times: int) -> Iterator[str]:
    """Yield the status of each response, as far as they come: after a status from 400 on TorchServe closes."""
    for number in range(times):
        try:
            response = http.client.HTTPResponse(_Stream(stream), method=method)  # type: ignore[arg-type]
            response.begin()
            response.read()
        except http.client.HTTPException as error:
            if number and isinstance(error, http.client.RemoteDisconnected):
                return
            yield f"{type(error).__name__}"
            return
        yield str(response.status)
        if response.status >= 400:
            return


class _Stream:
    """What HTTPResponse takes for a socket: a stream that several responses are read from."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> Any:
        return self

    def close(self) -> None:
        """Leave it open for the next response."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _message(rng: random.Random, target: Target) -> bytes:
    model = rng.choice((target.model,) * 8 + ("nobody", "", "../x"))
    version = rng.choice(("",) * 4 + (target.version, "9.9"))
    sequence_id = rng.choice(("",) * 3 + ("1", "a" * 1000))
    entries = rng.choice(
        (
            {b"data": PICTURE},
            {b"data": PICTURE, b"layers": b"all"},
            {b"data": PICTURE, b"layers": b"conv9"},
            {b"describe": b"1"},
            {},
            {b"": b""},
            {b"\x00": b"", b"body": b"x"},
            {b"\xff\xfe": b"not UTF-8"},
            {"\U0001f600".encode(): PICTURE},
            {b"k" * 10_000: b""},
            {b"request": rng.randbytes(40)},
            {b"ts_request_sequence_start": b"true", b"data": PICTURE},
            {b"ts_request_sequence_end": b"true", b"ts_stream_next": b"true", b"data": PICTURE},
            {b"key%d" % number: b"" for number in range(300)},
        )
    )
    message = predictions_request(model, entries, version, sequence_id)
    return rng.choice((message,) * 6 + (b"", rng.randbytes(30), message[: len(message) // 2]))


def _send_grpc(target: Target, path: str, kind: str, messages: list[bytes], cancel_s: float | None) -> str:
    with grpc.insecure_channel(f"{target.host}:{target.grpc}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = getattr(channel, kind)(path)
        request = iter(messages) if kind.startswith("stream") else messages[0]
        start = call.future if kind.endswith("unary") else call
        asked = start(request, timeout=PATIENCE_S)
        if cancel_s is not None:
            time.sleep(cancel_s)
            asked.cancel()
            return HUNG_UP
        try:
            replies = [asked.result()] if kind.endswith("unary") else list(asked)
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, "no answer"
            return f"{code.name} {(error.details() or '')[:60]}"  # type: ignore[attr-defined]
        return f"OK {len(replies)}"


def _good_rest(target: Target) -> str:
    connection = http.client.HTTPConnection(target.host, target.rest, timeout=PATIENCE_S)
    try:
        connection.request("POST", f"/predictions/{target.model}", PICTURE, {"Content-Type": "image/png"})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    assert response.status == 200, body
    assert json.loads(body)["results"][0]["top"]
    return "ok"


def _good_grpc(target: Target) -> str:
    with grpc.insecure_channel(f"{target.host}:{target.grpc}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        message = predictions_request(target.model, {b"data": PICTURE, b"accept": b"application/json"})
        reply: bytes = channel.unary_unary(PREDICTIONS)(message, timeout=PATIENCE_S)
    assert b'"results"' in reply, reply
    assert b'"error"' not in reply, reply
    return "ok"


def _field(number: int, data: bytes) -> bytes:
    """Return a length-delimited field of a protobuf message."""
    length, size = len(data), b""
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data
