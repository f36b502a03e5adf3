"""Builds a `PredictRequest` from a caller's options. Pure functions, used by both clients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from uuid import uuid4

from convscope._exceptions import ImageTooLarge
from convscope._options import Channels, MapDtype
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


def check_model(model: str, version: str | None) -> None:
    """Raise unless a model can have this name and version.

    Both become segments of a REST path, where `..`, `a/b` or `a?b` would address something else.

    Args:
        model: Name of the model.
        version: Version of the model; None for the server's default.

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
) -> PredictRequest:
    """Build a request without pictures.

    Args:
        layers: Public layer names, a single one, or `"all"`; none for scores only.
        top_k: Number of classes to return; 0 for all.
        map_dtype: Dtype of the maps on the wire.
        pool: Average each map down to pool x pool cells; 1 for one number per channel.
        channels: An int n for the n strongest channels, a sequence for the channels with these indexes.
        timing: Whether the reply should contain its timing.

    Returns:
        The request.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.
    """
    if not isinstance(map_dtype, str) or map_dtype not in _MAP_DTYPES:
        raise ValueError(f"map_dtype must be one of {', '.join(_MAP_DTYPES)}, not {map_dtype!r}")
    if not isinstance(timing, bool):
        raise TypeError(f"timing must be True or False, not {timing!r}")
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
    )


def request_with_pictures(template: PredictRequest, files: Sequence[bytes], request_id: str) -> PredictRequest:
    """Return a copy of a request, with pictures.

    Args:
        template: A request without pictures; it is not changed.
        files: Picture files.
        request_id: Id of the new request.

    Returns:
        The request.

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
    """Build the `explain` field of a request.

    Args:
        method: Name of the method; checked by the service.
        layer: Layer whose map is used; None for the service's choice.
        target: Index of the class to explain; None for the most probable one.
        window: occlusion: height and width of the covered square, in pixels.
        step: occlusion: distance from one square to the next, in pixels.
        steps: integrated_gradients: number of points between the baseline and the picture.
        picture: Whether the reply should contain the network's input.

    Returns:
        The `explain` field of a request.

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
    return PredictRequest(describe=True, request_id=request_id)


def build_filters_request(layer: str, request_id: str) -> PredictRequest:
    """Build the request for the filters of a layer.

    Args:
        layer: Public name of the layer.
        request_id: Id of the request.

    Returns:
        The request.

    Raises:
        TypeError: `layer` is not a str.
        ValueError: `layer` is empty.
    """
    if not isinstance(layer, str):
        raise TypeError(f"layer must be a str, not {layer!r}")
    if not layer:
        raise ValueError("layer must not be empty")
    return PredictRequest(filters=layer, request_id=request_id)


def validate_or_create_request_id(request_id: str | None) -> str:
    """Return the id of a request, which the gateway, the server's log and the reply contain.

    Args:
        request_id: The caller's own id; None to create one.

    Returns:
        The id.

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
