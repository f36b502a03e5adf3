"""A transport without a network, with which applications test themselves.

from convscope import Client
from convscope.testing import FakeTransport, prediction

transport = FakeTransport(prediction({"cat": 0.9, "dog": 0.1}))
with Client("http://fake", transport=transport) as client:
    assert client.predict(b"any bytes", model="cifar").top[0].label == "cat"
assert transport.requests[0].model == "cifar"
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from convscope._card import ModelCard
from convscope._exceptions import ConvscopeError
from convscope._explanation import Explanation
from convscope._prediction import ClassScore, Prediction
from convscope._wire import convscope_pb2 as wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FakeTransport", "Request", "Response", "prediction"]

Response: TypeAlias = (
    "Prediction | Explanation | Sequence[Prediction | Explanation] | ModelCard | NDArray[Any] | ConvscopeError"
)


@dataclass(frozen=True)
class Request:
    """What the client sent.

    Attributes:
        kind: The method that sent it: `predict` (`predict_many` too), `explain`, `card` (`ready` too) or `filters`.
        model: The model's name.
        version: Its version; None for the server's default.
        pictures: Picture files.
        layers: Layers whose maps are asked for; that of `filters` as well.
        top_k: Classes asked for; 0 for all.
        map_dtype: The dtype in which maps would be sent.
        pool: Cells of each map in both directions; None for whole maps.
        channels: Channel numbers, or how many of the strongest; None for all.
        method: The method of an explanation; empty for another kind.
        target: The class to explain; None for the most probable one.
        timing: Whether the timing is asked for.
        request_id: The id of the request.
        deadline_s: Seconds that are left for it.
    """

    kind: Literal["predict", "explain", "card", "filters"]
    model: str
    version: str | None
    pictures: tuple[bytes, ...]
    layers: tuple[str, ...]
    top_k: int
    map_dtype: str
    pool: int | None
    channels: tuple[int, ...] | int | None
    method: str
    target: int | None
    timing: bool
    request_id: str
    deadline_s: float


class FakeTransport:
    """Takes the place of the connection to a service, for `Client(transport=...)` and `AsyncClient(transport=...)`.

    What it is given goes through the contract's messages, so that the client reads it as it reads a service's reply.
    Errors are retried as a service's are: pass `retries=0` to the client to see them at once.

    Args:
        respond: The response to every request, or a function that returns it or raises it: a `Prediction` (or
            `Explanation`) for each picture, one for all pictures, a `ModelCard`, the kernels of `filters` as an array,
            or a `ConvscopeError`.

    Attributes:
        requests: The requests so far.
        closed: Whether the client has been closed.
    """

    def __init__(self, respond: Response | Callable[[Request], Response]) -> None:
        self._respond = respond
        self.requests: list[Request] = []
        self.closed = False

    def send(
        self, request: wire.PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> wire.PredictReply:
        """Return the response to a request of `Client`."""
        asked = _read_request(request, model, version, deadline_s)
        self.requests.append(asked)
        response = self._respond(asked) if callable(self._respond) else self._respond
        if isinstance(response, ConvscopeError):
            raise copy.copy(response)  # The client adds the id of the request.
        return _write_reply(asked, response)

    def close(self) -> None:
        """Note that the client was closed."""
        self.closed = True

    async def asend(
        self, request: wire.PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> wire.PredictReply:
        """Return the response to a request of `AsyncClient`."""
        return self.send(request, model=model, version=version, deadline_s=deadline_s)

    async def aclose(self) -> None:
        """Note that the client was closed."""
        self.close()


def prediction(
    scores: Mapping[str, float] | None = None,
    *,
    maps: Mapping[str, NDArray[Any]] | None = None,
    error: ConvscopeError | None = None,
) -> Prediction:
    """Make a prediction.

    Args:
        scores: Probabilities by label, the most probable first; the classes' indexes are their places.
        maps: Maps by layer, (C, h, w) or (C,).
        error: The picture's own error, which takes the place of a result.

    Returns:
        The prediction.
    """
    top = [
        ClassScore(index, label, probability, math.log(max(probability, 1e-9)))
        for index, (label, probability) in enumerate((scores or {}).items())
    ]
    cells = {layer: np.asarray(found, np.float32) for layer, found in (maps or {}).items()}
    return Prediction(model="fake", version="1.0", engine="fake", device="cpu", top=top, maps=cells, error=error)


def _read_request(request: wire.PredictRequest, model: str, version: str | None, deadline_s: float) -> Request:
    kind: Literal["predict", "explain", "card", "filters"] = "predict"
    if request.describe:
        kind = "card"
    elif request.filters:
        kind = "filters"
    elif request.HasField("explain"):
        kind = "explain"
    channels: tuple[int, ...] | int | None = None
    if request.HasField("channels"):
        channels = tuple(request.channels.indexes) or request.channels.strongest
    return Request(
        kind=kind,
        model=model,
        version=version,
        pictures=tuple(request.pictures),
        layers=(request.filters,) if kind == "filters" else tuple(request.layers),
        top_k=request.top_k,
        map_dtype=wire.Dtype.Name(request.map_dtype).lower(),
        pool=request.pool if request.HasField("pool") else None,
        channels=channels,
        method=request.explain.method,
        target=request.explain.target if request.explain.HasField("target") else None,
        timing=request.timing,
        request_id=request.request_id,
        deadline_s=deadline_s,
    )


def _write_reply(request: Request, response: Any) -> wire.PredictReply:
    """Write a response into a reply of the contract."""
    reply = wire.PredictReply(model=request.model, version=request.version or "1.0", request_id=request.request_id)
    if isinstance(response, ModelCard):
        reply.card.CopyFrom(wire.ModelCard(**_fields(dataclasses.asdict(response))))
        return reply
    if isinstance(response, np.ndarray):
        reply.filters.CopyFrom(_tensor(response))
        return reply
    if isinstance(response, Prediction | Explanation):
        response = [response] * len(request.pictures)
    for one in response:
        found = one.prediction if isinstance(one, Explanation) else one
        reply.engine, reply.device = found.engine, found.device
        reply.results.append(_result(one, found))
    return reply


def _result(one: Prediction | Explanation, found: Prediction) -> wire.Result:
    """Write the result of one picture."""
    if found.error is not None:
        return wire.Result(error=wire.Error(code=found.error.code, message=found.error.message))
    result = wire.Result(top=[score._asdict() for score in found.top])
    for layer, cells in found.maps.items():
        result.maps.add(layer=layer, tensor=_tensor(cells), channels=found.channels.get(layer, ()))
    if isinstance(one, Explanation):
        explanation = result.explanation
        explanation.method, explanation.layer, explanation.label = one.method, one.layer, one.label
        if one.target is not None:
            explanation.target, explanation.delta = one.target, one.delta or 0.0
            explanation.heat.CopyFrom(_tensor(one.heat))
        if one._picture is not None:
            explanation.picture.CopyFrom(_tensor(one._picture))
    return result


def _tensor(cells: NDArray[Any]) -> wire.Tensor:
    return wire.Tensor(dtype=wire.FLOAT32, shape=cells.shape, data=np.ascontiguousarray(cells, "<f4").tobytes())


def _fields(value: Any) -> Any:
    """Return a dataclass's fields without those that are None, nested ones too."""
    if isinstance(value, dict):
        return {name: _fields(item) for name, item in value.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_fields(item) for item in value]
    return value
