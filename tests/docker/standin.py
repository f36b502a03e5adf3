"""A replica's place taken by a small process: REST on 8080, gRPC on 7070 and `/ready` on 8083, without a model or Java.

The response depends on the model that a request names: `slow-N` comes after N seconds, those of ERRORS give
TorchServe's own errors, `traceparent` is that header, any other name is answered at once with the name of this host.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
JAVA = "org.pytorch.serve"
FULL = 'Model "full" Version 1.0 has no worker to serve inference request. Please use scale workers API to add workers.'

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
        FULL,
        grpc.StatusCode.INTERNAL,
        f"{FULL}\nInternalServerException.()",
    ),
    "internal": (
        500,
        "InternalServerException",
        "Worker died.",
        grpc.StatusCode.INTERNAL,
        f"Worker died.\n{JAVA}.http.InternalServerException",
    ),
}


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
        model = self.path.split("/")[2] if self.path.count("/") > 1 else ""
        if model == "traceparent":
            self.respond(200, self.headers.get(model, "").encode())
        elif model in ERRORS:
            status, kind, message, _, _ = ERRORS[model]
            self.respond(status, json.dumps({"code": status, "type": kind, "message": message}).encode())
        else:
            self.respond(200, answer(model))

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

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
    if model in ERRORS:
        *_, code, details = ERRORS[model]
        context.abort(code, details)
    said = dict(context.invocation_metadata()).get(model, "").encode() if model == "traceparent" else answer(model)
    return b"\x0a" + bytes([len(said)]) + said  # PredictionResponse.prediction, shorter than 128 bytes.


def main() -> None:
    """Serve until killed."""
    for port, handler in ((8080, Rest), (8083, Ready)):
        threading.Thread(target=Server(("", port), handler).serve_forever, daemon=True).start()
    service, _, name = METHOD.strip("/").partition("/")
    handlers = {name: grpc.unary_unary_rpc_method_handler(predict)}
    server = grpc.server(ThreadPoolExecutor(64))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port("0.0.0.0:7070")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
