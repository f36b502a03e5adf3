"""The page to play with: a small web server of this machine that asks the service on the page's behalf.

The page itself holds no secret. The key that a question needs stands in the address that is printed, after the `#`,
which browsers do not send; the service's API key stays in this process. Other sites cannot ask: they do not know the
key, and a name of theirs that leads here is not answered.
"""

from __future__ import annotations

import hmac
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from convscope._exceptions import AuthenticationFailed, ConvscopeError, RequestRejected

from convscope_lens._page.assets import page_html, policy
from convscope_lens._page.scene import look, one_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope._client import Client

MAX_BODY_BYTES = 16 << 20
MAX_CELLS = 1 << 20  # Of all maps: what a page draws anew at every stroke.
HTTP_PORT = 80
IDLE_S = 60  # A connection that says nothing for so long is closed.


class PageServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1, and nowhere else.

    Args:
        client: Whom to ask; it must outlive the server.
        models: The models that are offered, at least one.
        version: Of the models; None for the server's default.
        port: Where to listen; 0 for a free port.

    Raises:
        ConvscopeError: A model does not describe itself.
        OSError: The port is taken.
        ValueError: No model is named.
    """

    daemon_threads = True

    def __init__(self, client: Client, models: Sequence[str], *, version: str | None = None, port: int = 0) -> None:
        if not models:
            raise ValueError("name at least one model")
        self.client = client
        self.version = version
        self.cards = {model: client.model_card(model, version) for model in models}
        self.key = secrets.token_urlsafe(24)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The address to open, with its key."""
        return f"http://127.0.0.1:{self.server_port}/#{self.key}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names under which it answers; browsers leave the port out where it is HTTP's own."""
        names = ("127.0.0.1", "localhost")
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == HTTP_PORT else ()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let a browser hang up whenever it likes."""


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def answer_status(error: ConvscopeError) -> HTTPStatus:
    """Return 400 where the picture is at fault, 502 where the service or this program's key is."""
    refused = isinstance(error, RequestRejected) and not isinstance(error, AuthenticationFailed)
    return HTTPStatus.BAD_REQUEST if refused else HTTPStatus.BAD_GATEWAY


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "convscope"
    sys_version = ""
    timeout = IDLE_S
    disable_nagle_algorithm = True  # Else the body waits 40 ms for the receipt of the head.

    def do_GET(self) -> None:
        """Answer with the page."""
        try:
            self._check_host()
            if self.path != "/":
                raise _Refused(HTTPStatus.NOT_FOUND, "not_found", "there is only /")
        except _Refused as refused:
            return self._refuse(refused)
        settings = {"models": list(self.server.cards), "max_bytes": MAX_BODY_BYTES}
        page = page_html("convscope", None, controls=settings)
        return self._reply(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())

    def do_POST(self) -> None:
        """Answer with what a model sees in the picture of the body."""
        try:
            scene = self._look()
        except _Refused as refused:
            return self._refuse(refused)
        except ConvscopeError as error:
            return self._refuse(_Refused(answer_status(error), error.code, str(error)))
        except ValueError as error:
            return self._refuse(_Refused(HTTPStatus.BAD_REQUEST, "bad_request", str(error)))
        return self._reply(HTTPStatus.OK, "application/json", json.dumps(scene, allow_nan=False).encode())

    def _look(self) -> dict[str, Any]:
        self._check_host()
        self._check_key()
        body = self._read()
        address = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(address.query).items()}
        if address.path != "/see":
            raise _Refused(HTTPStatus.NOT_FOUND, "not_found", "there is only /see")
        model = asked.get("model", "")
        card = self.server.cards.get(model)
        if card is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "model_not_found", "this page does not offer that model")
        return look(
            self.server.client,
            one_file(body),
            card,
            model=model,
            title=asked.get("title", "picture"),
            max_cells=MAX_CELLS,
            version=self.server.version,
            method="grad_cam" if asked.get("explain") == "1" else None,
        )

    def _check_host(self) -> None:
        """Refuse who came by a name that is not this machine's: a foreign one may have been led here."""
        if self.headers.get("host") not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "forbidden", "this page answers as 127.0.0.1 and localhost only")

    def _check_key(self) -> None:
        origin = self.headers.get("origin")
        if origin is not None and origin not in [f"http://{host}" for host in self.server.hosts]:
            raise _Refused(HTTPStatus.FORBIDDEN, "forbidden", "another page may not ask here")
        if not hmac.compare_digest(self.headers.get("x-convscope-token", "").encode(), self.server.key.encode()):
            raise _Refused(
                HTTPStatus.FORBIDDEN, "forbidden", "the key is wrong: open the address that was printed last"
            )

    def _read(self) -> bytes:
        length = self.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or "transfer-encoding" in self.headers:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "bad_request", "the body's length is missing")
        if int(length) > MAX_BODY_BYTES:
            message = f"a picture has at most {MAX_BODY_BYTES:,} bytes here"
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "image_too_large", message)
        return self.rfile.read(int(length))

    def _refuse(self, refused: _Refused) -> None:
        self.close_connection = True  # The body may not have been read.
        body = json.dumps({"error": {"code": refused.code, "message": str(refused)}}).encode()
        self._reply(refused.status, "application/json", body)

    def _reply(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{policy(connect=True)}; frame-ancestors 'none'",
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
        """Say nothing of requests."""
