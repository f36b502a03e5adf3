"""REST: the Open Inference Protocol v2 under `/v2`, the contract of `proto/` under `/predictions`, and `/metrics`.

There is no route that loads or unloads a model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from python_multipart.multipart import FormParser, parse_options_header
from starlette.exceptions import HTTPException

from server.kserve import tensors
from server.kserve.errors import Rejected
from server.kserve.models import Model, Models, Reply, in_time
from server.server_metrics import deaths_family, rejected_family, status_families, worker_families
from server.worker_metrics import WorkerFiles

NAME, VERSION = "convscope", "1"
LENGTH_HEADER = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data"]
TYPES = {"model_not_found": "ModelNotFoundException"}  # As in TorchServe, since clients may check it.

MOST_PARTS = 10_000  # Most parts of a form.


def build_app(models: Models, *, max_request_bytes: int, timeout_s: float) -> FastAPI:
    """Build the application.

    Args:
        models: The models served.
        max_request_bytes: Largest body of a request.
        timeout_s: Seconds for a request, from its headers to its response.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def read_body(request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_request_bytes:
                raise Rejected("request_too_large", f"a request may have {max_request_bytes:,} bytes")
        return bytes(body)

    async def ready() -> Response:
        await models.check()
        return _json({"ready": True})

    async def server_metadata() -> Response:
        return _json({"name": NAME, "version": VERSION, "extensions": EXTENSIONS})

    async def live() -> Response:
        return _json({"live": True})

    async def list_models() -> Response:
        return _json({"models": list(dict.fromkeys(model.archive.name for model in models.all()))})

    async def model_metadata(model: str, version: str = "") -> Response:
        return _json(models.describe(model, version))

    async def model_ready(model: str, version: str = "") -> Response:
        await models.check([models.get(model, version)])
        return _json({"name": model, "ready": True})

    async def infer(request: Request, model: str, version: str = "") -> Response:
        with models.use(model, version) as served:
            return await in_time(timeout_s, respond_with_tensors(request, served))

    async def respond_with_tensors(request: Request, served: Model) -> Response:
        body = await read_body(request)
        ask = await asyncio.to_thread(tensors.from_rest, body, request.headers.get(LENGTH_HEADER), served.card)
        del body
        kept = ("x-", *tensors.TRACE_CONTEXT)
        headers = {name: value for name, value in _headers(request).items() if name.startswith(kept)}
        headers |= {"accept": tensors.PROTOBUF, "content-type": "multipart/form-data"}
        reply = await served.ask(ask.parameters, headers)
        return await asyncio.to_thread(_write_outputs, ask, reply)

    async def predict(request: Request, model: str, version: str = "", rest: str = "") -> Response:
        with models.use(model, version) as served:
            return await in_time(timeout_s, respond_by_contract(request, served, rest))

    async def respond_by_contract(request: Request, served: Model, rest: str) -> Response:
        if request.url.query:
            raise Rejected("bad_request", "options do not go into the address; see proto/README.md")
        headers = {name: value for name, value in _headers(request).items() if name not in ("explain", "url_path")}
        if request.url.path.startswith("/explanations/"):
            headers["explain"] = "True"
        if rest:
            headers["url_path"] = rest
        body = await read_body(request)
        parameters: dict[str, bytes | list[bytes]] = {"body": body} if body else {}
        if body and headers.get("content-type", "").startswith("multipart/form-data"):
            parameters = await asyncio.to_thread(_read_form, headers["content-type"], body)
        reply = await served.ask(parameters, headers)
        return Response(reply.body, reply.status, media_type=reply.media_type)

    registry = CollectorRegistry()
    registry.register(WorkerFiles(models.directory.metrics))
    registry.register(HostMetrics(models))

    async def metrics(request: Request) -> Response:
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(await asyncio.to_thread(encode, registry), media_type=media_type)

    async def reject(request: Request, error: Exception) -> Response:
        return _error_response(request.url.path, error)

    for path, route in (
        ("/v2", server_metadata),
        ("/v2/health/live", live),
        ("/v2/health/ready", ready),
        ("/ping", ready),
        ("/v2/models", list_models),
        *((f"/v2/models/{{model}}{version}", model_metadata) for version in ("", "/versions/{version}")),
        *((f"/v2/models/{{model}}{version}/ready", model_ready) for version in ("", "/versions/{version}")),
    ):
        app.add_api_route(path, route, methods=["GET"])
    for version in ("", "/versions/{version}"):
        app.add_api_route(f"/v2/models/{{model}}{version}/infer", infer, methods=["POST"])
    for kind, methods in (("predictions", ["GET", "POST", "PUT"]), ("explanations", ["POST", "PUT"])):
        for path in ("{model}", "{model}/{version}", "{model}/{version}/{rest:path}"):
            app.add_api_route(f"/{kind}/{path}", predict, methods=methods)
    app.add_api_route("/metrics", metrics, methods=["GET"])
    for error in (Rejected, HTTPException, Exception):
        app.add_exception_handler(error, reject)
    return app


class HostMetrics(Collector):
    """The metrics of the host, with the names of those of the TorchServe host.

    Args:
        models: The models served.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """Return the current state."""
        models = self._models
        yield from status_families(models.is_up, models.is_draining, models.started)
        workers, wanted, waiting = worker_families()
        for model in models.all():
            own = [model.archive.name, model.archive.version]
            workers.add_metric([*own, "ready"], model.live)
            workers.add_metric([*own, "loading"], model.workers - model.live)
            wanted.add_metric(own, model.workers)
            waiting.add_metric(own, model.waiting)
        yield from (workers, wanted, waiting)
        yield deaths_family({model.archive.full_name: model.deaths for model in models.all()})
        yield rejected_family((model.archive.name for model in models.all()), models.rejected)


def _write_outputs(ask: tensors.Ask, reply: Reply) -> Response:
    content, json_length = tensors.to_rest(tensors.respond(ask, reply.body, reply.status))
    if json_length is None:
        return _json(content)
    headers = {LENGTH_HEADER: str(json_length)}
    return Response(content, headers=headers, media_type="application/octet-stream")


def _headers(request: Request) -> dict[str, str]:
    """Return the headers and the method as the gateway passes them on: repeated headers are joined with commas."""
    found: dict[str, str] = {}
    for name, value in request.headers.items():
        found[name] = f"{found[name]},{value}" if name in found else value
    return found | {"x-convscope-method": request.method}


def _read_form(content_type: str, body: bytes) -> dict[str, bytes | list[bytes]]:
    """Return the parts of a form by name; a list for a name that is repeated."""
    parts: dict[bytes, list[bytes]] = {}
    ends: list[None] = []

    def on_field(field: Any) -> None:
        parts.setdefault(field.field_name, []).append(field.value or b"")

    def on_file(file: Any) -> None:
        parts.setdefault(file.field_name, []).append(file.file_object.getvalue())

    _, options = parse_options_header(content_type)
    config = {"MAX_MEMORY_FILE_SIZE": len(body), "MAX_FIELDS": MOST_PARTS}  # Parts stay in memory.
    try:
        parser = FormParser(
            *("multipart/form-data", on_field, on_file, lambda: ends.append(None)),
            boundary=options.get(b"boundary"),
            config=config,
        )
        parser.write(body)
        parser.finalize()
    except ValueError as error:
        raise Rejected("bad_request", "the form cannot be read, has no boundary, or a part without a name") from error
    if not ends:
        raise Rejected("bad_request", "the form breaks off before its last boundary")
    return {
        name.decode("utf-8", "replace"): values[0] if len(values) == 1 else values for name, values in parts.items()
    }


def _json(values: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(values), status, media_type="application/json")


def _error_response(path: str, error: Exception) -> Response:
    """Return an error in the form of v2, as text; under the contract's paths in that of the contract and TorchServe."""
    headers: Mapping[str, str] | None = None
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
        code = HTTPStatus(status).name.lower()  # For an unknown path or method.
        headers = error.headers
    elif isinstance(error, Rejected):
        code, message, status = error.code, error.message, error.status
    else:
        code, message, status = "internal", "the server has a fault; its log has the reason", 500
    values: dict[str, Any] = {"error": f"{code}: {message}", "code": code}
    if path.startswith(("/predictions/", "/explanations/")):
        error_type = TYPES.get(code, "ConvscopeException")
        values = {"error": {"code": code, "message": message}, "type": error_type, "message": message}
    response = _json(values, status)
    response.headers.update(headers or {})
    return response
