"""Building a PredictRequest out of a caller's options: a pure function, for every kind of client."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias, TypedDict

from convscope._exceptions import ImageTooLarge
from convscope._transport import MAX_MESSAGE_BYTES
from convscope._wire.convscope_pb2 import FLOAT16, FLOAT32, UINT8, ChannelSelection, Dtype, Explain, PredictRequest

MapDtype: TypeAlias = Literal["float32", "float16", "uint8"]
Channels: TypeAlias = int | Sequence[int]
Method: TypeAlias = Literal["grad_cam", "cam", "occlusion", "input_gradient", "integrated_gradients", "picture"]

_MAP_DTYPES: dict[str, Dtype] = {"float32": FLOAT32, "float16": FLOAT16, "uint8": UINT8}
_UINT32_MAX = 2**32 - 1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")  # What TorchServe's archiver and this service's launcher take.
# Ids have to differ, not to be secret. uuid4 asks the operating system, at which a thread lets go of the interpreter.
_IDS = random.Random()  # noqa: S311
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_IDS.seed)


class Options(TypedDict, total=False):
    """What a question asks for, as in `predict`; of a stream, each of its questions."""

    version: str | None
    layers: str | Iterable[str]
    top_k: int
    map_dtype: MapDtype
    pool: int | None
    channels: Channels | None
    deadline_s: float | None
    timing: bool


class OwnOptions(Options, total=False):
    """And what only a single question can have."""

    request_id: str | None


class ExplainOptions(TypedDict, total=False):
    """What a question for an explanation asks for, as in `explain`."""

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


def check_files(files: Sequence[bytes]) -> None:
    """Refuse more than this client sends at once.

    Args:
        files: Picture files of one question.

    Raises:
        ImageTooLarge: Together they are over its limit.
    """
    if sum(map(len, files)) > MAX_MESSAGE_BYTES - 65536:  # What is left is for the options and the framing.
        raise ImageTooLarge(f"the pictures together are over this client's limit of {MAX_MESSAGE_BYTES} bytes")


def build_request(files: Sequence[bytes], *, request_id: str = "", **options: Any) -> PredictRequest:
    """Build the request for some pictures; see `check_files` and, for what may be asked, `build_options`."""
    check_files(files)
    return fill_request(build_options(**options), files, request_id)


def fill_request(asked: bytes, files: Sequence[bytes], request_id: str) -> PredictRequest:
    """Build the request for some pictures.

    Args:
        asked: What to ask about them, as `build_options` returns it.
        files: Picture files.
        request_id: The request's id.

    Returns:
        The request.
    """
    request = PredictRequest.FromString(asked)
    request.pictures.extend(files)
    request.request_id = request_id
    return request


def build_options(
    *,
    layers: str | Iterable[str] = (),
    top_k: int = 5,
    map_dtype: MapDtype = "float32",
    pool: int | None = None,
    channels: Channels | None = None,
    timing: bool = False,
) -> bytes:
    """Build what is asked about pictures; what was asked of late is remembered.

    Args:
        layers: Public layer names, a single one, or `"all"`; none for scores only.
        top_k: Classes to return; 0 for all.
        map_dtype: What the maps travel as.
        pool: Average each map down to pool x pool cells; 1 for one number a channel.
        channels: An int n for the n strongest channels, a sequence for those channels.
        timing: Whether the reply is to say where its time went.

    Returns:
        A `PredictRequest` without pictures, serialized: equal where the same is asked.

    Raises:
        TypeError: An option is of another type.
        ValueError: An option is out of range.
    """
    named: Any = tuple(layers) if isinstance(layers, list) else layers
    # Of other things one may be equal to another and not mean the same, or mean another thing the next time.
    if type(named) in (str, tuple) and type(channels) in (int, type(None)):
        try:
            return _remembered(named, top_k, map_dtype, pool, channels, timing)
        except TypeError:
            pass  # What cannot be remembered is built, or refused.
    return _build(layers, top_k, map_dtype, pool, channels, timing)


def _build(layers: Any, top_k: Any, map_dtype: Any, pool: Any, channels: Any, timing: Any) -> bytes:
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
    ).SerializeToString(deterministic=True)


_remembered = lru_cache(maxsize=256, typed=True)(_build)


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
        method: How to find out; the service knows which there are.
        layer: Whose map to look at; None for the service's choice.
        target: Index of the class to explain; None for the most probable one.
        window: occlusion: pixels of the square that is covered, each way.
        step: occlusion: pixels from one square to the next.
        steps: integrated_gradients: points between the baseline and the picture.
        picture: Whether the picture is to come along.

    Returns:
        That part.

    Raises:
        TypeError: An option is of another type.
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
    """Build the request for a model's card.

    Args:
        request_id: The request's id.

    Returns:
        The request.
    """
    return PredictRequest(describe=True, request_id=request_id)


def build_filters_request(layer: str, request_id: str) -> PredictRequest:
    """Build the request for the filters of a layer.

    Args:
        layer: Its public name.
        request_id: The request's id.

    Returns:
        The request.

    Raises:
        TypeError: The name is no text.
        ValueError: It is empty.
    """
    if not isinstance(layer, str):
        raise TypeError(f"layer must be the name of one layer, not {layer!r}")
    if not layer:
        raise ValueError("layer must not be empty")
    return PredictRequest(filters=layer, request_id=request_id)


def choose_request_id(request_id: str | None) -> str:
    """Choose the id by which a request is known to the gateway, to the service's log and in the reply.

    Args:
        request_id: The caller's own; None to make one.

    Returns:
        The id.

    Raises:
        TypeError: It is no text.
        ValueError: It is not 1 to 64 letters, digits, `.`, `_` and `-`.
    """
    if request_id is None:
        return f"{_IDS.getrandbits(128):032x}"
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be text, not {request_id!r}")
    if not is_request_id(request_id):
        raise ValueError(f"request_id must be 1 to 64 of A-Z a-z 0-9 . _ -, not {request_id!r}")
    return request_id


def is_request_id(text: str) -> bool:
    """Say whether a text can be a request's id."""
    return _REQUEST_ID.fullmatch(text) is not None


def _selection(channels: Channels) -> ChannelSelection:
    """Turn the `channels` option into the contract's words."""
    if isinstance(channels, Iterable):
        indexes = [_number("channels", index, least=0) for index in channels]
        if not indexes:
            raise ValueError("channels must name at least one channel; None means all")
        return ChannelSelection(indexes=indexes)
    return ChannelSelection(strongest=_number("channels", channels, least=1))


def _number(name: str, value: int, *, least: int) -> int:
    """Return an option's value, once it is a whole number in range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    number = value.__index__()
    if not least <= number <= _UINT32_MAX:
        raise ValueError(f"{name} must be at least {least}, not {number}" if number < least else f"{name} is too large")
    return number
