"""Reads a PredictReply into what the caller gets: pure functions, shared by both clients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convscope._card import Input, Layer, Limits, ModelCard, Training
from convscope._exceptions import ConvscopeError, Overloaded, ProtocolError, error_from_code
from convscope._explanation import Explanation
from convscope._prediction import ClassScore, Prediction, Timing
from convscope._request import is_request_id
from convscope._wire import convscope_pb2 as wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CELLS: dict[int, np.dtype[Any]] = {
    wire.FLOAT32: np.dtype("<f4"),
    wire.FLOAT16: np.dtype("<f2"),
    wire.UINT8: np.dtype("u1"),
}


class Response(NamedTuple):
    """A reply, and how long it took.

    Attributes:
        reply: The reply.
        total_s: Seconds from sending the request to having read the reply: of the attempt that was answered.
    """

    reply: wire.PredictReply
    total_s: float

    @property
    def code(self) -> str:
        """The code of the first error if no picture has a result, else `ok`."""
        results = self.reply.results
        if not results:
            return self.reply.error.code if self.reply.HasField("error") else "ok"
        return results[0].error.code if all(result.HasField("error") for result in results) else "ok"


def read_predictions(
    reply: wire.PredictReply, count: int, *, request_id: str = "", total_s: float | None = None
) -> list[Prediction]:
    """Read one prediction for each picture.

    Args:
        reply: The reply.
        count: How many pictures were sent.
        request_id: The id they were sent with. The reply's own id, which is the one in the service's log, has priority.
        total_s: Seconds the request took; None if its timing was not asked for.

    Returns:
        Predictions in the order of the pictures, some of which may hold an error.

    Raises:
        ConvscopeError: The service rejected the request as a whole.
        ProtocolError: The reply breaks the contract.
    """
    request_id = answered_id(reply, request_id)
    if reply.HasField("error") and not reply.results:
        raise error_from_code(reply.error.code, reply.error.message, request_id)
    if len(reply.results) != count:
        raise ProtocolError(f"{count} pictures were sent and {len(reply.results)} results came back")
    timing = _timing(reply.timing, total_s) if total_s is not None and reply.HasField("timing") else None
    return [_prediction(reply, result, request_id, timing) for result in reply.results]


def check_open(reply: wire.PredictReply, retry_after_s: float | None = None) -> None:
    """Raise if a reply says that the service takes no requests now.

    Args:
        reply: The reply.
        retry_after_s: Seconds after which the server asks to be tried again, if it said so.

    Raises:
        Overloaded: The service is starting or draining.
    """
    if reply.HasField("error") and not reply.results:
        error = error_from_code(reply.error.code, reply.error.message, answered_id(reply, ""))
        if isinstance(error, Overloaded):
            error.retry_after_s = retry_after_s
            raise error


def read_explanations(
    reply: wire.PredictReply, count: int, *, request_id: str = "", total_s: float | None = None
) -> list[Explanation]:
    """Read one explanation for each picture; see `read_predictions`.

    Raises:
        ConvscopeError: The service rejected the request as a whole.
        ProtocolError: The reply breaks the contract, or the service is too old to explain.
    """
    predictions = read_predictions(reply, count, request_id=request_id, total_s=total_s)
    return [_explanation(prediction, result) for prediction, result in zip(predictions, reply.results, strict=True)]


def _explanation(prediction: Prediction, result: wire.Result) -> Explanation:
    """Read one picture's explanation."""
    if prediction.error is not None:
        return Explanation(prediction)
    if not result.HasField("explanation"):
        raise ProtocolError("an explanation was asked for and none came back: is the service older than this client?")
    found = result.explanation
    heat = read_tensor(found.heat) if found.HasField("heat") else None
    picture = read_tensor(found.picture) if found.HasField("picture") else None
    if any(cells is not None and (cells.ndim != 3 or not cells.size) for cells in (heat, picture)):
        raise ProtocolError("an explanation came whose tensors have no channels, rows and columns")
    return Explanation(
        prediction,
        method=found.method,
        layer=found.layer,
        target=None if heat is None else found.target,
        label=found.label,
        heat=heat,
        delta=found.delta if found.HasField("delta") else None,
        picture=picture,
    )


def answered_id(reply: wire.PredictReply, sent: str) -> str:
    """Return the id by which the service knows a request: the reply's, else the one that was sent."""
    return reply.request_id if is_request_id(reply.request_id) else sent


def _timing(timing: wire.Timing, total_s: float) -> Timing:
    """Read the timing of a request."""
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
    """Read one picture's result."""
    maps: dict[str, NDArray[np.float32]] = {}
    channels: dict[str, tuple[int, ...]] = {}
    for feature_map in result.maps:
        cells = read_tensor(feature_map.tensor)
        layer, chosen = feature_map.layer, tuple(feature_map.channels)
        if cells.ndim == 0 or (chosen and len(chosen) != cells.shape[0]):
            raise ProtocolError(f"the map of layer {layer!r} and its channels do not fit together")
        maps[layer] = cells
        channels[layer] = chosen or tuple(range(cells.shape[0]))
    error: ConvscopeError | None = None
    if result.HasField("error"):
        error = error_from_code(result.error.code, result.error.message, request_id)
    return Prediction(
        model=reply.model,
        version=reply.version,
        engine=reply.engine,
        device=reply.device,
        top=[ClassScore(score.index, score.label, score.probability, score.logit) for score in result.top],
        maps=maps,
        channels=channels,
        request_id=request_id,
        timing=timing,
        error=error,
    )


def read_tensor(tensor: wire.Tensor) -> NDArray[np.float32]:
    """Read a tensor into an array.

    Args:
        tensor: float32, float16, or uint8 with a scale and an offset for each channel.

    Returns:
        Array of the tensor's shape, float32, read-only. A float32 tensor's bytes are not copied; uint8 cells become
        offset + scale * cell of their channel.

    Raises:
        ProtocolError: The bytes do not fill the shape, or the dtype is not one of the three.
    """
    shape = tuple(tensor.shape)
    dtype = _CELLS.get(tensor.dtype)
    if dtype is None:
        raise ProtocolError(f"a tensor has the unknown dtype {tensor.dtype}")
    data = tensor.data
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ProtocolError(f"a tensor of shape {shape} and dtype {dtype} came with {len(data)} bytes")
    try:
        cells: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:
        raise ProtocolError(f"a tensor came with {len(shape)} axes, or with axes too long for any array") from error
    if tensor.dtype == wire.UINT8:
        if not shape or not len(tensor.scale) == len(tensor.offset) == shape[0]:
            raise ProtocolError("a uint8 tensor came without a scale and an offset for each channel")
        by_channel = (-1, *(1 for _ in shape[1:]))  # (C, 1, 1)
        cells = cells * np.array(tensor.scale, np.float32).reshape(by_channel)
        cells += np.array(tensor.offset, np.float32).reshape(by_channel)
    cells = cells.astype(np.float32, copy=False)
    cells.flags.writeable = False
    return cells


def read_filters(reply: wire.PredictReply, *, request_id: str = "") -> NDArray[np.float32]:
    """Read the kernels of a convolution.

    Args:
        reply: The reply.
        request_id: The id they were asked for with. The reply's own id has priority.

    Returns:
        (C_out, C_in, kernel height, kernel width), float32, read-only.

    Raises:
        ConvscopeError: The service answered with an error.
        ProtocolError: There are no filters in the reply.
    """
    if reply.HasField("error"):
        raise error_from_code(reply.error.code, reply.error.message, answered_id(reply, request_id))
    if not reply.HasField("filters"):
        raise ProtocolError("filters were asked for and none came back")
    filters = read_tensor(reply.filters)
    if filters.ndim != 4:
        raise ProtocolError(f"filters have four axes, not the shape {filters.shape}")
    return filters


def read_card(reply: wire.PredictReply, *, request_id: str = "") -> ModelCard:
    """Read a model card.

    Args:
        reply: The reply.
        request_id: The id it was asked for with. The reply's own id has priority.

    Returns:
        The card.

    Raises:
        ConvscopeError: The service answered with an error.
        ProtocolError: There is no card in the reply.
    """
    if reply.HasField("error"):
        raise error_from_code(reply.error.code, reply.error.message, answered_id(reply, request_id))
    if not reply.HasField("card"):
        raise ProtocolError("the model card was asked for and none came back")
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
    )


def _layer(layer: wire.Layer) -> Layer:
    """Read one layer of a card."""
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
    )


def _training(training: wire.Training) -> Training:
    """Read the training part of a card."""
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
