"""What both transports share: header names, sizes, host names, and the errors of whatever stands before the handler."""

from __future__ import annotations

import ipaddress
import json
import re

from google.protobuf.message import DecodeError

from convscope._exceptions import (
    AuthenticationFailed,
    BadRequest,
    ConvscopeError,
    DeadlineExceeded,
    ImageTooLarge,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ServerError,
)
from convscope._wire.convscope_pb2 import PredictReply

MAX_MESSAGE_BYTES = 512 * 1024 * 1024  # Of a request or a reply; gRPC's own default of 4 MB is less than one large map.
API_KEY_HEADER = "x-api-key"
REQUEST_ID_HEADER = "x-request-id"
USER_AGENT = "convscope-python"
WORKER_DIED = "Worker died"  # TorchServe's words.
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def ascii_host(host: str) -> str:
    """Return a host's name as DNS, TLS and HTTP know it.

    Args:
        host: The host of a URL, without brackets. A name with letters outside ASCII is converted as browsers do it:
            IDNA 2008 after the mapping of UTS 46. (Python's own codec is IDNA 2003, in which ß is ss.)

    Returns:
        An IP address, or a name in ASCII.

    Raises:
        ValueError: It is neither.
    """
    name = host
    if not host.isascii():
        import idna

        try:
            name = idna.encode(host, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(
                f"url names a host that IDNA 2008 does not allow ({error}): write it in ASCII, as xn--..."
            ) from error
    if ":" in name:
        return str(ipaddress.IPv6Address(name))
    if not _HOST.fullmatch(name) or len(name) > 253:
        raise ValueError(f"url must name a host by its address, or by its name in DNS, not {host[:80]!r}")
    return name


def parse_reply(data: bytes) -> PredictReply:
    """Parse a serialized reply.

    Args:
        data: The bytes that came.

    Returns:
        The reply.

    Raises:
        ProtocolError: They are not a `PredictReply`.
    """
    try:
        return PredictReply.FromString(data)
    except DecodeError as error:
        raise ProtocolError("the answer is not a convscope reply: is this a convscope server?") from error


def http_error(status: int, body: bytes, retry_after_s: float | None) -> ConvscopeError:
    """Make the exception for a response of HTTP that is not the handler's: TorchServe's, a gateway's, or another's.

    Args:
        status: Its status code.
        body: The whole of it.
        retry_after_s: Seconds after which the server asks to be tried again, if it said so.

    Returns:
        The exception, not raised.
    """
    kind, message = _read_error(body)
    known = torchserve_error(message)
    if known is not None:
        return known
    said = f"HTTP {status}" + (f": {message}" if message else "")
    if status in (401, 403):
        return AuthenticationFailed(f"the server refused the API key or the lack of one ({said})")
    if status == 413:
        return ImageTooLarge(f"the request is larger than the server's request limit ({said})")
    if status == 429 or (status == 503 and kind != "InternalServerException"):
        return Overloaded(f"the server takes no more work now ({said})", retry_after_s=retry_after_s)
    if status == 502:
        return Overloaded(f"a gateway got no answer from the server ({said})", retry_after_s=retry_after_s)
    if status in (408, 504):
        return DeadlineExceeded(f"a server on the way gave up waiting ({said})")
    if status == 400:
        return BadRequest(said)
    if status >= 500:
        return ServerError(said)
    return ProtocolError(f"not a convscope reply ({said}): is this a convscope server?")


def _read_error(body: bytes) -> tuple[str, str]:
    """Return type and message of TorchServe's JSON error; of anything else no type and its first line."""
    try:
        error = json.loads(body)
        return str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
        return "", text.splitlines()[0] if text.isprintable() and text else ""


def torchserve_error(text: str) -> ConvscopeError | None:
    """Recognise an error that TorchServe made itself, before or instead of the handler.

    Args:
        text: The message it sent; on gRPC with the name of a Java exception as its last line.

    Returns:
        The exception, not raised; None if the message is not a known one.
    """
    message = text.split("\n", 1)[0]
    if "Model not found" in text or "does not exist for model" in text:
        return ModelNotFound(message)
    if "has no worker to serve" in text:  # Its message for a full queue, too.
        return Overloaded(message)
    if WORKER_DIED in text or "Prediction failed" in text:
        return ServerError(message)
    return None
