"""The local web server of `convscope ui`: serves the page, keeps its pictures, and asks the service about them.

Every request but the page itself needs the token in the printed URL's fragment, which browsers never send to servers.
So other web sites cannot send requests; host names other than 127.0.0.1 and localhost are rejected (DNS rebinding). The
page contains no secret: the service's API key stays in this process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
import io
import json
import secrets
import socket
import threading
import time
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import uvicorn
from convscope import AuthenticationFailed, ConvscopeError, RequestRejected
from convscope.commands import METHODS
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convscope_lens._page.html import content_security_policy, page_html
from convscope_lens._page.page_data import encode_one_picture, fetch_page_data, pack_kernels, thumbnail

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from convscope import Client, ModelCard
    from numpy.typing import NDArray
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 64 << 20
KEPT_BYTES = 512 << 20  # Size of the stored pictures; the oldest are dropped.
MAX_MAP_VALUES = 1 << 20  # All maps together: the page draws them again at every stroke.
HTTP_PORT = 80
CARD_S = 2  # A card is asked for again when it is older and needed, since a running service takes in new archives.
IDLE_TIMEOUT_S = 60  # Idle timeout of a connection.
SHUTDOWN_S = 1  # For requests that are being answered when the server ends.
SAMPLES = ("cat.png", "frog.png", "ship.png", "digit-3.png", "digit-7.png")


class PageServer:
    """Serves the page on 127.0.0.1. Use it as a context manager, or call `close()`.

    Args:
        client: An open client; it must stay open while the server runs.
        models: Names of the models to choose from, at least one.
        version: Version of the models; None for the server's default.
        port: Port to listen on; 0 for a free port.

    Raises:
        ConvscopeError: The card of a model could not be fetched.
        OSError: The port is in use.
        ValueError: `models` is empty.
    """

    def __init__(self, client: Client, models: Sequence[str], *, version: str | None = None, port: int = 0) -> None:
        if not models:
            raise ValueError("models must not be empty")
        cards = {model: client.model_card(model, version) for model in models}
        self._socket = socket.create_server(("127.0.0.1", port))
        self._port: int = self._socket.getsockname()[1]
        self._token = secrets.token_urlsafe(24)
        site = _Site(client, cards, version)
        application = Starlette(
            routes=site.routes(),
            middleware=[Middleware(_Guard, token=self._token, port=self._port)],
            exception_handlers=dict.fromkeys(  # The client raises TypeError for edits.
                (ConvscopeError, TypeError, ValueError, HTTPException, ClientDisconnect), _reply_to_error
            ),
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                application,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_keep_alive=IDLE_TIMEOUT_S,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        self._ended = threading.Event()
        self._ended.set()

    @property
    def url(self) -> str:
        """The URL to open, with the token."""
        return f"http://127.0.0.1:{self._port}/#{self._token}"

    def serve_forever(self) -> None:
        """Serve requests until `shutdown` is called in another thread, or until a signal such as Ctrl-C."""
        self._ended.clear()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """End `serve_forever`, and wait until it has ended."""
        self._server.should_exit = True
        self._ended.wait()

    def close(self) -> None:
        """Close the port."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def accepted_hosts(port: int) -> tuple[str, ...]:
    """Return the accepted values of the Host header; browsers omit port 80."""
    names = ("127.0.0.1", "localhost")
    return (*(f"{name}:{port}" for name in names), *(names if port == HTTP_PORT else ()))


def http_status(error: ConvscopeError) -> HTTPStatus:
    """Return 400 if the request was rejected, 502 otherwise."""
    rejected = isinstance(error, RequestRejected) and not isinstance(error, AuthenticationFailed)
    return HTTPStatus.BAD_REQUEST if rejected else HTTPStatus.BAD_GATEWAY


class _Rejected(HTTPException):
    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(status, message)
        self.code = code


def _reply_to_error(request: Request, error: Exception) -> Response:
    """Reply with code and message; the connection is closed, as the body may not have been read."""
    status, code, message = HTTPStatus.BAD_REQUEST, "bad_request", str(error)
    if isinstance(error, ConvscopeError):
        status, code = http_status(error), error.code
    elif isinstance(error, HTTPException):
        status, code, message = HTTPStatus(error.status_code), getattr(error, "code", "not_found"), error.detail
    return _error_response(status, code, message)


def _error_response(status: HTTPStatus, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers={"Connection": "close"})


class _Guard:
    """Rejects what the page itself does not send, and adds the headers that confine the page.

    Args:
        app: The application behind it.
        token: Token of the printed URL.
        port: Port that the server listens on.
    """

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = accepted_hosts(port)
        self._headers = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{content_security_policy(connect=True)}; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_confined(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        reason = self._reason_to_reject(Request(scope))
        app = self._app if reason is None else _error_response(HTTPStatus.FORBIDDEN, "forbidden", reason)
        await app(scope, receive, send_confined)

    def _reason_to_reject(self, request: Request) -> str | None:
        # Another site's name may resolve to this machine (DNS rebinding).
        if request.headers.get("host") not in self._hosts:
            return "use 127.0.0.1 or localhost as the host name"
        if request.method == "GET" and request.url.path == "/":
            return None
        origin = request.headers.get("origin")
        if origin is not None and origin not in [f"http://{host}" for host in self._hosts]:
            return "requests from other pages are not allowed"
        if not hmac.compare_digest(request.headers.get("x-convscope-token", "").encode(), self._token):
            return "wrong token: open the URL that was printed last"
        return None


class _Picture(NamedTuple):
    """A picture of the page: its title, its file, and a small one as a data URL (None where it cannot be drawn)."""

    title: str
    file: bytes
    thumbnail: str | None


class _Pictures:
    """The pictures that the page sent, by an id that is made of their bytes."""

    def __init__(self) -> None:
        self._pictures: dict[str, _Picture] = {}
        self._lock = threading.Lock()

    def add(self, title: str, file: bytes, replaces: str = "") -> str:
        """Keep a picture, in place of another one if that is named, and return its id.

        The oldest ones are forgotten when all are too large together.
        """
        picture_id = hashlib.sha256(file).hexdigest()[:16]
        picture = _Picture(title, file, thumbnail(file))
        with self._lock:
            for old in (picture_id, replaces):
                self._pictures.pop(old, None)
            self._pictures[picture_id] = picture
            while sum(len(kept.file) for kept in self._pictures.values()) > KEPT_BYTES and len(self._pictures) > 1:
                del self._pictures[next(iter(self._pictures))]
        return picture_id

    def get(self, picture_id: str) -> _Picture:
        """Return a picture.

        Raises:
            _Rejected: It is not kept (any more).
        """
        with self._lock:
            picture = self._pictures.get(picture_id)
        if picture is None:
            message = "this program does not have the picture (any more): choose its file again"
            raise _Rejected(HTTPStatus.NOT_FOUND, "picture_not_found", message)
        return picture

    def describe(self) -> list[dict[str, Any]]:
        """Return id, title and thumbnail of each, oldest first."""
        with self._lock:
            kept = dict(self._pictures)
        return [
            {"id": picture_id, "title": picture.title, "thumbnail": picture.thumbnail}
            for picture_id, picture in kept.items()
        ]


class _Site:
    """What the server answers."""

    def __init__(self, client: Client, cards: dict[str, ModelCard], version: str | None) -> None:
        self._client = client
        self._cards = {model: (card, time.monotonic()) for model, card in cards.items()}  # With when it was asked for.
        self._version = version
        self._pictures = _Pictures()
        self._samples = _Pictures()
        for name in SAMPLES:
            self._samples.add(name, files("convscope_lens._page").joinpath("samples", name).read_bytes())
        self._filters: Callable[[str, str, str], NDArray[np.float32]] = functools.lru_cache(maxsize=8)(
            lambda model, layer, _: client.filters(model, layer, version)
        )

    def routes(self) -> list[Route]:
        """Return the routes; those that ask the service run in threads."""
        return [
            Route("/", self._page),
            Route("/models", self._models),
            Route("/pictures", self._list),
            Route("/pictures", self._add, methods=["POST"]),
            Route("/predict", self._predict),
            Route("/map", self._map),
            Route("/filters", self._kernels),
        ]

    def _page(self, request: Request) -> Response:
        settings = {
            "models": [_describe(model, card) for model, (card, _) in self._cards.items()],
            "max_bytes": MAX_BODY_BYTES,
            "samples": self._samples.describe(),
            "url": self._client.url,  # For the program that the page writes.
            "version": self._version,
        }
        return Response(page_html("convscope", None, settings=settings), media_type="text/html")

    def _models(self, request: Request) -> Response:
        return JSONResponse([_describe(model, self._card(model)) for model in self._cards])

    def _list(self, request: Request) -> Response:
        return JSONResponse(self._pictures.describe())

    async def _add(self, request: Request) -> Response:
        file = await _read(request)
        title = request.query_params.get("title", "picture")
        replaces = request.query_params.get("replaces", "")
        picture_id = await run_in_threadpool(self._pictures.add, title, encode_one_picture(file), replaces)
        return JSONResponse({"id": picture_id, "title": title, "thumbnail": self._pictures.get(picture_id).thumbnail})

    def _predict(self, request: Request) -> Response:
        model = self._model(request)
        card = self._card(model)
        data = self._page_data(request, model, card)
        if data["model"]["version"] != card.version:  # The service has taken in another one since.
            data = self._page_data(request, model, self._card(model, renew=True))
        return JSONResponse(data)

    def _page_data(self, request: Request, model: str, card: ModelCard) -> dict[str, Any]:
        query, picture = request.query_params, self._picture(request)
        method, top_k = query.get("method", "grad_cam"), _integer(request, "top_k")
        return fetch_page_data(
            self._client,
            picture.file,
            card,
            model=model,
            title=picture.title,
            max_values=MAX_MAP_VALUES,
            version=self._version,
            method=None if method == "none" else method,  # type: ignore[arg-type]  # The client checks it.
            layer=query.get("layer") or None,
            target=_integer(request, "target"),
            top_k=5 if top_k is None else top_k,
            by_default="method" not in query,
            edits=_edits(request),
        )

    def _map(self, request: Request) -> Response:
        """Send a layer's map of a picture as a .npy file, float32: one channel (h, w), or all of them."""
        model = self._model(request)
        layer = self._card(model).layer(request.query_params.get("layer", ""))
        channel = _integer(request, "channel")
        prediction = self._client.predict(
            self._picture(request).file,
            model=model,
            version=self._version,
            layers=[layer.name],
            channels=None if channel is None else [channel],
            top_k=1,
            edits=_edits(request),
        )
        values = prediction.maps[layer.name]
        content = io.BytesIO()
        np.save(content, values if channel is None else values[0], allow_pickle=False)
        return Response(content.getvalue(), media_type="application/octet-stream")

    def _kernels(self, request: Request) -> Response:
        model = self._model(request)
        card = self._card(model)
        layer = card.layer(request.query_params.get("layer", ""))
        channel = _integer(request, "channel") or 0
        filters = self._filters(model, layer.name, card.version)
        if not 0 <= channel < len(filters):
            raise ValueError(f"channel must be 0 to {len(filters) - 1}, not {channel}")
        return JSONResponse(pack_kernels(filters[channel : channel + 1], [channel]))

    def _model(self, request: Request) -> str:
        model = request.query_params.get("model", "")
        if model not in self._cards:
            message = f"unknown network; this page was started with {', '.join(self._cards)}"
            raise _Rejected(HTTPStatus.NOT_FOUND, "model_not_found", message)
        return model

    def _card(self, model: str, *, renew: bool = False) -> ModelCard:
        """Return a model's card, asked for again when it is old or is to be renewed."""
        card, asked_s = self._cards[model]
        if renew or time.monotonic() - asked_s > CARD_S:
            card = self._client.model_card(model, self._version)
            self._cards[model] = card, time.monotonic()
        return card

    def _picture(self, request: Request) -> _Picture:
        picture_id = request.query_params.get("picture", "")
        try:
            return self._samples.get(picture_id)
        except _Rejected:
            return self._pictures.get(picture_id)


def _describe(model: str, card: ModelCard) -> dict[str, Any]:
    """Return what the page's controls need of a model card."""
    size = card.input
    return {
        "name": model,
        "version": card.version,
        "description": card.description,
        "input": [size.channels, size.height, size.width],
        "layers": [
            {"name": layer.name, "shape": layer.shape, "sources": [dataclasses.asdict(one) for one in layer.sources]}
            for layer in card.layers
        ],
        "score_sources": [dataclasses.asdict(one) for one in card.sources],
        "methods": [method for method in card.explanations or METHODS if method != "picture"],
        "classes": card.classes,
        "edits": card.edits,
    }


def _edits(request: Request) -> list[dict[str, Any]]:
    """Return the edits of the address, JSON as in a request to the service; the client and the service check them."""
    text = request.query_params.get("edits") or "[]"
    try:
        edits = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("edits is not JSON") from None
    if not isinstance(edits, list):
        raise ValueError("edits must be a list of operations")
    return edits


def _integer(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, not {text!r}") from None


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or "transfer-encoding" in request.headers:
        raise _Rejected(HTTPStatus.LENGTH_REQUIRED, "bad_request", "Content-Length is missing")
    if int(length) > MAX_BODY_BYTES:
        message = f"pictures may be at most {MAX_BODY_BYTES:,} bytes"
        raise _Rejected(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "image_too_large", message)
    return await request.body()
