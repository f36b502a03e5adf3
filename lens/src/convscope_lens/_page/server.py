"""The web server of `convscope ui`: it listens on this machine only, and sends the page's pictures to the service.

The page holds no secret. Requests for predictions need a token. It is in the URL that is printed, after the `#`, a part
that browsers do not send. The service's API key stays in this process. Other web sites cannot send requests: they do
not know the token, and host names other than 127.0.0.1 and localhost are rejected (DNS rebinding).
"""

from __future__ import annotations

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from convscope import AuthenticationFailed, ConvscopeError, RequestRejected

from convscope_lens._page.report import content_security_policy, page_html
from convscope_lens._page.scene import fetch_scene, read_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope import Client

MAX_BODY_BYTES = 16 << 20
MAX_CELLS = 1 << 20  # Of all maps together: the page draws them again at every stroke.
HTTP_PORT = 80
IDLE_S = 60  # Idle connections are closed after so long.


class PageServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1.

    Args:
        client: A connected client; it must stay open as long as the server runs.
        models: Names of the models that the page offers, at least one.
        version: Version of the models; None for the service's default.
        port: Port to listen on; 0 for a free port.

    Raises:
        ConvscopeError: The card of a model could not be fetched.
        OSError: The port is in use.
        ValueError: There is no model.
    """

    daemon_threads = True

    def __init__(self, client: Client, models: Sequence[str], *, version: str | None = None, port: int = 0) -> None:
        if not models:
            raise ValueError("name at least one model")
        self.client = client
        self.version = version
        self.cards = {model: client.model_card(model, version) for model in models}
        self.token = secrets.token_urlsafe(24)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The URL to open, with its token."""
        return f"http://127.0.0.1:{self.server_port}/#{self.token}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The accepted values of the Host header; browsers leave out port 80."""
        names = ("127.0.0.1", "localhost")
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == HTTP_PORT else ()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: browsers close connections at any time."""


class _Rejected(Exception):
    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def answer_status(error: ConvscopeError) -> HTTPStatus:
    """Return 400 if the request is at fault, 502 if the service or this program's API key is."""
    rejected = isinstance(error, RequestRejected) and not isinstance(error, AuthenticationFailed)
    return HTTPStatus.BAD_REQUEST if rejected else HTTPStatus.BAD_GATEWAY


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "convscope"
    sys_version = ""
    timeout = IDLE_S
    disable_nagle_algorithm = True  # Else the body waits 40 ms for the acknowledgement of the headers.

    def do_GET(self) -> None:
        """Send the page."""
        try:
            self._check_host()
            if self.path != "/":
                raise _Rejected(HTTPStatus.NOT_FOUND, "not_found", "there is only /")
        except _Rejected as rejected:
            return self._reject(rejected)
        settings = {"models": list(self.server.cards), "max_bytes": MAX_BODY_BYTES}
        page = page_html("convscope", None, controls=settings)
        return self._reply(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())

    def do_POST(self) -> None:
        """Send the scene of the picture in the body."""
        try:
            scene = self._scene()
        except _Rejected as rejected:
            return self._reject(rejected)
        except ConvscopeError as error:
            return self._reject(_Rejected(answer_status(error), error.code, str(error)))
        except ValueError as error:
            return self._reject(_Rejected(HTTPStatus.BAD_REQUEST, "bad_request", str(error)))
        return self._reply(HTTPStatus.OK, "application/json", json.dumps(scene, allow_nan=False).encode())

    def _scene(self) -> dict[str, Any]:
        self._check_host()
        self._check_token()
        body = self._read()
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        if address.path != "/see":
            raise _Rejected(HTTPStatus.NOT_FOUND, "not_found", "there is only /see")
        model = query.get("model", "")
        card = self.server.cards.get(model)
        if card is None:
            raise _Rejected(HTTPStatus.NOT_FOUND, "model_not_found", "this page does not offer that model")
        return fetch_scene(
            self.server.client,
            read_picture(body),
            card,
            model=model,
            title=query.get("title", "picture"),
            max_cells=MAX_CELLS,
            version=self.server.version,
            method="grad_cam" if query.get("explain") == "1" else None,
        )

    def _check_host(self) -> None:
        """Reject other host names: another site's name may resolve to this machine (DNS rebinding)."""
        if self.headers.get("host") not in self.server.hosts:
            raise _Rejected(HTTPStatus.FORBIDDEN, "forbidden", "use 127.0.0.1 or localhost as the host name")

    def _check_token(self) -> None:
        origin = self.headers.get("origin")
        if origin is not None and origin not in [f"http://{host}" for host in self.server.hosts]:
            raise _Rejected(HTTPStatus.FORBIDDEN, "forbidden", "requests from other pages are not allowed")
        if not hmac.compare_digest(self.headers.get("x-convscope-token", "").encode(), self.server.token.encode()):
            raise _Rejected(HTTPStatus.FORBIDDEN, "forbidden", "the token is wrong: open the URL that was printed last")

    def _read(self) -> bytes:
        length = self.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or "transfer-encoding" in self.headers:
            raise _Rejected(HTTPStatus.LENGTH_REQUIRED, "bad_request", "the body's length is missing")
        if int(length) > MAX_BODY_BYTES:
            message = f"a picture has at most {MAX_BODY_BYTES:,} bytes here"
            raise _Rejected(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "image_too_large", message)
        return self.rfile.read(int(length))

    def _reject(self, rejected: _Rejected) -> None:
        self.close_connection = True  # The body may not have been read.
        body = json.dumps({"error": {"code": rejected.code, "message": str(rejected)}}).encode()
        self._reply(rejected.status, "application/json", body)

    def _reply(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{content_security_policy(connect=True)}; frame-ancestors 'none'",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # The name of the base class.
        """Do not log requests."""
