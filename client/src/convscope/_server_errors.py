"""Turns error responses of TorchServe and gateways into our exceptions."""

from __future__ import annotations

import json
import re

from convscope._exceptions import (
    AuthenticationFailed,
    BadRequest,
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    ImageTooLarge,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ReplyTooLarge,
    ServerError,
)
from convscope._options import ServedModel
from convscope._request import MAX_MESSAGE_BYTES

WORKER_DIED = "Worker died"  # From TorchServe's message.

# One message per exception, for both transports.
MESSAGES: dict[type[ConvscopeError], str] = {
    AuthenticationFailed: "API key missing or rejected",
    DeadlineExceeded: "gateway timeout",
    ImageTooLarge: "the request is larger than the server's request limit",
    Overloaded: "the server is overloaded",
    ProtocolError: "the response is not from a convscope service; check the URL",
    ReplyTooLarge: f"the reply is over this client's limit of {MAX_MESSAGE_BYTES} bytes",
}


def deadline_error(deadline_s: float) -> DeadlineExceeded:
    """Return the exception for a call that was not complete at its deadline."""
    return DeadlineExceeded(f"no complete response within {round(deadline_s, 3):g} s")


def connection_error(url: str, reason: str) -> ConnectError:
    """Return the exception for a connection that could not be made, or that broke."""
    return ConnectError(f"connection to {url} failed: {reason}")


def closed_error(url: str) -> ConnectError:
    """Return the exception for a call whose client was closed meanwhile."""
    return connection_error(url, "client was closed during the call")


def http_error(status: int, body: bytes, retry_after_s: float | None) -> ConvscopeError:
    """Map an HTTP error response (from TorchServe or a gateway, not from our handler) to an exception to raise.

    Args:
        status: HTTP status code.
        body: Complete response body.
        retry_after_s: Seconds to wait before retrying, from the server; None if it gave none.
    """
    error_type, message = _read_error(body)
    server_error = torchserve_error(message)
    if server_error is not None:
        return server_error
    detail = f"HTTP {status}" + (f": {message}" if message else "")
    if status in (401, 403):
        return AuthenticationFailed(f"{MESSAGES[AuthenticationFailed]} ({detail})")
    if status == 413:
        return ImageTooLarge(f"{MESSAGES[ImageTooLarge]} ({detail})")
    if status == 429 or (status == 503 and error_type != "InternalServerException"):
        return Overloaded(f"{MESSAGES[Overloaded]} ({detail})", retry_after_s=retry_after_s)
    if status == 502:
        return Overloaded(f"bad gateway: no response from the server ({detail})", retry_after_s=retry_after_s)
    if status in (408, 504):
        return DeadlineExceeded(f"{MESSAGES[DeadlineExceeded]} ({detail})")
    if status == 400:
        return BadRequest(detail)
    if status >= 500:
        return ServerError(detail)
    return ProtocolError(f"{MESSAGES[ProtocolError]} ({detail})")


def parse_retry_after(text: str) -> float | None:
    """Return the seconds of a Retry-After header; None if it is empty, or a date."""
    text = text.strip()
    return float(text) if text.isascii() and text.isdigit() else None


def _read_error(body: bytes) -> tuple[str, str]:
    """Return type and message of TorchServe's JSON error; for any other body no type, and its first line."""
    try:
        error = json.loads(body)
        return str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
        return "", text.splitlines()[0] if text.isprintable() and text else ""


def torchserve_error(text: str) -> ConvscopeError | None:
    """Map a TorchServe error message to an exception to raise; None if it is not a known one.

    On gRPC the last line of the message is the name of a Java exception.
    """
    message = text.split("\n", 1)[0]
    if "Model not found" in text or "does not exist for model" in text:
        return ModelNotFound(message, models=_read_models(message))
    if "has no worker to serve" in text:  # Also its message for a full queue.
        return Overloaded(message)
    if WORKER_DIED in text or "Prediction failed" in text:
        return ServerError(message)
    return None


def _read_models(message: str) -> list[ServedModel] | None:
    """Return the models that the message of ModelNotFound lists, `(models: cifar/1.0, digits/1.0)`; None without."""
    found = re.search(r"\(models: ([A-Za-z0-9._/, -]+)\)", message)
    return None if found is None else [ServedModel(*name.split("/", 1)) for name in found[1].split(", ")]
