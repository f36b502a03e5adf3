"""The local web server of `convscope ui`: serves the page, and sends its pictures to the service.

POST requests need the token in the printed URL's fragment, which browsers never send to servers. So other web sites
cannot send requests; host names other than 127.0.0.1 and localhost are rejected (DNS rebinding). The page contains no
secret: the service's API key stays in this process.
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

from convscope_lens._page.page_data import encode_one_picture, fetch_page_data
from convscope_lens._page.report import content_security_policy, page_html

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from convscope import Client, ModelCard

MAX_BODY_BYTES = 16 << 20
MAX_MAP_VALUES = 1 << 20  # All maps together: the page draws them again at every stroke.
HTTP_PORT = 80
IDLE_TIMEOUT_S = 60  # Of a connection.


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
        self._server = _Server(client, cards, version, port)

    @property
    def url(self) -> str:
        """The URL to open, with the token."""
        return f"http://127.0.0.1:{self._server.server_port}/#{self._server.token}"

    def serve_forever(self) -> None:
        """Serve requests until `shutdown` is called in another thread, or until an exception such as Ctrl-C."""
        self._server.serve_forever()

    def shutdown(self) -> None:
        """End `serve_forever`, and wait until it has ended."""
        self._server.shutdown()

    def close(self) -> None:
        """Close the port."""
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, client: Client, cards: dict[str, ModelCard], version: str | None, port: int) -> None:
        self.client = client
        self.cards = cards
        self.version = version
        self.token = secrets.token_urlsafe(24)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The accepted values of the Host header; browsers omit port 80."""
        names = ("127.0.0.1", "localhost")
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == HTTP_PORT else ()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: browsers drop connections at any time."""


class _Rejected(Exception):
    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def http_status(error: ConvscopeError) -> HTTPStatus:
    """Return 400 if the request was rejected, 502 otherwise."""
    rejected = isinstance(error, RequestRejected) and not isinstance(error, AuthenticationFailed)
    return HTTPStatus.BAD_REQUEST if rejected else HTTPStatus.BAD_GATEWAY


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "convscope"
    sys_version = ""
    timeout = IDLE_TIMEOUT_S
    disable_nagle_algorithm = True  # Without this, Nagle's algorithm delays the body.

    def do_GET(self) -> None:
        """Send the page."""
        try:
            self._check_host()
            if self.path != "/":
                raise _Rejected(HTTPStatus.NOT_FOUND, "not_found", "not found")
        except _Rejected as rejected:
            return self._reject(rejected)
        settings = {"models": list(self.server.cards), "max_bytes": MAX_BODY_BYTES}
        page = page_html("convscope", None, controls=settings)
        return self._reply(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())

    def do_POST(self) -> None:
        """Send the page data of the picture in the body."""
        try:
            data = self._page_data()
        except _Rejected as rejected:
            return self._reject(rejected)
        except ConvscopeError as error:
            return self._reject(_Rejected(http_status(error), error.code, str(error)))
        except ValueError as error:
            return self._reject(_Rejected(HTTPStatus.BAD_REQUEST, "bad_request", str(error)))
        return self._reply(HTTPStatus.OK, "application/json", json.dumps(data, allow_nan=False).encode())

    def _page_data(self) -> dict[str, Any]:
        self._check_host()
        self._check_token()
        body = self._read()
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        if address.path != "/predict":
            raise _Rejected(HTTPStatus.NOT_FOUND, "not_found", "not found")
        model = query.get("model", "")
        card = self.server.cards.get(model)
        if card is None:
            raise _Rejected(HTTPStatus.NOT_FOUND, "model_not_found", "unknown model")
        return fetch_page_data(
            self.server.client,
            encode_one_picture(body),
            card,
            model=model,
            title=query.get("title", "picture"),
            max_values=MAX_MAP_VALUES,
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
            raise _Rejected(HTTPStatus.FORBIDDEN, "forbidden", "wrong token: open the URL that was printed last")

    def _read(self) -> bytes:
        length = self.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or "transfer-encoding" in self.headers:
            raise _Rejected(HTTPStatus.LENGTH_REQUIRED, "bad_request", "Content-Length is missing")
        if int(length) > MAX_BODY_BYTES:
            message = f"pictures may be at most {MAX_BODY_BYTES:,} bytes"
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

    def log_message(self, format: str, *args: Any) -> None:  # Parameter name from the base class.
        """Do not log requests."""
