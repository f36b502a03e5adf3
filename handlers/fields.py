"""Fields: a serialized `PredictRequest` cut into its pictures, its id, and what is asked of them.

Callers that ask often ask the same of other pictures, so that last part is worth remembering as bytes, and protobuf's
parser has nothing to do: between two requests, when its code has left the processor's caches, that is 4 % of a worker's
time for a lone caller. The encoding: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from typing import NamedTuple

from handlers.wire import convscope_pb2 as wire

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # Wire types; 3 and 4 are groups, which proto3 does not have.
_PICTURE = wire.PredictRequest.PICTURES_FIELD_NUMBER << 3 | _BYTES
_REQUEST_ID = wire.PredictRequest.REQUEST_ID_FIELD_NUMBER << 3 | _BYTES
_MOST_BITS = 63  # Of what is before a number's last byte.


class Parts(NamedTuple):
    """A message in parts.

    Attributes:
        pictures: Each as sent, in order.
        request_id: Empty where there is none.
        rest: All other fields, serialized, in order. It has yet to be parsed: here nobody looked into them.
    """

    pictures: tuple[bytes, ...]
    request_id: str
    rest: bytes


def split(message: bytes) -> Parts:
    """Cut a message into parts.

    Raises:
        ValueError: It is no message.
    """
    pictures: list[bytes] = []
    rest: list[bytes] = []
    request_id = b""
    at, end = 0, len(message)
    while at < end:
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(message, at)
            start_of_content, at = at, at + length
            if at <= end and tag == _PICTURE:
                pictures.append(message[start_of_content:at])
                continue
            if at <= end and tag == _REQUEST_ID:
                request_id = message[start_of_content:at]
                continue
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at > end:
            raise ValueError("a field is longer than the message")
        rest.append(message[start:at])
    return Parts(tuple(pictures), request_id.decode(), b"".join(rest))


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    number = shift = 0
    try:
        while (byte := message[at]) > 0x7F:
            number |= (byte & 0x7F) << shift
            shift += 7
            at += 1
            if shift > _MOST_BITS:
                raise ValueError("a number of more than 64 bits")
    except IndexError:
        raise ValueError("the message ends within a number") from None
    return number | byte << shift, at + 1
