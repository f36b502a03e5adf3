"""Test helpers: a fake transport, so that applications can be tested without a server.

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
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from convscope._card import Input, Layer, Limits, ModelCard
from convscope._exceptions import ConvscopeError
from convscope._explanation import Explanation
from convscope._options import Edit, Operation
from convscope._prediction import Change, ClassScore, Prediction, Timing
from convscope._wire import convscope_pb2 as wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FakeResponse", "FakeTransport", "Request", "explanation", "model_card", "prediction"]

FakeResponse: TypeAlias = (
    "Prediction | Explanation | Sequence[Prediction | Explanation] | ModelCard | NDArray[Any] | ConvscopeError"
)


@dataclass(frozen=True)
class Request:
    """A recorded request.

    Attributes:
        method: Method of the client: `predict` (also `predict_many`), `explain`, `model_card` (also `ready`) or
            `filters`.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        pictures: Picture files.
        layers: Requested layers; the layer, for `filters`.
        top_k: Number of requested classes; 0 for all.
        map_dtype: Dtype of the maps on the wire.
        pool: Option `pool`; None for whole maps.
        channels: Channel indexes, or the number of strongest channels; None for all.
        explain_method: Method of an explanation; empty for other requests.
        target: Index of the class to explain; None for the most probable one.
        timing: Whether the timing is requested.
        edits: Edits, in order.
        compare: Whether what they change is requested.
        request_id: Id of the request.
        deadline_s: Seconds until its deadline.
        traceparent: W3C Trace Context that it was sent with; empty for none.
    """

    method: Literal["predict", "explain", "model_card", "filters"]
    model: str
    version: str | None
    pictures: tuple[bytes, ...]
    layers: tuple[str, ...]
    top_k: int
    map_dtype: str
    pool: int | None
    channels: tuple[int, ...] | int | None
    explain_method: str
    target: int | None
    timing: bool
    edits: tuple[Edit, ...]
    compare: bool
    request_id: str
    deadline_s: float
    traceparent: str = ""


class FakeTransport:
    """In-memory transport for `Client(transport=...)` and `AsyncClient(transport=...)`.

    Responses are serialised to protobuf and parsed again, exactly like a server's. Errors are retried too: pass
    `retries=0` to the client to see them at once. With `timing=True` the reply has the timing of the first prediction;
    zeros if it has none.

    Args:
        response: The response to every request, or a function that returns or raises it: a `Prediction` (or
            `Explanation`) for all pictures, a sequence with one per picture, a `ModelCard`, the array of `filters`, or
            a `ConvscopeError`.

    Attributes:
        requests: The requests so far.
        closed: Whether the client has been closed.
    """

    def __init__(self, response: FakeResponse | Callable[[Request], FakeResponse]) -> None:
        self._response = response
        self.requests: list[Request] = []
        self.closed = False

    def send(
        self, request: wire.PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> wire.PredictReply:
        """Return the response to a request of `Client`."""
        recorded = _read_request(request, model, version, deadline_s)
        self.requests.append(recorded)
        response = self._response(recorded) if callable(self._response) else self._response
        if isinstance(response, ConvscopeError):
            raise copy.copy(response)  # The client sets its request id.
        return _write_reply(recorded, response)

    def close(self) -> None:
        """Mark the transport as closed."""
        self.closed = True

    async def asend(
        self, request: wire.PredictRequest, *, model: str, version: str | None, deadline_s: float
    ) -> wire.PredictReply:
        """Return the response to a request of `AsyncClient`."""
        return self.send(request, model=model, version=version, deadline_s=deadline_s)

    async def aclose(self) -> None:
        """Mark the transport as closed."""
        self.close()


def prediction(
    probabilities: Mapping[str, float] | None = None,
    *,
    values: Mapping[str, float] | None = None,
    maps: Mapping[str, NDArray[Any]] | None = None,
    change: Change | None = None,
    notes: Sequence[str] = (),
    error: ConvscopeError | None = None,
) -> Prediction:
    """Create a prediction.

    Args:
        probabilities: Probabilities (0..1) by label, most probable first; class indexes follow the order of the
            mapping.
        values: Regression outputs by label, instead of probabilities.
        maps: Maps by layer, (C, h, w) or (C,), any range; converted to float32.
        change: What edits changed.
        notes: How the service converted the picture, such as `grey to RGB`.
        error: The picture's own error, instead of a result.

    Returns:
        The prediction.
    """
    top = [
        ClassScore(index, label, probability, math.log(max(probability, 1e-9)))
        for index, (label, probability) in enumerate((probabilities or {}).items())
    ]
    if values is not None:
        top = [
            ClassScore(index, label, math.nan, math.nan, value) for index, (label, value) in enumerate(values.items())
        ]
    arrays = {layer: np.asarray(feature_map, np.float32) for layer, feature_map in (maps or {}).items()}
    return Prediction(
        model="fake",
        version="1.0",
        engine="fake",
        device="cpu",
        top=top,
        maps=arrays,
        scores="value" if values is not None else "softmax" if top else "",
        change=change,
        notes=notes,
        error=error,
    )


def explanation(
    heat: NDArray[Any],
    *,
    label: str,
    method: str = "grad_cam",
    layer: str = "",
    target: int = 0,
    delta: float | None = None,
    picture: NDArray[Any] | None = None,
) -> Explanation:
    """Create an explanation.

    Args:
        heat: (C, h, w), any range; converted to float32.
        label: Name of the explained class, whose probability is 1.
        method: Name of the method.
        layer: Layer whose map was used; empty for none.
        target: Index of the explained class.
        delta: integrated_gradients: completeness error.
        picture: The network's input, (C, H, W), 0..1; None for an explanation without it.

    Returns:
        The explanation.
    """
    scores = [ClassScore(target, label, 1.0, 0.0)]
    return Explanation(
        Prediction(model="fake", version="1.0", engine="fake", device="cpu", top=scores),
        method=method,
        layer=layer,
        target=target,
        label=label,
        heat=np.asarray(heat, np.float32),
        delta=delta,
        picture=None if picture is None else np.asarray(picture, np.float32),
    )


def model_card(
    *,
    layers: Mapping[str, tuple[int, ...]] | None = None,
    classes: Sequence[str] = (),
    input_shape: tuple[int, int, int] = (3, 32, 32),
) -> ModelCard:
    """Create a model card. Its limits are generous, and its layers have no receptive field.

    Args:
        layers: Shapes of the maps, (C, h, w), by layer name.
        classes: Labels in the order of their indexes.
        input_shape: (C, H, W) of the network's input.

    Returns:
        The model card.
    """
    channels, height, width = input_shape
    return ModelCard(
        model="fake",
        version="1.0",
        description="",
        architecture="fake:Network",
        engine="fake",
        device="cpu",
        classes=tuple(classes),
        input=Input(channels, height, width, (), ()),
        layers=tuple(
            Layer(name, name, shape, None, None, None, 0, {"float32": 4 * math.prod(shape)})
            for name, shape in (layers or {}).items()
        ),
        parameters=0,
        training=None,
        limits=Limits(max_images=64, max_image_bytes=10**7, max_image_pixels=10**8, max_reply_bytes=10**8),
    )


def _read_request(request: wire.PredictRequest, model: str, version: str | None, deadline_s: float) -> Request:
    method: Literal["predict", "explain", "model_card", "filters"] = "predict"
    if request.describe:
        method = "model_card"
    elif request.filters:
        method = "filters"
    elif request.HasField("explain"):
        method = "explain"
    channels: tuple[int, ...] | int | None = None
    if request.HasField("channels"):
        channels = tuple(request.channels.indexes) or request.channels.strongest
    return Request(
        method=method,
        model=model,
        version=version,
        pictures=tuple(request.pictures),
        layers=(request.filters,) if method == "filters" else tuple(request.layers),
        top_k=request.top_k,
        map_dtype=wire.Dtype.Name(request.map_dtype).lower(),
        pool=request.pool if request.HasField("pool") else None,
        channels=channels,
        explain_method=request.explain.method,
        target=request.explain.target if request.explain.HasField("target") else None,
        timing=request.timing,
        edits=tuple(map(_edit, request.edits)),
        compare=request.compare,
        request_id=request.request_id,
        deadline_s=deadline_s,
        traceparent=request.traceparent,
    )


def _edit(message: wire.Edit) -> Edit:
    value: Any = tuple(message.value)
    channels: Any = {"except": list(message.excluded)} if message.excluded else list(message.channels) or "all"
    region: Any = tuple(message.region) or None
    box: Any = tuple(message.box) or None
    return Edit(
        layer=message.layer,
        operation=cast("Operation", message.operation),
        value=value[0] if len(value) == 1 else value or None,
        channels=channels,
        region=region,
        box=box,
        picture=message.picture if message.HasField("picture") else None,
    )


def _write_reply(request: Request, response: Any) -> wire.PredictReply:
    """Convert a response to a reply."""
    reply = wire.PredictReply(model=request.model, version=request.version or "1.0", request_id=request.request_id)
    reply.edits = len(request.edits)
    if isinstance(response, ModelCard):
        reply.card.CopyFrom(wire.ModelCard(**_without_none(dataclasses.asdict(response))))
        return reply
    if isinstance(response, np.ndarray):
        reply.filters.CopyFrom(_tensor(response))
        return reply
    if isinstance(response, Prediction | Explanation):
        response = [response] * len(request.pictures)
    for result in response:
        prediction_ = result.prediction if isinstance(result, Explanation) else result
        reply.engine, reply.device, reply.scores = prediction_.engine, prediction_.device, prediction_.scores
        reply.results.append(_result(result, prediction_))
    if request.timing and response:
        reply.timing.CopyFrom(_timing(response[0].timing))
    return reply


def _result(result: Prediction | Explanation, prediction_: Prediction) -> wire.Result:
    """Convert the result of one picture."""
    if prediction_.error is not None:
        return wire.Result(error=wire.Error(code=prediction_.error.code, message=prediction_.error.message))
    message = wire.Result(top=[score.as_values() for score in prediction_.top], notes=prediction_.notes)
    for layer, feature_map in prediction_.maps.items():
        message.maps.add(layer=layer, tensor=_tensor(feature_map), channels=prediction_.channels.get(layer, ()))
    if prediction_.change is not None:
        message.change.top.extend([wire.ClassScore(**score.as_values()) for score in prediction_.change.top])
        for layer, feature_map in prediction_.change.maps.items():
            message.change.maps.add(layer=layer, tensor=_tensor(feature_map))
    if isinstance(result, Explanation):
        message.explanation.method = result.method
        message.explanation.layer = result.layer
        message.explanation.label = result.label
        if result.target is not None:
            message.explanation.target = result.target
        if result.delta is not None:
            message.explanation.delta = result.delta
        if result.has_heat:
            message.explanation.heat.CopyFrom(_tensor(result.heat))
        if result.has_picture:
            message.explanation.picture.CopyFrom(_tensor(result.picture))
    return message


def _timing(timing: Timing | None) -> wire.Timing:
    if timing is None:
        return wire.Timing(batch_requests=1)
    fields = dataclasses.asdict(timing)
    del fields["total_s"]  # Measured by the client.
    return wire.Timing(**fields)


def _tensor(array: NDArray[Any]) -> wire.Tensor:
    return wire.Tensor(dtype=wire.FLOAT32, shape=array.shape, data=np.ascontiguousarray(array, "<f4").tobytes())


def _without_none(value: Any) -> Any:
    """Remove None values from nested dicts and lists."""
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_without_none(item) for item in value]
    return value
