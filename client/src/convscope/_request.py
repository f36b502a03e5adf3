"""Builds a PredictRequest from a caller's options: pure functions, shared by both clients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, TypedDict
from uuid import uuid4

from convscope._exceptions import ImageTooLarge
from convscope._protocol import MAX_MESSAGE_BYTES
from convscope._wire.convscope_pb2 import FLOAT16, FLOAT32, UINT8, ChannelSelection, Dtype, Explain, PredictRequest

MapDtype: TypeAlias = Literal["float32", "float16", "uint8"]
Channels: TypeAlias = int | Sequence[int]
Method: TypeAlias = Literal["grad_cam", "cam", "occlusion", "input_gradient", "integrated_gradients", "picture"]

_MAP_DTYPES: dict[str, Dtype] = {"float32": FLOAT32, "float16": FLOAT16, "uint8": UINT8}
_UINT32_MAX = 2**32 - 1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")  # What TorchServe's archiver and this service's launcher take.


class PredictOptions(TypedDict, total=False):
    """Options of `predict`."""

    version: str | None
    layers: str | Iterable[str]
    top_k: int
    map_dtype: MapDtype
    pool: int | None
    channels: Channels | None
    deadline_s: float | None
    timing: bool
    request_id: str | None


class ExplainOptions(TypedDict, total=False):
    """Options of `explain`."""

    version: str | None
    method: Method
    layer: str | None
    target: int | None
    window: int | None
    step: int | None
    steps: int | None
    picture: bool
    top_k: int
    map_dtype: MapDtype
    deadline_s: float | None
    timing: bool
    request_id: str | None


def check_model(model: str, version: str | None) -> None:
    """Raise unless a model can have this name and version.

    Both become segments of a REST path, where `..`, `a/b` or `a?b` would address something else.

    Args:
        model: The model's name.
        version: Its version; None for the server's default.

    Raises:
        TypeError: One is not text.
        ValueError: One is not 1 to 255 letters, digits, `.`, `_` and `-` that begin with a letter or a digit.
    """
    if not isinstance(model, str) or (version is not None and not isinstance(version, str)):
        raise TypeError(f"model and version are text, as in '1.0', not {model!r} and {version!r}")
    for what, name in (("model", model), ("version", version)):
        if name is not None and not _NAME.fullmatch(name):
            raise ValueError(
                f"{what} must be 1 to 255 of A-Z a-z 0-9 . _ - and begin with a letter or a digit, not {name[:80]!r}"
            )


def build_request(files: Sequence[bytes], *, request_id: str = "", **options: Any) -> PredictRequest:
    """Build the request for some pictures; see `build_options` and `add_pictures`."""
    return add_pictures(build_options(**options), files, request_id)


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
        top_k: Classes to return; 0 for all.
        map_dtype: The dtype in which maps travel.
        pool: Average each map down to pool x pool cells; 1 for one number per channel.
        channels: An int n for the n strongest channels, a sequence for those channels.
        timing: Whether the reply should say where its time went.

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
        top_k=_number("top_k", top_k, least=0),
        map_dtype=_MAP_DTYPES[map_dtype],
        pool=None if pool is None else _number("pool", pool, least=1),
        channels=None if channels is None else _selection(channels),
        timing=timing,
    )


def add_pictures(options: PredictRequest, files: Sequence[bytes], request_id: str) -> PredictRequest:
    """Build the request for some pictures.

    Args:
        options: A request without pictures; it is not changed.
        files: Picture files.
        request_id: The id of the new request.

    Returns:
        The request.

    Raises:
        ImageTooLarge: The files together are over this client's limit.
    """
    if sum(map(len, files)) > MAX_MESSAGE_BYTES - 65536:  # The rest is for the options and the framing.
        raise ImageTooLarge(f"the pictures together are over this client's limit of {MAX_MESSAGE_BYTES} bytes")
    request = PredictRequest()
    request.CopyFrom(options)
    request.pictures.extend(files)
    request.request_id = request_id
    return request


def build_explain(
    *,
    method: str = "grad_cam",
    layer: str | None = None,
    target: int | None = None,
    window: int | None = None,
    step: int | None = None,
    steps: int | None = None,
    picture: bool = True,
) -> Explain:
    """Build the part of a request that asks for an explanation.

    Args:
        method: Name of the method; the service knows which there are.
        layer: Layer whose map is used; None for the service's choice.
        target: Index of the class to explain; None for the most probable one.
        window: occlusion: height and width of the covered square, in pixels.
        step: occlusion: pixels from one square to the next.
        steps: integrated_gradients: points between the baseline and the picture.
        picture: Whether the reply should hold the picture.

    Returns:
        That part.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of range.
    """
    if not isinstance(method, str) or not isinstance(layer, str | None):
        raise TypeError(f"method, and layer where there is one, must be a name, not {method!r} and {layer!r}")
    explain = Explain(method=method, layer=layer or "", picture=picture)
    if target is not None:
        explain.target = _number("target", target, least=0)
    for name, number in (("window", window), ("step", step), ("steps", steps)):
        if number is not None:
            setattr(explain, name, _number(name, number, least=1))
    return explain


def build_card_request(request_id: str) -> PredictRequest:
    """Build the request for a model's card."""
    return PredictRequest(describe=True, request_id=request_id)


def build_filters_request(layer: str, request_id: str) -> PredictRequest:
    """Build the request for the filters of a layer.

    Args:
        layer: Its public name.
        request_id: The request's id.

    Returns:
        The request.

    Raises:
        TypeError: `layer` is no text.
        ValueError: `layer` is empty.
    """
    if not isinstance(layer, str):
        raise TypeError(f"layer must be the name of one layer, not {layer!r}")
    if not layer:
        raise ValueError("layer must not be empty")
    return PredictRequest(filters=layer, request_id=request_id)


def choose_request_id(request_id: str | None) -> str:
    """Return the id by which the gateway, the service's log and the reply know a request.

    Args:
        request_id: The caller's own id; None to make one.

    Returns:
        The id.

    Raises:
        TypeError: The id is no text.
        ValueError: The id is not 1 to 64 letters, digits, `.`, `_` and `-`.
    """
    if request_id is None:
        return uuid4().hex
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be text, not {request_id!r}")
    if not is_request_id(request_id):
        raise ValueError(f"request_id must be 1 to 64 of A-Z a-z 0-9 . _ -, not {request_id!r}")
    return request_id


def is_request_id(text: str) -> bool:
    """Return whether a text can be a request's id."""
    return _REQUEST_ID.fullmatch(text) is not None


def _selection(channels: Channels) -> ChannelSelection:
    """Turn the `channels` option into its message."""
    if isinstance(channels, Iterable):
        indexes = [_number("channels", index, least=0) for index in channels]
        if not indexes:
            raise ValueError("channels must name at least one channel; None means all")
        return ChannelSelection(indexes=indexes)
    return ChannelSelection(strongest=_number("channels", channels, least=1))


def _number(name: str, value: int, *, least: int) -> int:
    """Return an option's value; raise unless it is a whole number in range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    number = value.__index__()
    if not least <= number <= _UINT32_MAX:
        raise ValueError(f"{name} must be at least {least}, not {number}" if number < least else f"{name} is too large")
    return number
