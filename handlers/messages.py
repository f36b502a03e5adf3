"""TorchServe's messages to its worker and back, read and written in about half the time that its own code takes.

That code makes several calls for each of a message's fields, and joins all replies of a batch into one more copy. The
format is Java's, and TorchServe 0.12 its last release, so neither it nor what is replaced here moves.

A form's repeated fields are kept besides: `curl -F data=@a.png -F data=@b.png` reaches the worker as two parameters
named `data`, of which TorchServe's worker keeps the last without a word. Here they become one, the list of both.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from handlers import json_text
from handlers.assembly import Piece
from handlers.connection import Improved, improve

_LENGTH = struct.Struct("!i")  # Before each field.
_END = -1  # In place of a length, after a list's last item.
_CLOSE = _LENGTH.pack(_END)


class Message(NamedTuple):
    """One request of a batch.

    Attributes:
        request_id: TorchServe's.
        properties: What TorchServe keeps for a request: its headers, and `{"content-type": ...}` for each parameter.
        row: Its parameters: bytes, text where the content type says so, what JSON says, or a list of these where a
            parameter is repeated.
    """

    request_id: str
    properties: dict[str, Any]
    row: dict[str, Any]


def install() -> None:
    """Make TorchServe's code in this worker read and write by this module; calling it again changes nothing."""
    from ts import context, service  # Only a worker has it; tests and training import this package without.
    from ts.protocol import otf_message_handler

    otf_message_handler._retrieve_inference_msg = read_batch
    service.Service.retrieve_data_for_inference = staticmethod(partial(hand_over, context.RequestProcessor))
    service.create_predict_response = write_replies


def read_batch(connection: Any) -> list[Message]:
    """Read a batch of requests, whose first byte, the command, has been read.

    Args:
        connection: To TorchServe, a socket; it is improved.

    Raises:
        SystemExit: TorchServe has gone away.
    """
    improve(connection)
    read = _reader(connection.recv)
    batch: list[Message] = []
    while (request_id := read()) is not None:
        headers: dict[str, str] = {}
        while (name := read()) is not None:
            headers[name.decode()] = (read() or b"").decode()
        types: dict[str, Any] = {}
        row: dict[str, Any] = {}
        while (name := read()) is not None:
            _add(row, types, name.decode(), (read() or b"").decode(), read() or b"")
        batch.append(Message(request_id.decode(), types | headers, row))
    return batch


def _reader(receive: Callable[[int], bytes]) -> Callable[[], bytes | None]:
    """Return what reads the next field: its content, or None for the end of a list."""

    def read() -> bytes | None:
        head = receive(_LENGTH.size)
        [length] = _LENGTH.unpack(head if len(head) == _LENGTH.size else complete(head, _LENGTH.size))
        if length <= 0:
            return None if length == _END else b""
        content = receive(length)
        return content if len(content) == length else complete(content, length)

    def complete(content: bytes, length: int) -> bytes:
        while len(content) < length:
            more = receive(length - len(content))
            if not more:
                sys.exit(0)  # As TorchServe's own code does.
            content += more
        return content

    return read


def _add(row: dict[str, Any], types: dict[str, Any], name: str, content_type: str, content: bytes) -> None:
    """Add a parameter to a row."""
    value = _value(content_type, content)
    if name in row:
        first = row[name]
        row[name] = [*(first if isinstance(first, list) else [first]), value]
    else:
        row[name] = value
        types[name] = {"content-type": content_type}


def _value(content_type: str, content: bytes) -> Any:
    """Return what a parameter holds; its bytes where it is not what its type says."""
    try:
        if content_type == "application/json":
            return json_text.loads(content.decode())
        return content.decode() if content_type.startswith("text") else content
    except ValueError:
        return content


def hand_over(
    make_processor: Callable[[dict[str, Any]], Any], batch: Sequence[Message]
) -> tuple[list[Any], list[dict[str, Any]], dict[int, str]]:
    """Return what TorchServe's `Service` wants of a batch: a processor, a row and an id for each request."""
    processors = [make_processor(message.properties) for message in batch]
    return processors, [message.row for message in batch], {i: message.request_id for i, message in enumerate(batch)}


def write_replies(
    bodies: Sequence[bytes | list[Piece]] | None, ids: Mapping[int, str], message: str, code: int, context: Any = None
) -> list[Piece] | bytearray:
    """Write the replies to a batch.

    Args:
        bodies: One a request, whole or in pieces; None if all of them failed.
        ids: TorchServe's id of each.
        message: Of the batch.
        code: Likewise.
        context: TorchServe's, which knows type and status of each; None if all of them failed.

    Returns:
        What `sendall` of the connection takes.
    """
    if bodies is None or context is None or not isinstance(context.cl_socket, Improved):
        from ts.protocol.otf_message_handler import create_predict_response

        whole: bytearray = create_predict_response(bodies, ids, message, code, context=context)
        return whole
    pieces: list[Piece] = [_LENGTH.pack(code) + _field(message)]
    for index, request_id in ids.items():
        found = bodies[index]
        body = found if isinstance(found, list) else [found]
        status, phrase = context.get_response_status(index)
        about = _about(status, phrase or "", tuple(context.get_response_headers(index).items()))
        pieces += [_field(request_id) + about + _LENGTH.pack(sum(map(len, body))), *body]
    pieces.append(_CLOSE)
    return pieces


@lru_cache(maxsize=256)
def _about(status: int, phrase: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Return what stands between a reply's id and its body: type, status, headers."""
    written = b"".join(_field(text) for header in headers for text in header)
    content_type = dict(headers).get("content-type", "")
    return _field(content_type) + _LENGTH.pack(status) + _field(phrase) + _LENGTH.pack(len(headers)) + written


def _field(text: str) -> bytes:
    content = text.encode()
    return _LENGTH.pack(len(content)) + content
