"""A small real server that speaks the contract on both transports, in place of TorchServe.

What it answers is computed from the request, so that a client that mixes pictures, options or transports up is found
out. Some model names stand for a mishap, with the words TorchServe 0.12 was seen to use for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import ssl
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
from convscope._wire import convscope_pb2 as wire
from convscope._wire.inference_pb2 import PredictionResponse, PredictionsRequest

LAYERS = {"conv1": (4, 6, 5), "conv2": (3, 2, 2)}
PIXELS = (3, 12, 10)  # Of the picture as the network saw it.
CLASSES = [f"class {number}" for number in range(10)]
STATUS = {"internal": 500, "draining": 503, "image_too_large": 413, "too_many_images": 413, "reply_too_large": 413}
FULL = 'Model "full" Version 1.0 has no worker to serve inference request. Please use scale workers API to add workers.'

STAGES_S = {"read_s": 0.001, "decode_s": 0.002, "preprocess_s": 0.003, "forward_s": 0.004, "encode_s": 0.005}
HANDLER_S = 0.016
RELOADED = "7.0"  # Of `StandIn.newest`, a version with another card.
NARROW = 3  # Pictures in a request to the model `slow-narrow`.
TIGHT_BYTES = 27_000  # Of a reply of the model `tight`.

# Model name: HTTP status, TorchServe's type and message on REST; status and details on gRPC.
LISTED = "Model not found (models: cifar/1.0, cifar/0.9, died/1.0): -"
MISHAPS: dict[str, tuple[int, str, str, grpc.StatusCode, str]] = {
    "-": (
        404,
        "ModelNotFoundException",
        LISTED,
        grpc.StatusCode.INTERNAL,
        f"{LISTED}\norg.pytorch.serve.archive.model.ModelNotFoundException",
    ),
    "missing": (
        404,
        "ModelNotFoundException",
        "Model not found: missing",
        grpc.StatusCode.INTERNAL,
        "Model not found: missing\norg.pytorch.serve.archive.model.ModelNotFoundException",
    ),
    "old": (
        404,
        "ModelVersionNotFoundException",
        "Model version: 9 does not exist for model: old",
        grpc.StatusCode.INTERNAL,
        "Model version: 9 does not exist for model: old\norg.pytorch.serve.archive.model.ModelVersionNotFoundException",
    ),
    "full": (
        503,
        "ServiceUnavailableException",
        FULL,
        grpc.StatusCode.INTERNAL,
        f"{FULL}\nInternalServerException.()",
    ),
    "died": (
        500,
        "InternalServerException",
        "Worker died.",
        grpc.StatusCode.INTERNAL,
        "Worker died.\norg.pytorch.serve.http.InternalServerException",
    ),
    "failed": (
        503,
        "InternalServerException",
        "Prediction failed",
        grpc.StatusCode.UNAVAILABLE,
        "Prediction failed\norg.pytorch.serve.http.InternalServerException",
    ),
}


def fetch_maps(picture: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The map of a picture: any numbers that no other picture has."""
    seed = int.from_bytes(hashlib.sha256(picture).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=shape).astype("<f4")


def encode_tensor(cells: np.ndarray[Any, Any], dtype: int) -> wire.Tensor:
    if dtype == wire.FLOAT16:
        return wire.Tensor(dtype=wire.FLOAT16, shape=cells.shape, data=cells.astype("<f2").tobytes())
    if dtype == wire.UINT8:
        rows = cells.reshape(len(cells), -1)
        offset = rows.min(axis=1)
        scale = (rows.max(axis=1) - offset) / np.float32(255)
        quantised = np.rint((rows - offset[:, None]) / np.where(scale == 0, 1, scale)[:, None]).astype("u1")
        return wire.Tensor(dtype=wire.UINT8, shape=cells.shape, data=quantised.tobytes(), scale=scale, offset=offset)
    return wire.Tensor(dtype=wire.FLOAT32, shape=cells.shape, data=cells.tobytes())


def run_network(picture: bytes, edits: Iterable[wire.Edit] = ()) -> tuple[Any, dict[str, Any]]:
    """The logits and maps of a picture; edits (zero and scale) change what they name, and all that comes after it."""
    maps = {layer: fetch_maps(picture, shape) for layer, shape in LAYERS.items()}
    moved = np.float32(0)
    for layer, cells in maps.items():
        cells += moved
        before = cells.mean()
        for edit in edits:
            if edit.layer == layer:
                top, left, bottom, right = edit.region or (0, 0, *cells.shape[1:])
                place = (list(edit.channels) or slice(None), slice(top, bottom), slice(left, right))
                cells[place] *= edit.value[0] if edit.operation == "scale" else 0
        moved += cells.mean() - before
    return fetch_maps(picture, (len(CLASSES),)) + moved * np.arange(1, 11, dtype=np.float32), maps


def answer_picture(picture: bytes, request: wire.PredictRequest) -> wire.Result:
    if picture.startswith(b"bad"):
        return wire.Result(error=wire.Error(code="bad_image", message=f"not a picture: {picture!r}"))
    result = wire.Result(notes=["grey to RGB", "cropped"] if picture.startswith(b"grey") else [])
    logits, maps = run_network(picture, request.edits)
    unedited, unedited_maps = run_network(picture)
    probabilities, before = (np.exp(one) / np.exp(one).sum() for one in (logits, unedited))
    count = (request.top_k or None) if request.HasField("top_k") else 5
    for index in np.argsort(-logits)[:count]:
        result.top.add(index=index, label=CLASSES[index], probability=probabilities[index], logit=logits[index])
    if request.compare:
        for index in dict.fromkeys([*np.argsort(-logits)[:count].tolist(), *np.argsort(-unedited)[:count].tolist()]):
            difference = {"probability": probabilities[index] - before[index], "logit": logits[index] - unedited[index]}
            result.change.top.add(index=index, label=CLASSES[index], **difference)
    for layer in LAYERS if list(request.layers) == ["all"] else request.layers:
        cells = maps[layer]
        selected: list[int] = []
        if request.HasField("channels"):
            strongest = np.argsort(-cells.mean(axis=(1, 2)))[: request.channels.strongest]
            selected = list(request.channels.indexes) or [int(channel) for channel in strongest]
            cells = cells[selected]
        if request.HasField("pool"):
            cells = cells.mean(axis=(1, 2)) if request.pool == 1 else cells[:, : request.pool, : request.pool]
        tensor = encode_tensor(np.ascontiguousarray(cells), request.map_dtype)
        result.maps.add(layer=layer, tensor=tensor, channels=selected)
        if request.compare:
            change = (maps[layer] - unedited_maps[layer])[selected or slice(None)]
            tensor = encode_tensor(np.ascontiguousarray(change), request.map_dtype)
            result.change.maps.add(layer=layer, tensor=tensor, channels=selected)
    if request.HasField("explain"):
        result.explanation.CopyFrom(answer_explain(picture, request, result.top[0].index))
    return result


def answer_explain(picture: bytes, request: wire.PredictRequest, most_probable: int) -> wire.Explanation:
    received = request.explain
    explanation = wire.Explanation(method=received.method)
    if received.picture:
        pixels = (np.abs(fetch_maps(b"pixels" + picture, PIXELS)) * 60).clip(0, 255).astype("u1")
        explanation.picture.CopyFrom(
            wire.Tensor(dtype=wire.UINT8, shape=PIXELS, data=pixels.tobytes(), scale=[1 / 255] * 3, offset=[0] * 3)
        )
    if received.method == "picture":
        return explanation
    explanation.target = received.target if received.HasField("target") else most_probable
    explanation.label = CLASSES[explanation.target]
    explanation.layer = received.layer or ("conv1" if received.method == "grad_cam" else "")
    shape = PIXELS if "gradient" in received.method else (1, 6, 5)
    settings = received.SerializeToString(deterministic=True)  # Other settings, other heat.
    explanation.heat.CopyFrom(encode_tensor(fetch_maps(settings + picture, shape), request.map_dtype))
    if received.method == "integrated_gradients":
        explanation.delta = 0.0
    return explanation


def describe(model: str, version: str) -> wire.ModelCard:
    return wire.ModelCard(
        model=model,
        version=version,
        description="stands in, reloaded" if version == RELOADED else "stands in",
        architecture="somewhere:Network",
        engine="stand-in-1",
        device="cpu",
        classes=CLASSES,
        input=wire.Input(channels=3, height=32, width=32, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]),
        layers=[
            wire.Layer(
                name="conv1",
                module="relu1",
                shape=LAYERS["conv1"],
                stride=[1, 1],
                receptive_field=[3, 3],
                receptive_field_start=[-1, -1],
                parameters=448,
                bytes={"float32": 480, "uint8": 120},
                input_shape=[8, 6, 5],
                operation="Conv2d",
                kernel=[3, 3],
                step=[1, 1],
                padding=[1, 1],
                dilation=[1, 1],
                groups=2,
                multiply_adds=4320,
                dense_parameters=28920,
            ),
            wire.Layer(name="conv2", module="conv2", shape=LAYERS["conv2"], parameters=12),
        ],
        parameters=1000,
        training=wire.Training(
            data="pictures", train_pictures=50, test_pictures=10, epochs=5, test_accuracy=0.75, seconds=1.5, machine="m"
        ),
        limits=wire.Limits(
            max_images=64,
            max_image_bytes=1000,
            max_image_pixels=2000,
            max_reply_bytes=TIGHT_BYTES if model == "tight" else 3000000,
        ),
        multiply_adds=12345,
        edits=["zero", "scale"],
    )


def answer(model: str, version: str, request: wire.PredictRequest) -> wire.PredictReply:
    """What the handler would answer."""
    reply = wire.PredictReply(
        model=model, version=version, engine="stand-in-1", device="cpu", request_id=request.request_id
    )
    if model == "renamed":  # As by a gateway that gives every request an id of its own.
        reply.request_id = "from-the-gateway"
    if model == "older":  # As by a service from before ids and timing.
        reply.ClearField("request_id")
    elif request.timing:
        reply.timing.CopyFrom(wire.Timing(**STAGES_S, handler_s=HANDLER_S, batch_requests=2))
    if model == "older":
        request.ClearField("explain")
        request.ClearField("edits")
    else:
        reply.edits = len(request.edits)
    unknown = set(request.layers) - set(LAYERS) - {"all"}
    astray = [number for number, edit in enumerate(request.edits) if edit.layer not in LAYERS]
    if model.startswith("error-"):
        reply.error.CopyFrom(wire.Error(code=model.removeprefix("error-"), message="as asked for"))
    elif model == "slow-narrow" and len(request.pictures) > NARROW:
        reply.error.CopyFrom(wire.Error(code="too_many_images", message=f"at most {NARROW}"))
    elif b"poison" in request.pictures:
        reply.error.CopyFrom(wire.Error(code="internal", message="it was too much"))
    elif request.describe:
        reply.card.CopyFrom(describe(model, version))
    elif request.filters in LAYERS:
        cells = fetch_maps(request.filters.encode(), (LAYERS[request.filters][0], 3, 3, 3))
        reply.filters.CopyFrom(encode_tensor(cells, wire.FLOAT32))
    elif unknown:
        message = f"no layer {unknown.pop()!r}; there are: conv1, conv2"
        reply.error.CopyFrom(wire.Error(code="unknown_layer", message=message))
    elif astray:
        message = f"edits[{astray[0]}]: no layer {request.edits[astray[0]].layer!r}; there are: conv1, conv2"
        reply.error.CopyFrom(wire.Error(code="unknown_layer", message=message))
    else:
        reply.results.extend(answer_picture(picture, request) for picture in request.pictures)
        if all(result.HasField("error") for result in reply.results):
            reply.error.CopyFrom(reply.results[0].error)
        if model == "miscounting":
            del reply.results[0]
    return reply


class StandIn:
    """Both servers, what they were asked, and a way to hold requests to the model `slow` back."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, wire.PredictRequest]] = []
        self.keys: list[str | None] = []
        self.request_ids: list[str | None] = []  # Of headers, and of requests that meet with a mishap too.
        self.traces: list[tuple[str | None, str | None]] = []  # traceparent and tracestate, of headers.
        self.connections: set[tuple[str, int]] = set()
        self.release = threading.Event()
        self.newest = "1.0"  # The version that answers where none is named; or `RELOADED`.
        self.mishaps: list[
            str
        ] = []  # What befalls the next requests: "full [s]", "pushback ms", "died", "reset", "cut".
        self.rest_url = ""
        self.grpc_url = ""

    def take(self, model: str, version: str, data: bytes, key: str | None) -> wire.PredictReply:
        request = wire.PredictRequest.FromString(data)
        self.requests.append((model, version, request))
        self.keys.append(key)
        if model.startswith("slow"):
            self.release.wait(30)
        return answer(model, version or self.newest, request)


def make_http_handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            stand_in.connections.add(self.client_address)
            body = self.rfile.read(int(self.headers["content-length"]))
            model, _, version = self.path.removeprefix("/predictions/").partition("/")
            model, version = unquote(model), unquote(version)
            stand_in.request_ids.append(self.headers.get("x-request-id"))
            stand_in.traces.append((self.headers.get("traceparent"), self.headers.get("tracestate")))
            mishap = stand_in.mishaps.pop(0) if stand_in.mishaps else ""
            if mishap in ("reset", "cut"):
                if mishap == "cut":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
                self.close_connection = True
                return None
            if mishap.startswith("full"):
                return self.reply(503, "text/plain", b"no healthy upstream", {"retry-after": mishap[5:] or "0"})
            if mishap == "died":
                model = "died"
            if model in MISHAPS:
                status, kind, message, *_ = MISHAPS[model]
                error = json.dumps({"code": status, "type": kind, "message": message}, indent=2)
                return self.reply(status, "application/json", error.encode())
            if model == "stranger":
                return self.reply(200, "text/html", b"<html>Welcome</html>")
            if model == "babbler":
                return self.reply(200, "application/x-protobuf", b"\xff\xff\xff")
            reply = stand_in.take(model, version, body, self.headers.get("x-api-key"))
            status = 200
            if reply.HasField("error"):
                status = STATUS.get(reply.error.code, 400)
            return self.reply(status, "application/x-protobuf", reply.SerializeToString())

        def reply(self, status: int, content_type: str, body: bytes, more: dict[str, str] | None = None) -> None:
            with contextlib.suppress(ConnectionError):  # A client whose deadline passed is gone.
                self.send_response(status)
                self.send_header("content-type", content_type)
                self.send_header("content-length", str(len(body)))
                for name, value in (more or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # A client may hang up whenever it likes.
            super().handle_error(request, client_address)


class GrpcHandler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in = stand_in

    def service(self, details: Any) -> Any:
        if details.method != "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions":
            return None
        return grpc.unary_unary_rpc_method_handler(
            self.predict, PredictionsRequest.FromString, PredictionResponse.SerializeToString
        )

    def predict(self, request: PredictionsRequest, context: grpc.ServicerContext) -> PredictionResponse:
        self.stand_in.connections.add((context.peer(), 0))
        metadata = dict(context.invocation_metadata())
        self.stand_in.request_ids.append(metadata.get("x-request-id"))
        self.stand_in.traces.append((metadata.get("traceparent"), metadata.get("tracestate")))
        mishap = self.stand_in.mishaps.pop(0) if self.stand_in.mishaps else ""
        if mishap in ("reset", "cut"):
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if mishap.startswith("full"):
            context.set_trailing_metadata((("retry-after", mishap[5:] or "0"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "rate limit")
        if mishap.startswith("pushback"):
            context.set_trailing_metadata((("grpc-retry-pushback-ms", mishap[9:]),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "later")
        name = "died" if mishap == "died" else request.model_name
        if name in MISHAPS:
            *_, status, details = MISHAPS[name]
            context.abort(status, details)
        if request.model_name in ("stranger", "babbler"):
            return PredictionResponse(prediction=b"\xff\xff\xff")
        assert set(request.input) == {"request"}
        data, key = request.input["request"], metadata.get("x-api-key")
        reply = self.stand_in.take(request.model_name, request.model_version, data, key)
        return PredictionResponse(prediction=reply.SerializeToString())


@contextlib.contextmanager
def serve(certificate: tuple[str, str] | None = None) -> Iterator[StandIn]:
    """Run both servers on free ports of the loopback; with TLS if given (certificate file, key file)."""
    stand_in = StandIn()
    http = HttpServer(("127.0.0.1", 0), make_http_handler(stand_in))
    rpc = grpc.server(
        ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
    )
    rpc.add_generic_rpc_handlers((GrpcHandler(stand_in),))
    if certificate is None:
        stand_in.rest_url = f"http://127.0.0.1:{http.server_port}"
        stand_in.grpc_url = f"grpc://127.0.0.1:{rpc.add_insecure_port('127.0.0.1:0')}"
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        http.socket = context.wrap_socket(http.socket, server_side=True)
        chain, key = (Path(path).read_bytes() for path in certificate)
        credentials = grpc.ssl_server_credentials([(key, chain)])
        stand_in.rest_url = f"https://localhost:{http.server_port}"
        stand_in.grpc_url = f"grpcs://localhost:{rpc.add_secure_port('127.0.0.1:0', credentials)}"
    rpc.start()
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.release.set()
        http.shutdown()
        http.server_close()
        rpc.stop(None).wait(10)
        thread.join(10)
