"""Converts a `PredictReply` to results. Pure functions, used by both clients and by the transports."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from convscope._card import Input, Layer, Limits, ModelCard, Source, Training
from convscope._exceptions import ConvscopeError, Overloaded, ProtocolError, error_from_code
from convscope._explanation import Explanation
from convscope._prediction import Change, ClassScore, Prediction, Timing
from convscope._request import is_request_id
from convscope._server_errors import MESSAGES
from convscope._wire import convscope_pb2 as wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_DTYPES: dict[int, np.dtype[Any]] = {
    wire.FLOAT32: np.dtype("<f4"),
    wire.FLOAT16: np.dtype("<f2"),
    wire.UINT8: np.dtype("u1"),
}


class TimedReply(NamedTuple):
    """A reply and its duration.

    Attributes:
        reply: The reply.
        total_s: Seconds from sending the request to parsing the reply, last attempt only.
    """

    reply: wire.PredictReply
    total_s: float

    @property
    def code(self) -> str:
        """The first picture's error code if no picture has a result, else `ok`."""
        results = self.reply.results
        if not results:
            return self.reply.error.code if self.reply.HasField("error") else "ok"
        return results[0].error.code if all(result.HasField("error") for result in results) else "ok"


def parse_reply(data: bytes, retry_after_s: float | None = None) -> wire.PredictReply:
    """Parse a serialised reply; `retry_after_s` is what the server said beside it.

    Raises:
        Overloaded: The service is starting or draining.
        ProtocolError: The bytes are not a `PredictReply`.
    """
    try:
        reply = wire.PredictReply.FromString(data)
    except DecodeError as error:
        raise ProtocolError(MESSAGES[ProtocolError]) from error
    if reply.HasField("error") and not reply.results:
        overload = error_from_code(reply.error.code, reply.error.message, effective_request_id(reply, ""))
        if isinstance(overload, Overloaded):
            overload.retry_after_s = retry_after_s
            raise overload
    return reply


def effective_request_id(reply: wire.PredictReply, sent_id: str) -> str:
    """Return the id of a request in the service's log: the reply's, else the id that was sent."""
    return reply.request_id if is_request_id(reply.request_id) else sent_id


def read_predictions(
    reply: wire.PredictReply, count: int, *, request_id: str = "", total_s: float | None = None
) -> list[Prediction]:
    """Convert a reply to one prediction per picture.

    Args:
        reply: The reply.
        count: Number of pictures that were sent.
        request_id: Id that was sent; the reply's own id takes precedence.
        total_s: Seconds the request took; None if its timing was not requested.

    Returns:
        Predictions in the order of the pictures; some may hold an error.

    Raises:
        ConvscopeError: The service rejected the whole request.
        ProtocolError: The reply breaks the contract.
    """
    request_id = effective_request_id(reply, request_id)
    if reply.HasField("error") and not reply.results:
        raise error_from_code(reply.error.code, reply.error.message, request_id)
    if len(reply.results) != count:
        raise ProtocolError(f"invalid reply: {len(reply.results)} results for {count} pictures")
    timing = _timing(reply.timing, total_s) if total_s is not None and reply.HasField("timing") else None
    return [_prediction(reply, result, request_id, timing) for result in reply.results]


def check_edits(reply: wire.PredictReply, count: int) -> None:
    """Raise ProtocolError unless the service did all edits of a request; one that is too old does not know them."""
    if reply.results and reply.edits != count:
        raise ProtocolError("the service does not support edits (older than this client?)")


def read_explanations(
    reply: wire.PredictReply, count: int, *, request_id: str = "", total_s: float | None = None
) -> list[Explanation]:
    """Convert a reply to one explanation per picture; see `read_predictions`.

    Raises:
        ConvscopeError: The service rejected the whole request.
        ProtocolError: The reply breaks the contract, or the service is too old for explanations.
    """
    predictions = read_predictions(reply, count, request_id=request_id, total_s=total_s)
    return [_explanation(prediction, result) for prediction, result in zip(predictions, reply.results, strict=True)]


def _explanation(prediction: Prediction, result: wire.Result) -> Explanation:
    """Convert one picture's explanation."""
    if prediction.error is not None:
        return Explanation(prediction)
    if not result.HasField("explanation"):
        raise ProtocolError("the service does not support explanations (older than this client?)")
    explanation = result.explanation
    heat = read_tensor(explanation.heat) if explanation.HasField("heat") else None
    picture = read_tensor(explanation.picture) if explanation.HasField("picture") else None
    if any(array is not None and (array.ndim != 3 or not array.size) for array in (heat, picture)):
        raise ProtocolError("invalid reply: heat and picture must have shape (C, H, W)")
    return Explanation(
        prediction,
        method=explanation.method,
        layer=explanation.layer,
        target=None if heat is None else explanation.target,
        label=explanation.label,
        heat=heat,
        delta=explanation.delta if explanation.HasField("delta") else None,
        picture=picture,
        original_size=_as_size(explanation.original_size),
        region=_as_box(explanation.region),
    )


def _as_size(values: Sequence[int]) -> tuple[int, int] | None:
    return (values[0], values[1]) if len(values) == 2 else None


def _as_box(values: Sequence[float]) -> tuple[float, float, float, float] | None:
    if len(values) != 4:
        return None
    top, left, bottom, right = values
    if not (math.isfinite(sum(values)) and top < bottom and left < right):
        raise ProtocolError(f"invalid reply: the region {tuple(values)} is empty")
    return top, left, bottom, right


def _timing(timing: wire.Timing, total_s: float) -> Timing:
    """Convert the timing of a request."""
    return Timing(
        read_s=timing.read_s,
        decode_s=timing.decode_s,
        preprocess_s=timing.preprocess_s,
        forward_s=timing.forward_s,
        encode_s=timing.encode_s,
        handler_s=timing.handler_s,
        batch_requests=timing.batch_requests,
        total_s=total_s,
    )


def _prediction(reply: wire.PredictReply, result: wire.Result, request_id: str, timing: Timing | None) -> Prediction:
    """Convert one picture's result."""
    maps, channels = _maps(result.maps)
    error: ConvscopeError | None = None
    if result.HasField("error"):
        error = error_from_code(result.error.code, result.error.message, request_id)
    return Prediction(
        model=reply.model,
        version=reply.version,
        engine=reply.engine,
        device=reply.device,
        top=list(map(_score, result.top)),
        maps=maps,
        channels=channels,
        change=_change(result.change) if result.HasField("change") else None,
        notes=tuple(result.notes),
        scores=reply.scores,
        request_id=request_id,
        timing=timing,
        error=error,
    )


def _change(change: wire.Change) -> Change:
    """Convert what edits changed."""
    return Change(list(map(_score, change.top)), MappingProxyType(_maps(change.maps)[0]))


def _maps(messages: Iterable[wire.FeatureMap]) -> tuple[dict[str, NDArray[np.float32]], dict[str, tuple[int, ...]]]:
    """Convert maps; return them and their channel indexes, by layer."""
    maps: dict[str, NDArray[np.float32]] = {}
    channels: dict[str, tuple[int, ...]] = {}
    for message in messages:
        feature_map = read_tensor(message.tensor)
        layer, indexes = message.layer, tuple(message.channels)
        if feature_map.ndim == 0 or (indexes and len(indexes) != feature_map.shape[0]):
            count = feature_map.shape[0] if feature_map.ndim else 0
            raise ProtocolError(
                f"invalid reply: map of layer {layer!r} has {count} channels, {len(indexes)} channel indexes"
            )
        maps[layer] = feature_map
        channels[layer] = indexes or tuple(range(feature_map.shape[0]))
    return maps, channels


def _score(score: wire.ClassScore) -> ClassScore:
    """Convert one class's score, or one number."""
    if score.HasField("value"):
        return ClassScore(score.index, score.label, math.nan, math.nan, score.value)
    return ClassScore(score.index, score.label, score.probability, score.logit)


def read_tensor(tensor: wire.Tensor) -> NDArray[np.float32]:
    """Convert a tensor to an array.

    Args:
        tensor: float32, float16, or uint8 with a scale and an offset per channel.

    Returns:
        Array of the tensor's shape, float32, read-only. The bytes of a float32 tensor are not copied; uint8 values
        become offset + scale * value of their channel.

    Raises:
        ProtocolError: The shape does not match the bytes, or the dtype is unknown.
    """
    shape = tuple(tensor.shape)
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ProtocolError(f"invalid reply: unknown tensor dtype {tensor.dtype}")
    data = tensor.data
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ProtocolError(f"invalid reply: {len(data)} bytes for a tensor of shape {shape} and dtype {dtype}")
    try:
        array: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # Too many axes, or an axis that is too long.
        raise ProtocolError(f"invalid reply: tensor shape {shape}") from error
    if tensor.dtype == wire.UINT8:
        if not shape or not len(tensor.scale) == len(tensor.offset) == shape[0]:
            raise ProtocolError("invalid reply: a uint8 tensor needs a scale and an offset per channel")
        by_channel = (-1, *(1 for _ in shape[1:]))  # (C, 1, 1)
        array = array * np.array(tensor.scale, np.float32).reshape(by_channel)
        array += np.array(tensor.offset, np.float32).reshape(by_channel)
    array = array.astype(np.float32, copy=False)
    array.flags.writeable = False
    return array


def read_filters(reply: wire.PredictReply, *, request_id: str = "") -> NDArray[np.float32]:
    """Return the filters of a convolution; see `read_predictions` for the id.

    Returns:
        (C_out, C_in, kernel height, kernel width), float32, any range, read-only.

    Raises:
        ConvscopeError: The reply is an error.
        ProtocolError: There are no filters in the reply.
    """
    if reply.HasField("error"):
        raise error_from_code(reply.error.code, reply.error.message, effective_request_id(reply, request_id))
    if not reply.HasField("filters"):
        raise ProtocolError("invalid reply: no filters")
    filters = read_tensor(reply.filters)
    if filters.ndim != 4:
        raise ProtocolError(f"invalid reply: filters must have four axes, not shape {filters.shape}")
    return filters


def read_card(reply: wire.PredictReply, *, request_id: str = "") -> ModelCard:
    """Convert a reply to a model card; see `read_predictions` for the id.

    Raises:
        ConvscopeError: The reply is an error.
        ProtocolError: There is no model card in the reply.
    """
    if reply.HasField("error"):
        raise error_from_code(reply.error.code, reply.error.message, effective_request_id(reply, request_id))
    if not reply.HasField("card"):
        raise ProtocolError("invalid reply: no model card")
    card = reply.card
    return ModelCard(
        model=card.model,
        version=card.version,
        description=card.description,
        architecture=card.architecture,
        engine=card.engine,
        device=card.device,
        classes=tuple(card.classes),
        input=Input(
            channels=card.input.channels,
            height=card.input.height or None,
            width=card.input.width or None,
            mean=tuple(card.input.mean),
            std=tuple(card.input.std),
            resize=tuple(card.input.resize),
            # A service that is too old to report it resizes like this.
            interpolation=card.input.interpolation or ("bilinear" if card.input.height else ""),
            antialias=card.input.antialias or bool(card.input.height and not card.input.interpolation),
            bgr=card.input.bgr,
            fit=card.input.fit,
            fill=tuple(card.input.fill),
        ),
        layers=tuple(map(_layer, card.layers)),
        parameters=card.parameters,
        training=_training(card.training) if card.HasField("training") else None,
        limits=Limits(
            max_images=card.limits.max_images,
            max_image_bytes=card.limits.max_image_bytes,
            max_image_pixels=card.limits.max_image_pixels,
            max_reply_bytes=card.limits.max_reply_bytes,
        ),
        multiply_adds=card.multiply_adds,
        explanations=tuple(card.explanations),
        scores=card.scores,
        edits=tuple(card.edits),
        sources=_sources(card.sources),
    )


def _sources(sources: Iterable[wire.Source]) -> tuple[Source, ...]:
    return tuple(Source(source.layer, source.fewest, source.most) for source in sources)


def _layer(layer: wire.Layer) -> Layer:
    """Convert one layer of a card."""
    return Layer(
        name=layer.name,
        module=layer.module,
        shape=tuple(layer.shape),
        stride=tuple(layer.stride) or None,
        receptive_field=tuple(layer.receptive_field) or None,
        receptive_field_start=tuple(layer.receptive_field_start) or None,
        parameters=layer.parameters,
        bytes=dict(sorted(layer.bytes.items())),
        input_shape=tuple(layer.input_shape),
        operation=layer.operation,
        kernel=tuple(layer.kernel),
        step=tuple(layer.step),
        padding=tuple(layer.padding),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
        multiply_adds=layer.multiply_adds,
        dense_parameters=layer.dense_parameters,
        layout=layer.layout,
        sources=_sources(layer.sources),
    )


def _training(training: wire.Training) -> Training:
    """Convert the training record of a card."""
    return Training(
        data=training.data,
        train_pictures=training.train_pictures,
        test_pictures=training.test_pictures,
        epochs=training.epochs,
        train_accuracy=training.train_accuracy if training.HasField("train_accuracy") else None,
        test_accuracy=training.test_accuracy if training.HasField("test_accuracy") else None,
        seconds=training.seconds,
        machine=training.machine,
        versions=dict(sorted(training.versions.items())),
    )
