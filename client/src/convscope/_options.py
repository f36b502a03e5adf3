"""Types of the clients' options. Imports neither numpy nor protobuf, so that the command line starts fast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

MAX_DEADLINE_S = 86_400  # One day. Socket and gRPC timeouts overflow after a few hundred days.

MapDtype: TypeAlias = Literal["float32", "float16", "uint8"]
Channels: TypeAlias = int | Sequence[int]
Method: TypeAlias = Literal["grad_cam", "cam", "occlusion", "input_gradient", "integrated_gradients", "picture"]
Operation: TypeAlias = Literal["zero", "scale", "add", "mean", "clamp", "patch"]
EditedChannels: TypeAlias = Literal["all"] | Sequence[int] | Mapping[Literal["except"], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An operation on the map of a layer while the network runs: whatever is computed from that map sees the change.

    Attributes:
        layer: Name of the layer.
        operation: `"zero"`; `"scale"` and `"add"`, by `value`; `"mean"`, each channel replaced by its mean over the
            whole map; `"clamp"`, to `value`; `"patch"`, replaced by the map of another picture of the request.
        value: scale, add: a number; clamp: (minimum, maximum); patch: the index of the picture, whose map is that of
            its run without edits. None for the others.
        channels: Channel indexes, `"all"`, or `{"except": indexes}`.
        region: (top, left, bottom, right) in cells of the map, bottom and right exclusive; None for the whole map.
        box: Instead of `region`: the same in pixels of the picture that is sent, rotated according to EXIF. The cells
            are those with the middle of their receptive field in it.
        picture: Index of the only picture that is edited; None for every picture of the request.
    """

    layer: str
    operation: Operation
    value: float | tuple[float, float] | None = None
    channels: EditedChannels = "all"
    region: tuple[int, int, int, int] | None = None
    box: tuple[float, float, float, float] | None = None
    picture: int | None = None


class ServedModel(NamedTuple):
    """A model of the server.

    Attributes:
        name: Name of the model.
        version: Version of the model.
    """

    name: str
    version: str


class PredictManyOptions(TypedDict, total=False):
    """Options of `predict_many` for each of its requests; see `Client.predict`."""

    version: str | None
    layers: str | Iterable[str]
    top_k: int
    map_dtype: MapDtype
    pool: int | None
    channels: Channels | None
    deadline_s: float | None
    timing: bool
    traceparent: str | None
    tracestate: str | None
    edits: Iterable[Edit | Mapping[str, Any]]
    compare: bool


class PredictOptions(PredictManyOptions, total=False):
    """Options of `predict`."""

    request_id: str | None


class ExplainOptions(TypedDict, total=False):
    """Options of `explain`; see `Client.explain`."""

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
    traceparent: str | None
    tracestate: str | None
    request_id: str | None
