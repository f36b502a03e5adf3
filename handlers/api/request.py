"""Requests: from TorchServe's parameters and headers to pictures and options, the same from every kind of body.

A request comes in one of five shapes: a protobuf `PredictRequest` (REST body or gRPC `input["request"]`), JSON, a form
or gRPC's plain keys, a picture as the raw body, or an empty body, which asks for the model card. Whatever the shape,
nothing in it is ignored: an unknown name or an unreadable value is an error. Decoding pictures and encoding responses
are not done here.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from handlers.api import strict_json
from handlers.api.errors import BadRequest, TooManyImages
from handlers.api.job import Job
from handlers.api.media import GRPC_DEFAULT, REST_DEFAULT, choose
from handlers.api.options import DEFAULT, OPTION_NAMES, SWITCH, Options
from handlers.wire import convscope_pb2 as wire

_TRACE = ("traceparent", "tracestate")
_IDENTITY = ("request_id", *_TRACE)
_PLAIN_KEYS = ("data", *OPTION_NAMES, "describe", "filters", "accept", *_IDENTITY)
_MESSAGE_KEYS = ("request", "accept", *_TRACE)  # On gRPC, with the options in the message.
_HEADER_PREFIX = "x-convscope-"
_OPTION_HEADERS = {_HEADER_PREFIX + name.replace("_", "-"): name for name in OPTION_NAMES}
_METHOD = "x-convscope-method"
_OF_TORCHSERVE = ("explain", "url_path")  # TorchServe adds these to the headers, in lower case.
_GATEWAY_HEADERS = (_METHOD, "x-convscope-caller")
_PROTOBUF_TYPES = ("application/x-protobuf", "application/protobuf")
_FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}", re.ASCII)
_URL_SAFE = str.maketrans("-_", "+/", " \t\r\n\f\v")
_NO_BODY = (
    "the request has no body: send a picture (curl -T cat.png), or GET /predictions/<model> without options and "
    "without Content-Type for the model card"
)

# Lists are counted before they are parsed, since a parser makes an object of every item: 64 MiB of empty pictures took
# 1 GiB. More than this no request can use: a name for every layer and every channel, and the pictures.
_MOST_ITEMS = 2 * 2**16 + 2**12
_MOST_OPTION_BYTES = 2**21  # Per protobuf message, without its pictures.
_PICTURE_TAG = wire.PredictRequest.PICTURES_FIELD_NUMBER << 3 | 2

Bytes = bytes | bytearray


@dataclass(frozen=True)
class Request:
    """A caller's request, parsed.

    Attributes:
        files: Pictures as sent, still encoded, in order; empty if none are needed.
        options: The content of the response.
        is_describe: Whether to return the model card instead.
        filters: Layer whose kernels to return instead; empty for a prediction.
    """

    files: tuple[Bytes, ...] = ()
    options: Options = DEFAULT
    is_describe: bool = False
    filters: str = ""


def request_headers(properties: Mapping[str, Any]) -> dict[str, str]:
    """Return the HTTP headers of a request, with names in lower case; gRPC has none.

    TorchServe keeps them together with the content type of each parameter, which is a dict. Of a repeated header it
    keeps the last, unless the two are spelled differently: these are joined, as RFC 9110 allows. A caller's own header
    named as one that TorchServe adds is left out.
    """
    headers: dict[str, str] = {}
    for spelled, value in properties.items():
        name = spelled.lower()
        if isinstance(value, str) and (spelled == name or name not in _OF_TORCHSERVE):
            headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


def accepted_type(job: Job, *, without: str = "") -> str:
    """Return the media type of the response; a field of the request overrides the Accept header.

    Args:
        job: The job; a JSON body is already parsed.
        without: A media type that cannot show this response.

    Raises:
        BadRequest: No accepted type is offered.
    """
    default, header = REST_DEFAULT if job.headers else GRPC_DEFAULT, job.headers.get("accept", "")
    field = job.parameters.get("accept")
    if field is None or field in ("", b""):
        return choose(header, default=default, without=without)
    with suppress(BadRequest):
        default = choose(header, default=default, without=without)
    return choose(_text(field, "accept"), default=default, without=without)


def parse(job: Job, *, max_images: int) -> Request:
    """Read one request.

    Args:
        job: The request's parameters and headers. Its media type and request id are set as soon as they are known,
            since an error is sent with them too; a JSON body replaces its parameters.
        max_images: Largest accepted number of pictures.

    Raises:
        BadRequest: The body or an option cannot be read.
        TooManyImages: More pictures than `max_images`.
    """
    headers = job.headers
    is_rest, content_type = bool(headers), headers.get("content-type", "").partition(";")[0].strip().lower()
    is_empty = not job.parameters or (set(job.parameters) == {"body"} and not job.parameters["body"])
    is_json = content_type == "application/json" or content_type.endswith("+json")
    is_json = is_json and is_rest and not is_empty and "body" in job.parameters
    if is_json:
        with suppress(BadRequest):
            job.media_type = choose(headers.get("accept", ""), default=REST_DEFAULT)
        _check_alone(job)
        job.parameters = _json_object(job.parameters["body"])
        if not isinstance(job.parameters.get("accept"), str | None):
            raise BadRequest("accept must be text, such as image/png")
    job.media_type = accepted_type(job)
    if headers.get("url_path"):
        raise BadRequest(
            "the path must end after the model and its version; send options as headers, form fields or JSON"
        )
    given = _header_options(headers)
    if is_rest and is_empty:
        if _asks_for_card(headers, given):
            return Request(is_describe=True)
        raise BadRequest(_NO_BODY)
    if is_json:
        return _from_json(job, given, max_images)
    if "request" in job.parameters and not is_rest:
        strict_json.check_names(job.parameters, _MESSAGE_KEYS)
        return _from_protobuf(job, job.parameters["request"], given, max_images)
    if "body" not in job.parameters or not is_rest:
        return _from_fields(job, content_type, given, max_images)
    _check_alone(job)
    body = job.parameters["body"]
    if content_type.startswith("multipart/") or content_type in _FORM_TYPES:
        raise BadRequest(
            "the form has no part that can be read: its Content-Type must be multipart/form-data, in lower case, with "
            f"a boundary, and its parts are {', '.join(_PLAIN_KEYS)}"
        )
    if content_type in _PROTOBUF_TYPES:
        return _from_protobuf(job, body, given, max_images)
    return Request((body,), Options.from_values(Options.parse_text(given)))


def _asks_for_card(headers: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Tell an empty GET, which asks for the model card, from a request whose body was forgotten.

    TorchServe does not pass on the HTTP method, so the gateway does, in a header. Where that header is missing, a
    request without a body asks for the card unless it has a content type or options for a picture.
    """
    if headers.get("describe", "").lower() == "true":
        return True  # TorchServe's management API asks so.
    if given:
        return False
    if _METHOD in headers:
        return headers[_METHOD] in ("GET", "HEAD")
    return not headers.get("content-type")


def _check_alone(job: Job) -> None:
    if len(job.parameters) > 1:
        raise BadRequest(
            "fields beside a body are not read; send the body alone with options in X-Convscope- headers, or a form "
            f"of {', '.join(_PLAIN_KEYS)}"
        )


def _from_protobuf(job: Job, body: bytes, given: Mapping[str, str], max_images: int) -> Request:
    try:
        _check_message(body)
        message = wire.PredictRequest.FromString(body)
    except DecodeError as err:
        raise BadRequest("the body is not a convscope.v1.PredictRequest; see proto/convscope.proto") from err
    job.identify(message.request_id, message.traceparent, message.tracestate)
    if message.describe or message.filters:
        return Request(is_describe=message.describe, filters=message.filters)
    options = Options.from_values(Options.parse_text(given) | Options.read_message(message))
    check_count(len(message.pictures), max_images)
    return Request(tuple(message.pictures), options)


def _check_message(body: Bytes) -> None:
    """Check how much protobuf would make objects of, by the outermost fields of a message.

    Raises:
        BadRequest: The options alone are too large, or there is a group, which no version of the contract has.
        TooManyImages: There are more pictures than could be counted cheaply.
    """
    pictures = option_bytes = position = 0
    try:
        while position < len(body):
            began = position
            tag, position = _varint(body, position)
            if tag & 7 == 2:
                length, position = _varint(body, position)
                position += length
            elif tag & 7 == 0:
                _, position = _varint(body, position)
            elif tag & 7 in (1, 5):
                position += 8 if tag & 7 == 1 else 4
            else:
                raise BadRequest("the body is not a convscope.v1.PredictRequest; see proto/convscope.proto")
            if tag == _PICTURE_TAG:
                pictures += 1
            else:
                option_bytes += position - began
            if pictures > _MOST_ITEMS:
                raise TooManyImages(f"the request holds more than {_MOST_ITEMS:,} pictures")
            if option_bytes > _MOST_OPTION_BYTES:
                raise BadRequest(f"the options take more than {_MOST_OPTION_BYTES:,} bytes")
    except IndexError:  # Truncated; protobuf raises too.
        return


def _varint(body: Bytes, position: int) -> tuple[int, int]:
    """Return a protobuf varint and the position behind it."""
    value = shift = 0
    while True:
        byte = body[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128 or shift > 63:
            return value, position


def _json_object(body: Bytes) -> Mapping[str, Any]:
    if body.count(b",") > _MOST_ITEMS:
        raise BadRequest(f"the body lists more than {_MOST_ITEMS:,} items")
    try:
        values = strict_json.loads(body)
    except ValueError as err:
        raise BadRequest(f"the body is not valid JSON: {err}") from err
    if not isinstance(values, dict):
        raise BadRequest('the body is not a JSON object; send {"data": "<base64 of a picture>", "layers": [...]}')
    return values


def _from_json(job: Job, given: Mapping[str, str], max_images: int) -> Request:
    body = job.parameters
    job.identify(*map(body.get, _IDENTITY))
    strict_json.check_names(body, _PLAIN_KEYS)
    said = {name: value for name, value in body.items() if value is not None and value != ""}
    describe, filters = said.get("describe", False), said.get("filters", "")
    if not isinstance(describe, bool):
        raise BadRequest("describe must be true or false")
    if not isinstance(filters, str):
        raise BadRequest("filters must be the name of one layer")
    if describe or filters:
        return Request(is_describe=describe, filters=filters)
    named = {name: said[name] for name in OPTION_NAMES if name in said}
    options = Options.from_values(Options.parse_text(given) | named)
    data = body.get("data", [])
    encoded = data if isinstance(data, list) else [data]
    check_count(len(encoded), max_images)
    return Request(tuple(_from_base64(item) for item in encoded), options)


def _from_base64(item: Any) -> bytes:
    """Decode base64, in lines or not, with padding or not, in either alphabet (RFC 4648)."""
    if not isinstance(item, str):
        raise BadRequest("each picture in data must be a base64 string of a picture file or a .npy array")
    text = item.rpartition("base64,")[2]  # A data: URL may include its prefix.
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # Includes binascii.Error.
        text = text.translate(_URL_SAFE)
    digits = text.rstrip("=")
    if not _BASE64.fullmatch(text) or len(digits) % 4 == 1:
        raise BadRequest(
            "a picture in data is not base64 (RFC 4648): A-Z, a-z, 0-9, + and / or - and _, with or without line "
            "breaks and padding"
        )
    return binascii.a2b_base64(digits + "=" * (-len(digits) % 4))


def _from_fields(job: Job, content_type: str, given: Mapping[str, str], max_images: int) -> Request:
    fields = job.parameters
    if "data" not in fields and content_type == "application/x-www-form-urlencoded":
        raise BadRequest(
            "the body is application/x-www-form-urlencoded (curl -d); send the picture with curl -T FILE or "
            "curl -F data=@FILE"
        )
    job.identify(*map(fields.get, _IDENTITY))
    strict_json.check_names(fields, _PLAIN_KEYS)
    describe = _text(fields.get("describe", ""), "describe").strip().lower() or "false"
    if describe not in SWITCH:
        raise BadRequest("describe must be true or false (or 1 or 0)")
    filters = _text(fields.get("filters", ""), "filters").strip()
    if SWITCH[describe] or filters:
        return Request(is_describe=SWITCH[describe], filters=filters)
    said = {name: _text(fields[name], name) for name in OPTION_NAMES if name in fields}
    options = Options.from_values(Options.parse_text(given) | Options.parse_text(said))
    data = fields.get("data", [])
    parts = data if isinstance(data, list) else [data]
    check_count(len(parts), max_images)
    return Request(tuple(parts), options)


def _header_options(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the options in headers; a request to /explanations has `explain` set."""
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
    """Return a field as text; a repeated field, or a list, is joined with commas."""
    items = value if isinstance(value, list) else [value]
    return ",".join(_word(item, name) for item in items)


def _word(value: Any, name: str) -> str:
    if isinstance(value, (list, dict)):  # A part of type application/json.
        raise BadRequest(f"{name} must be text, or a list of it")
    try:
        return value.decode() if isinstance(value, (bytes, bytearray)) else str(value)
    except UnicodeDecodeError as err:
        raise BadRequest(f"{name} is not UTF-8 text") from err


def check_count(count: int, max_images: int) -> None:
    """Check the number of pictures in a request.

    Raises:
        BadRequest: There are no pictures.
        TooManyImages: There are more than `max_images`.
    """
    if count == 0:
        raise BadRequest("the request holds no picture; send one as the body, or in data")
    if count > max_images:
        raise TooManyImages(f"the request holds {count:,} pictures; at most {max_images} are accepted")
