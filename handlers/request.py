"""Requests: from what TorchServe hands over to pictures and options, the same from every kind of body.

A row comes in one of five shapes: a protobuf `PredictRequest` (REST body or gRPC `input["request"]`), JSON, a form or
gRPC's plain keys, an encoded picture as the raw body, or nothing at all, which asks for the model card. It knows
nothing of how a picture is decoded or a reply encoded.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from handlers import fields
from handlers.errors import BadRequest, TooManyImages
from handlers.explanations.asked import Explain
from handlers.media import GRPC_DEFAULT, REST_DEFAULT, choose
from handlers.options import OPTION_NAMES, Options
from handlers.trace import Trace
from handlers.wire import convscope_pb2 as wire

_PLAIN_KEYS = ("data", *OPTION_NAMES, "describe", "filters", "accept", "request_id")
_HEADER_PREFIX = "x-convscope-"
_MOST_OPTION_BYTES = 512  # That are worth remembering: fields that we do not know may hold anything.
_PROTOBUF_TYPES = ("application/x-protobuf", "application/protobuf")

Row = Mapping[str, Any]
Bytes = bytes | bytearray


@dataclass(frozen=True)
class Request:
    """What one caller asks.

    Attributes:
        pictures: Files as sent, still encoded, in order; empty when the model card is asked for.
        options: What to answer about them.
        media_type: What to answer in.
        describe: Answer the model card instead.
        filters: Answer the kernels behind this layer instead; empty for no such question.
    """

    pictures: tuple[Bytes, ...]
    options: Options
    media_type: str
    describe: bool = False
    filters: str = ""


def request_headers(properties: Mapping[str, Any]) -> dict[str, str]:
    """Pick the HTTP headers out of what TorchServe keeps for a request, with lower-case names.

    It files each parameter's own content type among them, as a dict; and gRPC has none, metadata never gets here. Netty
    adds `content-length: 0`, spelt so, to a request without a body that said nothing of its length, as GET does: that
    one is left out, which tells an empty GET from a body that was forgotten.
    """
    return {
        name.lower(): value
        for name, value in properties.items()
        if isinstance(value, str) and (name, value) != ("content-length", "0")
    }


def reply_type(row: Row, headers: Mapping[str, str]) -> str:
    """Return the media type to answer in; a field goes before the header.

    Raises:
        BadRequest: None of the accepted ones is offered.
    """
    default, header = REST_DEFAULT if headers else GRPC_DEFAULT, headers.get("accept", "")
    body = row.get("body")
    field = (body if isinstance(body, dict) else row).get("accept")
    if not field:
        return choose(header, default=default)
    with suppress(BadRequest):
        default = choose(header, default=default)
    return choose(_text(field, "accept"), default=default)


def parse(row: Row, headers: Mapping[str, str], trace: Trace, *, max_images: int) -> Request:
    """Read one row.

    Args:
        row: TorchServe's parameters of one request: values are bytearray, str, parsed JSON, or, for a repeated form
            field, a list of these.
        headers: HTTP headers, lower-case; empty on gRPC.
        trace: Told the request's id as soon as it is read, since a request that is refused has one too.
        max_images: Largest accepted number of pictures.

    Raises:
        BadRequest: The body or an option cannot be read.
        TooManyImages: More pictures than `max_images`.
    """
    media_type = reply_type(row, headers)
    if headers.get("describe", "").lower() == "true" or _asks_nothing(row, headers):
        return Request((), Options(), media_type, describe=True)
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if "request" in row:
        return _from_protobuf(row["request"], headers, trace, media_type, max_images)
    if "body" not in row:
        return _from_fields(row, headers, trace, media_type, max_images)
    body = row["body"]
    if content_type in _PROTOBUF_TYPES:
        return _from_protobuf(body, headers, trace, media_type, max_images)
    if content_type == "application/json":
        return _from_json(body, headers, trace, media_type, max_images)
    if isinstance(body, str):  # TorchServe decodes text/*; whatever it was, it is looked at as a picture.
        body = body.encode(errors="replace")
    return Request((body,), Options.from_text(_header_options(headers)), media_type)


def _asks_nothing(row: Row, headers: Mapping[str, str]) -> bool:
    """Tell an empty GET, the probe for the model card, from a request whose body was forgotten."""
    empty = set(row) == {"body"} and row["body"] in ("", b"")
    return empty and bool(headers) and "content-length" not in headers


def _from_protobuf(body: Any, headers: Mapping[str, str], trace: Trace, media_type: str, max_images: int) -> Request:
    try:
        if not isinstance(body, (bytes, bytearray)):
            raise TypeError(type(body))
        pictures, request_id, rest = fields.split(bytes(body))
        trace.identify(request_id)
        # Callers that ask often always ask the same of their pictures.
        asked = _remembered(rest) if len(rest) <= _MOST_OPTION_BYTES else _asked(rest)
    except (DecodeError, TypeError, ValueError) as err:
        raise BadRequest("the body is not a convscope.v1.PredictRequest; see proto/convscope.proto") from err
    if asked.describe or asked.filters:
        return Request((), Options(), media_type, describe=asked.describe, filters=asked.filters)
    check_count(len(pictures), max_images)
    options = asked.options
    if options.explain is None and _is_to_explain(headers):
        options = replace(options, explain=Explain())
    return Request(pictures, options, media_type)


class _Asked(NamedTuple):
    """What a message asks, whatever its pictures and its id."""

    describe: bool
    filters: str
    options: Options


def _asked(rest: bytes) -> _Asked:
    message = wire.PredictRequest.FromString(rest)
    aside = message.describe or bool(message.filters)
    return _Asked(message.describe, message.filters, Options() if aside else Options.from_message(message))


_remembered = lru_cache(maxsize=256)(_asked)


def _from_json(body: Any, headers: Mapping[str, str], trace: Trace, media_type: str, max_images: int) -> Request:
    if not isinstance(body, dict):
        raise BadRequest('the body is not a JSON object; send {"data": "<base64 of a picture>", "layers": [...]}')
    trace.identify(body.get("request_id"))
    _check_keys(body, _PLAIN_KEYS)
    if body.get("describe") is True:
        return Request((), Options(), media_type, describe=True)
    if not isinstance(body.get("filters", ""), str | None):
        raise BadRequest("filters must be the name of one layer")
    if body.get("filters"):
        return Request((), Options(), media_type, filters=body["filters"])
    data = body.get("data", [])
    encoded = data if isinstance(data, list) else [data]
    check_count(len(encoded), max_images)
    options = {name: body[name] for name in OPTION_NAMES if body.get(name) is not None}
    return Request(
        tuple(_from_base64(item) for item in encoded),
        Options.from_values(Options.parse_text(_header_options(headers)) | options),
        media_type,
    )


def _from_base64(item: Any) -> bytes:
    if not isinstance(item, str):
        raise BadRequest("each picture in data must be a base64 string of a picture file or a .npy array")
    try:
        return base64.b64decode(item.rpartition("base64,")[2], validate=True)  # A data: URL may come with its head.
    except (binascii.Error, ValueError) as err:
        raise BadRequest("a picture in data is not valid base64") from err


def _from_fields(row: Row, headers: Mapping[str, str], trace: Trace, media_type: str, max_images: int) -> Request:
    if "data" not in row and headers.get("content-type") == "application/x-www-form-urlencoded":
        raise BadRequest(
            "the body came as a web form, curl's way with -d; send a picture with curl -T or curl -F data=@"
        )
    trace.identify(row.get("request_id"))
    _check_keys(row, _PLAIN_KEYS)
    if "describe" in row and _text(row["describe"], "describe").lower() not in ("0", "false"):
        return Request((), Options(), media_type, describe=True)
    filters = _text(row.get("filters", ""), "filters").strip()
    if filters:
        return Request((), Options(), media_type, filters=filters)
    data = row.get("data", [])
    parts = data if isinstance(data, list) else [data]
    check_count(len(parts), max_images)
    fields = {name: _text(row[name], name) for name in OPTION_NAMES if name in row}
    return Request(
        tuple(_picture_part(part) for part in parts),
        Options.from_text(_header_options(headers) | fields),
        media_type,
    )


def _picture_part(part: Any) -> Bytes:
    if isinstance(part, str):
        return part.encode(errors="replace")
    if not isinstance(part, (bytes, bytearray)):  # A part of type application/json was parsed on its way here.
        raise BadRequest("data must be a picture file, not JSON")
    return part


def _header_options(headers: Mapping[str, str]) -> dict[str, str]:
    found = {name: headers.get(_HEADER_PREFIX + name.replace("_", "-")) for name in OPTION_NAMES}
    given = {name: value for name, value in found.items() if value is not None}
    if _is_to_explain(headers):
        given.setdefault("explain", "true")
    return given


def _is_to_explain(headers: Mapping[str, str]) -> bool:
    """Tell what came to /explanations, by the header that TorchServe adds: it need not say so once more."""
    return headers.get("explain", "").lower() == "true"


def _text(value: Any, name: str) -> str:
    """Read one field as text; a repeated field, or a list, is the same as its values with commas between them."""
    items = value if isinstance(value, list) else [value]
    items = [word for item in items for word in (item if isinstance(item, list) else [item])]
    return ",".join(_word(item, name) for item in items)


def _word(value: Any, name: str) -> str:
    if isinstance(value, (list, dict)):  # Of a part of type application/json.
        raise BadRequest(f"{name} must be text, or a list of it")
    try:
        return value.decode() if isinstance(value, (bytes, bytearray)) else str(value)
    except UnicodeDecodeError as err:
        raise BadRequest(f"{name} is not UTF-8 text") from err


def _check_keys(keys: Iterable[str], known: tuple[str, ...]) -> None:
    unknown = sorted(set(keys) - set(known))
    if unknown:
        raise BadRequest(f"unknown field {json.dumps(unknown[0][:40])}; there are {', '.join(known)}")


def check_count(count: int, max_images: int) -> None:
    """Refuse a request of no picture, or of too many.

    Raises:
        BadRequest: None.
        TooManyImages: More than `max_images`.
    """
    if count == 0:
        raise BadRequest("the request holds no picture; send one as the body, or in data")
    if count > max_images:
        raise TooManyImages(f"the request holds {count:,} pictures; at most {max_images} are accepted")
