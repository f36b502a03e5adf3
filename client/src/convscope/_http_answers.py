"""Understanding what came over HTTP: a reply of the contract, or the exception that anything else stands for.

It does not know by which library it came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from convscope._exceptions import (
    AuthenticationFailed,
    BadRequest,
    ConvscopeError,
    DeadlineExceeded,
    ImageTooLarge,
    Overloaded,
    ProtocolError,
    ServerError,
)
from convscope._reply import check_open
from convscope._transport import parse_reply, torchserve_error

if TYPE_CHECKING:
    from convscope._wire.convscope_pb2 import PredictReply

PROTOBUF = "application/x-protobuf"
_PROTOBUF = PROTOBUF.encode()


def understand(status: int, headers: Mapping[bytes, bytes], body: bytes) -> PredictReply:
    """Read an answer.

    Args:
        status: Of HTTP.
        headers: By name, in lower case.
        body: The whole of it.

    Returns:
        The reply of the contract.

    Raises:
        ConvscopeError: What the answer stands for otherwise.
    """
    if headers.get(b"content-type", b"").lower().startswith(_PROTOBUF):
        reply = parse_reply(body)
        check_open(reply, _retry_after_s(headers))
        if 200 <= status < 300 or reply.HasField("error"):
            return reply
    raise refusal(status, body, _retry_after_s(headers))


def refusal(status: int, body: bytes, retry_after_s: float | None) -> ConvscopeError:
    """Make the exception for an answer that is not our handler's: TorchServe's own, a gateway's, or a stranger's.

    Args:
        status: Of HTTP.
        body: The whole of it.
        retry_after_s: Seconds after which to come back, if the answer says so.

    Returns:
        The exception, not raised.
    """
    kind, message = _torchserve_words(body)
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


def _torchserve_words(body: bytes) -> tuple[str, str]:
    """Return type and message of TorchServe's JSON error; of anything else no type and its first words."""
    try:
        error = json.loads(body)
        return str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
        return "", text.splitlines()[0] if text.isprintable() and text else ""


def _retry_after_s(headers: Mapping[bytes, bytes]) -> float | None:
    """Return the seconds of a Retry-After header, if it holds seconds."""
    value = headers.get(b"retry-after", b"").strip()
    return float(value) if value.isdigit() else None
