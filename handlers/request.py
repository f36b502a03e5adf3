"""Requests: from what TorchServe hands over to pictures and options, the same from every kind of body.

A row comes in one of five shapes: a protobuf `PredictRequest` (REST body or gRPC `input["request"]`), JSON, a form or
gRPC's plain keys, an encoded picture as the raw body, or nothing at all, which asks for the model card. Whatever the
shape, nothing in it is ignored: what is not known, or cannot be read, is rejected. It knows nothing of how a picture is
decoded or a reply encoded.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from handlers import json_text
from handlers.errors import BadRequest, TooManyImages
from handlers.explanations.asked import SWITCH
from handlers.media import GRPC_DEFAULT, REST_DEFAULT, choose
from handlers.options import OPTION_NAMES, Options
from handlers.trace import Trace
from handlers.wire import convscope_pb2 as wire

_PLAIN_KEYS = ("data", *OPTION_NAMES, "describe", "filters", "accept", "request_id")
_MESSAGE_KEYS = ("request", "accept")  # Of gRPC, where the options are in the message.
_HEADER_PREFIX = "x-convscope-"
_OPTION_HEADERS = {_HEADER_PREFIX + name.replace("_", "-"): name for name in OPTION_NAMES}
_METHOD = "x-convscope-method"
_GATEWAY_HEADERS = (_METHOD, "x-convscope-caller")
_OF_TORCHSERVE = ("explain", "url_path")  # It adds these to a request's headers, spelt so.
_PROTOBUF_TYPES = ("application/x-protobuf", "application/protobuf")
_FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)
_URL_SAFE = str.maketrans("-_", "+/", " \t\r\n\f\v")
_NO_BODY = (
    "the request has no body; send a picture, curl -T does, or for the model card GET /predictions/<model> without "
    "options and without Content-Type"
)

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

    It files each parameter's own content type among them, as a dict; and gRPC has none, metadata never gets here. Of a
    repeated header TorchServe keeps the last, unless it is spelt in two ways: these are joined, as RFC 9110 allows.
    Netty adds `content-length: 0`, spelt so, to a request without a body that said nothing of its length, as GET does:
    that one is left out.
    """
    headers: dict[str, str] = {}
    for spelt, value in properties.items():
        name = spelt.lower()
        if not isinstance(value, str) or (spelt, value) == ("content-length", "0"):
            continue
        if name in _OF_TORCHSERVE:
            if spelt == name:
                headers[name] = value
        else:
            headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


def open_row(row: Row, headers: Mapping[str, str]) -> Row:
    """Parse a JSON body that TorchServe left as it came, since it knows the media type in one spelling only."""
    body = row.get("body")
    if isinstance(body, (bytes, bytearray)) and body and _is_json(headers):
        with suppress(ValueError):  # `parse` says what is wrong with it.
            return {**row, "body": json_text.loads(body)}
    return row


def reply_type(row: Row, headers: Mapping[str, str], *, without: str = "") -> str:
    """Return the media type to answer in; a field goes before the header.

    Args:
        row: As `open_row` returned it.
        headers: HTTP headers, lower-case; empty on gRPC.
        without: A media type that cannot show this reply.

    Raises:
        BadRequest: None of the accepted ones is offered.
    """
    default, header = REST_DEFAULT if headers else GRPC_DEFAULT, headers.get("accept", "")
    body = row.get("body")
    field = (body if isinstance(body, dict) else row).get("accept")
    if field is None or field in ("", b""):
        return choose(header, default=default, without=without)
    with suppress(BadRequest):
        default = choose(header, default=default, without=without)
    return choose(_text(field, "accept"), default=default, without=without)


def parse(row: Row, headers: Mapping[str, str], trace: Trace, *, max_images: int) -> Request:
    """Read one row.

    Args:
        row: TorchServe's parameters of one request, as `open_row` returned them: values are bytearray, str, parsed
            JSON, or, for a repeated form field, a list of these.
        headers: HTTP headers, lower-case; empty on gRPC.
        trace: Told the request's id as soon as it is read, since a request that is refused has one too.
        max_images: Largest accepted number of pictures.

    Raises:
        BadRequest: The body or an option cannot be read.
        TooManyImages: More pictures than `max_images`.
    """
    media_type = reply_type(row, headers)
    if headers.get("url_path"):
        raise BadRequest("nothing may stand behind the model and its version in the path; options go elsewhere")
    given = _header_options(headers)
    if headers and _is_empty(row):
        if _asks_for_card(row, headers, given):
            return Request((), Options(), media_type, describe=True)
        raise BadRequest(_NO_BODY)
    content_type = _content_type(headers)
    if "request" in row and not headers:
        _check_keys(row, _MESSAGE_KEYS)
        return _from_protobuf(row["request"], given, trace, media_type, max_images)
    if "body" not in row or not headers:
        return _from_fields(row, content_type, given, trace, media_type, max_images)
    if len(row) > 1:
        raise BadRequest(
            "fields beside a body are not read; send the body alone with options in X-Convscope- headers, or a form "
            f"of {', '.join(_PLAIN_KEYS)}"
        )
    body = row["body"]
    if content_type.startswith("multipart/") or content_type in _FORM_TYPES:
        raise BadRequest(
            "the form has no part that can be read: its Content-Type must be multipart/form-data, in lower case, with "
            f"a boundary, and its parts are {', '.join(_PLAIN_KEYS)}"
        )
    if content_type in _PROTOBUF_TYPES:
        return _from_protobuf(body, given, trace, media_type, max_images)
    if _is_json(headers):
        return _from_json(body, given, trace, media_type, max_images)
    if isinstance(body, str):  # TorchServe decodes text/*; whatever it was, it is looked at as a picture.
        body = body.encode(errors="replace")
    return Request((body,), Options.from_text(given), media_type)


def _is_empty(row: Row) -> bool:
    """Tell whether a REST request brought nothing: no form, and no body or an empty one."""
    return not row or (set(row) == {"body"} and row["body"] in ("", b""))


def _asks_for_card(row: Row, headers: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Tell an empty GET, which asks for the model card, from a request whose body was forgotten.

    TorchServe hands the HTTP method on to nobody. The gateway says it in a header. Without it a request is taken for a
    GET unless it shows that a body was meant: by its type, by a length that it said itself, by options for a picture.
    """
    if headers.get("describe", "").lower() == "true" and "body" not in row:
        return True  # TorchServe's management API asks so.
    if given or "body" not in row:
        return False
    if _METHOD in headers:
        return headers[_METHOD] in ("GET", "HEAD")
    return not headers.get("content-type") and "content-length" not in headers


def _content_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_json(headers: Mapping[str, str]) -> bool:
    content_type = _content_type(headers)
    return content_type == "application/json" or content_type.endswith("+json")


def _from_protobuf(body: Any, given: Mapping[str, str], trace: Trace, media_type: str, max_images: int) -> Request:
    try:
        message = wire.PredictRequest.FromString(body)
    except (DecodeError, TypeError) as err:
        raise BadRequest("the body is not a convscope.v1.PredictRequest; see proto/convscope.proto") from err
    trace.identify(message.request_id)
    if message.describe or message.filters:
        return Request((), Options(), media_type, describe=message.describe, filters=message.filters)
    options = Options.from_values(Options.parse_text(given) | Options.read_message(message))
    check_count(len(message.pictures), max_images)
    return Request(tuple(message.pictures), options, media_type)


def _from_json(body: Any, given: Mapping[str, str], trace: Trace, media_type: str, max_images: int) -> Request:
    if isinstance(body, (bytes, bytearray)):
        try:
            body = json_text.loads(body)
        except ValueError as err:
            raise BadRequest(f"the body is not valid JSON: {err}") from err
    if not isinstance(body, dict):
        raise BadRequest('the body is not a JSON object; send {"data": "<base64 of a picture>", "layers": [...]}')
    trace.identify(body.get("request_id"))
    _check_keys(body, _PLAIN_KEYS)
    said = {name: value for name, value in body.items() if value is not None and value != ""}
    describe, filters = said.get("describe", False), said.get("filters", "")
    if not isinstance(describe, bool):
        raise BadRequest("describe must be true or false")
    if not isinstance(filters, str):
        raise BadRequest("filters must be the name of one layer")
    if describe or filters:
        return Request((), Options(), media_type, describe=describe, filters=filters)
    named = {name: said[name] for name in OPTION_NAMES if name in said}
    options = Options.from_values(Options.parse_text(given) | named)
    data = body.get("data", [])
    encoded = data if isinstance(data, list) else [data]
    check_count(len(encoded), max_images)
    return Request(tuple(_from_base64(item) for item in encoded), options, media_type)


def _from_base64(item: Any) -> bytes:
    """Decode base64 as programs write it: in lines or not, with padding or not, in either alphabet (RFC 4648)."""
    if not isinstance(item, str):
        raise BadRequest("each picture in data must be a base64 string of a picture file or a .npy array")
    text = item.rpartition("base64,")[2]  # A data: URL may come with its head.
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # binascii's too.
        text = text.translate(_URL_SAFE)
    digits = text.rstrip("=")
    if not _BASE64.fullmatch(text) or len(digits) % 4 == 1:
        raise BadRequest(
            "a picture in data is not base64 (RFC 4648): A-Z, a-z, 0-9, + and / or - and _, with or without line "
            "breaks and padding"
        )
    return binascii.a2b_base64(digits + "=" * (-len(digits) % 4))


def _from_fields(
    row: Row, content_type: str, given: Mapping[str, str], trace: Trace, media_type: str, max_images: int
) -> Request:
    if "data" not in row and content_type == "application/x-www-form-urlencoded":
        raise BadRequest(
            "the body came as a web form, curl's way with -d; send a picture with curl -T or curl -F data=@"
        )
    trace.identify(row.get("request_id"))
    _check_keys(row, _PLAIN_KEYS)
    describe = _text(row.get("describe", ""), "describe").strip().lower() or "false"
    if describe not in SWITCH:
        raise BadRequest("describe must be true or false; 1 or 0 will do")
    filters = _text(row.get("filters", ""), "filters").strip()
    if SWITCH[describe] or filters:
        return Request((), Options(), media_type, describe=SWITCH[describe], filters=filters)
    said = {name: _text(row[name], name) for name in OPTION_NAMES if name in row}
    options = Options.from_values(Options.parse_text(given) | Options.parse_text(said))
    data = row.get("data", [])
    parts = data if isinstance(data, list) else [data]
    check_count(len(parts), max_images)
    return Request(tuple(_picture_part(part) for part in parts), options, media_type)


def _picture_part(part: Any) -> Bytes:
    if isinstance(part, str):
        return part.encode(errors="replace")
    if not isinstance(part, (bytes, bytearray)):  # A part of type application/json was parsed on its way here.
        raise BadRequest("data must be a picture file, not JSON")
    return part


def _header_options(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the options that headers give; a request to /explanations need not say once more that it wants one."""
    given: dict[str, str] = {}
    for name, value in headers.items():
        if name in _OPTION_HEADERS:
            if value.strip():
                given[_OPTION_HEADERS[name]] = value
        elif name.startswith(_HEADER_PREFIX) and name not in _GATEWAY_HEADERS:
            raise BadRequest(f"unknown header {json.dumps(name[:40])}; there are {', '.join(_OPTION_HEADERS)}")
    if headers.get("explain", "").lower() == "true":
        given.setdefault("explain", "true")
    return given


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
