"""Types of the clients' options. Imports neither numpy nor protobuf, so that the command line starts fast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypedDict

MAX_DEADLINE_S = 86_400  # One day. Socket and gRPC timeouts overflow after a few hundred days.

MapDtype: TypeAlias = Literal["float32", "float16", "uint8"]
Channels: TypeAlias = int | Sequence[int]
Method: TypeAlias = Literal["grad_cam", "cam", "occlusion", "input_gradient", "integrated_gradients", "picture"]


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
    request_id: str | None
