"""A replica's place taken by a small process: REST on 8080, gRPC on 7070 and `/ready` on 8083, without a model or Java.

    python standin.py [address]

What a request is answered depends on the model that it names: `slow-N` after N seconds, `missing`, `old` and `full` with TorchServe's own
errors, `internal` with a failure, any other at once with the name of this host.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
JAVA = "org.pytorch.serve"

# Model name: HTTP status, the name of TorchServe's exception, its message, and the same over gRPC.
ERRORS: dict[str, tuple[int, str, str, grpc.StatusCode, str]] = {
    "missing": (
        404,
        "ModelNotFoundException",
        "Model not found: missing",
        grpc.StatusCode.INTERNAL,
        f"Model not found: missing\n{JAVA}.archive.model.ModelNotFoundException",
    ),
    "old": (
        404,
        "ModelVersionNotFoundException",
        "Model version: 9 does not exist for model: old",
        grpc.StatusCode.INTERNAL,
        f"Model version: 9 does not exist for model: old\n{JAVA}.archive.model.ModelVersionNotFoundException",
    ),
    "": (
        400,
        "BadRequestException",
        "Parameter model_name is required.",
        grpc.StatusCode.INTERNAL,
        "Parameter model_name is required.\nBadRequestException.()",
    ),
    "full": (
        503,
        "ServiceUnavailableException",
        'Model "full" Version 1.0 has no worker to serve inference request. Please use scale workers API to add workers.',
        grpc.StatusCode.INTERNAL,
        'Model "full" Version 1.0 has no worker to serve inference request. Please use scale workers API to add '
        "workers.\nInternalServerException.()",
    ),
    "internal": (
        500,
        "InternalServerException",
        "Worker died.",
        grpc.StatusCode.INTERNAL,
        f"Worker died.\n{JAVA}.http.InternalServerException",
    ),
}


class Requests:
    """Counts what arrives, for `GET /requests`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count: dict[str, int] = {}

    def add(self, transport: str, model: str) -> None:
        with self.lock:
            name = f"{transport}/{model}"
            self.count[name] = self.count.get(name, 0) + 1


REQUESTS = Requests()


def answer(model: str) -> bytes:
    if model.startswith("slow-"):
        time.sleep(float(model.removeprefix("slow-")))
    return json.dumps({"replica": socket.gethostname(), "model": model}).encode()


class Rest(BaseHTTPRequestHandler):
    """`/predictions/<model>`."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path == "/requests":
            self.respond(200, json.dumps(REQUESTS.count).encode())
            return
        model = self.path.split("/")[2] if self.path.count("/") > 1 else ""
        REQUESTS.add("rest", model)
        if model in ERRORS:
            status, kind, message, _, _ = ERRORS[model]
            self.respond(status, json.dumps({"code": status, "type": kind, "message": message}).encode())
        else:
            self.respond(200, answer(model))

    do_POST = do_PUT = do_GET

    def respond(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        with contextlib.suppress(OSError):
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


class Ready(Rest):
    """`/ready`."""

    def do_GET(self) -> None:
        self.respond(200, b'{"ready": true}\n')


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def predict(request: bytes, context: grpc.ServicerContext) -> bytes:
    model = request[2 : 2 + request[1]].decode() if request[:1] == b"\x0a" else ""
    REQUESTS.add("grpc", model)
    if model in ERRORS:
        *_, code, details = ERRORS[model]
        context.abort(code, details)
    said = answer(model)
    return b"\x0a" + bytes([len(said)]) + said  # PredictionResponse.prediction, shorter than 128 bytes.


def main() -> None:
    """Serve until killed."""
    address = sys.argv[1] if sys.argv[1:] else "0.0.0.0"  # noqa: S104
    for port, handler in ((8080, Rest), (8083, Ready)):
        threading.Thread(target=Server((address, port), handler).serve_forever, daemon=True).start()
    service, _, name = METHOD.strip("/").partition("/")
    handlers = {name: grpc.unary_unary_rpc_method_handler(predict)}
    server = grpc.server(ThreadPoolExecutor(64))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"{address}:7070")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
