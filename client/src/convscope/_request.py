"""Builds a `PredictRequest` from a caller's options. Pure functions, used by both clients."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any, TypeVar
from uuid import uuid4

from convscope._exceptions import ImageTooLarge
from convscope._options import Channels, Edit, MapDtype
from convscope._wire import convscope_pb2 as wire
from convscope._wire.convscope_pb2 import FLOAT16, FLOAT32, UINT8, ChannelSelection, Dtype, Explain, PredictRequest

MAX_MESSAGE_BYTES = 512 * 1024 * 1024  # Per request or reply; gRPC's default of 4 MB is less than one large map.
API_KEY_HEADER = "x-api-key"
REQUEST_ID_HEADER = "x-request-id"
USER_AGENT = "convscope-python"
NO_MODEL = "-"  # No model has this name, so the server answers which ones there are.

_MAP_DTYPES: dict[str, Dtype] = {"float32": FLOAT32, "float16": FLOAT16, "uint8": UINT8}
_UINT32_MAX = 2**32 - 1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")  # As accepted by TorchServe's archiver and our launcher.
# W3C Trace Context, section 3.2: ids are not zero, the version is not ff, and later versions may append fields.
_IDS = r"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(rf"00{_IDS}|(?!ff|00)[0-9a-f]{{2}}{_IDS}(-[ -~]*)?")
_TRACESTATE = re.compile(r"[ -~]{0,512}")

Number = TypeVar("Number", int, float)


def check_model(model: str, version: str | None) -> None:
    """Raise unless a model can have this name and version, which is None for the server's default.

    Both become segments of a REST path, where `..`, `a/b` or `a?b` would address something else.

    Raises:
        TypeError: One of them is not a str.
        ValueError: One of them is not 1 to 255 letters, digits, `.`, `_` and `-`, or begins with `.`, `_` or `-`.
    """
    for argument, name in (("model", model), ("version", version)):
        if argument == "version" and name is None:
            continue
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a str, not {name!r}")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{argument} must be 1 to 255 of A-Z a-z 0-9 . _ - and begin with a letter or a digit,"
                f" not {name[:80]!r}"
            )


def build_options(
    *,
    layers: str | Iterable[str] = (),
    top_k: int = 5,
    map_dtype: MapDtype = "float32",
    pool: int | None = None,
    channels: Channels | None = None,
    timing: bool = False,
    edits: Iterable[Edit | Mapping[str, Any]] = (),
    compare: bool = False,
) -> PredictRequest:
    """Build a request without pictures from the options of `Client.predict`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.
    """
    if not isinstance(map_dtype, str) or map_dtype not in _MAP_DTYPES:
        raise ValueError(f"map_dtype must be one of {', '.join(_MAP_DTYPES)}, not {map_dtype!r}")
    for name, switch in (("timing", timing), ("compare", compare)):
        if not isinstance(switch, bool):
            raise TypeError(f"{name} must be True or False, not {switch!r}")
    messages = _edits(edits)
    if compare and not messages:
        raise ValueError("compare returns what edits change; pass at least one in edits")
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"layers must be names, one name, or 'all', not {layers!r}")
    return PredictRequest(
        layers=names,
        top_k=_checked_int("top_k", top_k, minimum=0),
        map_dtype=_MAP_DTYPES[map_dtype],
        pool=None if pool is None else _checked_int("pool", pool, minimum=1),
        channels=None if channels is None else _channel_selection(channels),
        timing=timing,
        edits=messages,
        compare=compare,
    )


def request_with_pictures(template: PredictRequest, files: Sequence[bytes], request_id: str) -> PredictRequest:
    """Return a copy of a request, with picture files and an id of its own.

    Raises:
        ImageTooLarge: The files together are over this client's limit.
    """
    if sum(map(len, files)) > MAX_MESSAGE_BYTES - 65536:  # The remainder is for the options and the framing.
        raise ImageTooLarge(f"the pictures together are over this client's limit of {MAX_MESSAGE_BYTES} bytes")
    request = PredictRequest()
    request.CopyFrom(template)
    request.pictures.extend(files)
    request.request_id = request_id
    return request


def build_explain_options(
    *,
    method: str = "grad_cam",
    layer: str | None = None,
    target: int | None = None,
    window: int | None = None,
    step: int | None = None,
    steps: int | None = None,
    picture: bool = True,
) -> Explain:
    """Build the `explain` field of a request from the options of `Client.explain`; the service checks the method.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, not {method!r}")
    if not isinstance(layer, str | None):
        raise TypeError(f"layer must be a str or None, not {layer!r}")
    explain_options = Explain(method=method, layer=layer or "", picture=picture)
    if target is not None:
        explain_options.target = _checked_int("target", target, minimum=0)
    for name, value in (("window", window), ("step", step), ("steps", steps)):
        if value is not None:
            setattr(explain_options, name, _checked_int(name, value, minimum=1))
    return explain_options


def build_card_request(request_id: str) -> PredictRequest:
    """Build the request for a model card."""
    return set_trace_context(PredictRequest(describe=True, request_id=request_id))


def build_filters_request(layer: str, request_id: str) -> PredictRequest:
    """Build the request for the filters of a layer.

    Raises:
        TypeError: `layer` is not a str.
        ValueError: `layer` is empty.
    """
    if not isinstance(layer, str):
        raise TypeError(f"layer must be a str, not {layer!r}")
    if not layer:
        raise ValueError("layer must not be empty")
    return set_trace_context(PredictRequest(filters=layer, request_id=request_id))


def set_trace_context(
    request: PredictRequest, traceparent: str | None = None, tracestate: str | None = None
) -> PredictRequest:
    """Set the W3C Trace Context of a request.

    Args:
        request: The request.
        traceparent: The caller's own; a malformed one is ignored. None for that of the current span, if the caller uses
            OpenTelemetry.
        tracestate: The tracestate that belongs to `traceparent`.

    Returns:
        The same request.

    Raises:
        TypeError: One of them is not a str.
    """
    for name, value in (("traceparent", traceparent), ("tracestate", tracestate)):
        if not isinstance(value, str | None):
            raise TypeError(f"{name} must be a str or None, not {value!r}")
    opentelemetry: Any = sys.modules.get("opentelemetry.trace")
    if traceparent is None and hasattr(opentelemetry, "get_current_span"):  # Not while it is being imported.
        span = opentelemetry.get_current_span().get_span_context()
        if span.is_valid:
            ids = f"{opentelemetry.format_trace_id(span.trace_id)}-{opentelemetry.format_span_id(span.span_id)}"
            traceparent, tracestate = f"00-{ids}-{span.trace_flags:02x}", span.trace_state.to_header()
    if traceparent is not None and _TRACEPARENT.fullmatch(traceparent):
        request.traceparent = traceparent
        if tracestate and _TRACESTATE.fullmatch(tracestate):
            request.tracestate = tracestate
    return request


def trace_headers(request: PredictRequest) -> dict[str, str]:
    """Return the headers, or metadata, of the trace context of a request; none if it has none."""
    values = {"traceparent": request.traceparent, "tracestate": request.tracestate}
    return {name: value for name, value in values.items() if value}


def validate_or_create_request_id(request_id: str | None) -> str:
    """Return the id of a request, which the gateway, the server's log and the reply contain; None creates one.

    Raises:
        TypeError: The id is not a str.
        ValueError: The id is not 1 to 64 letters, digits, `.`, `_` and `-`.
    """
    if request_id is None:
        return uuid4().hex
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a str, not {request_id!r}")
    if not is_request_id(request_id):
        raise ValueError(f"request_id must be 1 to 64 of A-Z a-z 0-9 . _ -, not {request_id!r}")
    return request_id


def is_request_id(text: str) -> bool:
    """Return whether a text is a valid request id."""
    return _REQUEST_ID.fullmatch(text) is not None


def _channel_selection(channels: Channels) -> ChannelSelection:
    """Convert the option `channels` to its message."""
    if isinstance(channels, Iterable):
        indexes = [_checked_int("channels", index, minimum=0) for index in channels]
        if not indexes:
            raise ValueError("channels must name at least one channel; None means all")
        return ChannelSelection(indexes=indexes)
    return ChannelSelection(strongest=_checked_int("channels", channels, minimum=1))


def _edits(edits: Iterable[Edit | Mapping[str, Any]]) -> list[wire.Edit]:
    """Convert the option `edits` to messages; the service checks layers, operations and cells."""
    if isinstance(edits, str | Mapping | Edit) or not isinstance(edits, Iterable):
        raise TypeError(f"edits must be a list of Edit or dict, not {edits!r}")
    known = [field.name for field in fields(Edit)]
    messages = []
    for number, edit in enumerate(edits):
        if isinstance(edit, Mapping):
            unknown = sorted(map(str, edit.keys() - set(known)))
            if unknown or "layer" not in edit or "operation" not in edit:
                what = f"unknown field {unknown[0]!r}" if unknown else "layer and operation are required"
                raise TypeError(f"edits[{number}]: {what}; fields: {', '.join(known)}")
            edit = Edit(**edit)
        elif not isinstance(edit, Edit):
            raise TypeError(f"edits[{number}] must be an Edit or a dict, not {edit!r}")
        messages.append(_edit(edit, f"edits[{number}]"))
    return messages


def _edit(edit: Edit, name: str) -> wire.Edit:
    for field in ("layer", "operation"):
        if not isinstance(getattr(edit, field), str):
            raise TypeError(f"{name}.{field} must be a str, not {getattr(edit, field)!r}")
    message = wire.Edit(layer=edit.layer, operation=edit.operation)
    if isinstance(edit.value, Real) or edit.value is None:
        message.value.extend(() if edit.value is None else [_checked_number(f"{name}.value", edit.value)])
    else:
        message.value.extend(_numbers(f"{name}.value", edit.value, _checked_number))
    channels, chosen = edit.channels, message.channels
    if isinstance(channels, Mapping):
        if set(channels) != {"except"}:
            raise ValueError(f"{name}.channels must be indexes, 'all' or {{'except': indexes}}, not {channels!r}")
        channels, chosen = channels["except"], message.excluded
    if channels is not None and not (isinstance(channels, str) and channels == "all"):
        indexes = _numbers(f"{name}.channels", channels, lambda what, index: _checked_int(what, index, minimum=0))
        if not indexes:
            raise ValueError(f"{name}.channels must name at least one channel; 'all' means all")
        chosen.extend(indexes)
    if edit.region is not None:
        edges = _numbers(f"{name}.region", edit.region, lambda what, edge: _checked_int(what, edge, minimum=0))
        message.region.extend(_four(f"{name}.region", edges))
    if edit.box is not None:
        message.box.extend(_four(f"{name}.box", _numbers(f"{name}.box", edit.box, _checked_number)))
    if edit.picture is not None:
        message.picture = _checked_int(f"{name}.picture", edit.picture, minimum=0)
    return message


def _four(name: str, edges: list[Number]) -> list[Number]:
    if len(edges) != 4:
        raise ValueError(f"{name} must be top, left, bottom and right, not {len(edges)} numbers")
    return edges


def _numbers(name: str, values: Any, check: Callable[[str, Any], Number]) -> list[Number]:
    """Return the numbers of a sequence, each checked."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, not {values!r}")
    return [check(name, value) for value in values]


def _checked_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return number


def _checked_int(name: str, value: int, *, minimum: int) -> int:
    """Return the value of an option as an int; raise unless it is one and in range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {value!r}")
    checked = value.__index__()
    if checked < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {checked}")
    if checked > _UINT32_MAX:
        raise ValueError(f"{name} must be at most {_UINT32_MAX}, not {checked}")
    return checked
