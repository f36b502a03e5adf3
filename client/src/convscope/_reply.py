"""Reading a PredictReply into what the caller gets: pure functions, for every kind of client."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convscope._exceptions import ConvscopeError, Overloaded, ProtocolError, error_from_code
from convscope._explanation import Explanation
from convscope._prediction import ClassScore, Prediction
from convscope._request import is_request_id
from convscope._timing import Timing
from convscope._wire import convscope_pb2 as wire

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CELLS: dict[int, np.dtype[Any]] = {
    wire.FLOAT32: np.dtype("<f4"),
    wire.FLOAT16: np.dtype("<f2"),
    wire.UINT8: np.dtype("u1"),
}


_OURS = np.dtype(np.float32)  # Not what travels where the machine's bytes are in the other order.
_ALL = slice(None)


class Answer(NamedTuple):
    """What came back to a question.

    Attributes:
        reply: To the request that it was asked in.
        total_s: In how many seconds: of the attempt that was answered.
        request_id: What that request was sent with.
        sent: How many pictures it was about.
        own: Which of them are the question's.
    """

    reply: wire.PredictReply
    total_s: float
    request_id: str
    sent: int
    own: slice = _ALL

    @property
    def code(self) -> str:
        """The code of its error where none of its pictures has a result, else `ok`."""
        results = self.reply.results[self.own]
        if not results:
            return self.reply.error.code if self.reply.HasField("error") else "ok"
        return results[0].error.code if all(result.HasField("error") for result in results) else "ok"


def read_predictions(
    reply: wire.PredictReply,
    count: int,
    *,
    request_id: str = "",
    total_s: float | None = None,
    own: slice = _ALL,
) -> list[Prediction]:
    """Read one prediction a picture.

    Args:
        reply: What came.
        count: How many pictures were sent.
        request_id: The id they were sent with; the reply's own, which is the one in the service's log, counts more.
        total_s: Seconds it took, where the timing was asked for.
        own: Which of the pictures to read about.

    Returns:
        Predictions in the order sent, some of which may hold an error instead of a result.

    Raises:
        ConvscopeError: The service refused the request as a whole.
        ProtocolError: The reply breaks the contract.
    """
    request_id = answered_id(reply, request_id)
    check_reply(reply, count, request_id)
    timing = _timing(reply.timing, total_s) if total_s is not None and reply.HasField("timing") else None
    return [_prediction(reply, result, request_id, timing) for result in reply.results[own]]


def check_reply(reply: wire.PredictReply, count: int, request_id: str) -> None:
    """Check that a reply holds results.

    Args:
        reply: What came.
        count: How many pictures were sent.
        request_id: The id they were sent with.

    Raises:
        ConvscopeError: The service refused the request as a whole.
        ProtocolError: The reply breaks the contract.
    """
    if reply.HasField("error") and not reply.results:
        raise error_from_code(reply.error.code, reply.error.message, answered_id(reply, request_id))
    if len(reply.results) != count:
        raise ProtocolError(f"{count} pictures were sent and {len(reply.results)} results came back")


def check_open(reply: wire.PredictReply, retry_after_s: float | None = None) -> None:
    """Check that a reply does not only say that the service takes no requests now.

    Args:
        reply: What came.
        retry_after_s: Seconds after which the server asks to be tried again, if it said so.

    Raises:
        Overloaded: It does: the service starts, or is stopping.
    """
    if reply.HasField("error") and not reply.results:
        error = error_from_code(reply.error.code, reply.error.message, answered_id(reply, ""))
        if isinstance(error, Overloaded):
            error.retry_after_s = retry_after_s
            raise error


def read_explanations(
    reply: wire.PredictReply, count: int, *, request_id: str = "", total_s: float | None = None
) -> list[Explanation]:
    """Read one explanation a picture; see `read_predictions`.

    Raises:
        ConvscopeError: The service refused the request as a whole.
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
    """Return the id that the service knows a request by."""
    return reply.request_id if is_request_id(reply.request_id) else sent


def _timing(timing: wire.Timing, total_s: float) -> Timing:
    """Read where the time went."""
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
        channels[layer] = chosen or _every(cells.shape[0])
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


@lru_cache(maxsize=128)
def _every(count: int) -> tuple[int, ...]:
    """Return the indexes of all channels."""
    return tuple(range(count))


def read_tensor(tensor: wire.Tensor) -> NDArray[np.float32]:
    """Read a tensor into an array.

    Args:
        tensor: float32, float16, or uint8 with a scale and an offset a channel.

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
    if dtype is _OURS:
        return cells  # A view of bytes, which cannot be written to.
    if tensor.dtype == wire.UINT8:
        if not shape or not len(tensor.scale) == len(tensor.offset) == shape[0]:
            raise ProtocolError("a uint8 tensor came without a scale and an offset for each channel")
        by_channel = (-1, *(1 for _ in shape[1:]))  # (C, 1, 1)
        cells = cells * np.array(tensor.scale, np.float32).reshape(by_channel)
        cells += np.array(tensor.offset, np.float32).reshape(by_channel)
    elif tensor.dtype == wire.FLOAT16:
        cells = _halves().take(cells.view("<u2").ravel()).reshape(shape)
    cells = cells.astype(np.float32, copy=False)
    cells.flags.writeable = False
    return cells


@cache
def _halves() -> NDArray[np.float32]:
    """Return every float16 as float32, by its bits: to look one up takes half the time of converting it."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def read_filters(reply: wire.PredictReply, *, request_id: str = "") -> NDArray[np.float32]:
    """Read the kernels of a convolution.

    Args:
        reply: What came.
        request_id: The id they were asked for with; the reply's own counts more.

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
