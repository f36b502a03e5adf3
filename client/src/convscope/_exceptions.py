"""The client's exceptions, and the error code of each.

REST and gRPC raise the same ones; the exception of httpx or grpc is the `__cause__`.

    ConvscopeError                    .code, .message, .request_id
    ├── TransportError                no valid response from the service
    │   ├── ConnectError
    │   ├── DeadlineExceeded
    │   └── ProtocolError
    ├── RequestRejected               the service, a gateway or this client rejected the request
    │   ├── AuthenticationFailed      unauthorized
    │   ├── BadImage                  bad_image
    │   ├── BadRequest                bad_request
    │   ├── ImageTooLarge             image_too_large
    │   ├── ReplyTooLarge             reply_too_large
    │   ├── TooManyImages             too_many_images
    │   ├── UnknownLayer              unknown_layer
    │   └── WrongChannels             wrong_channels
    ├── ModelNotFound                 .models
    ├── Overloaded                    .retry_after_s
    └── ServerError                   internal
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from convscope._options import ServedModel

__all__ = [
    "AuthenticationFailed",
    "BadImage",
    "BadRequest",
    "ConnectError",
    "ConvscopeError",
    "DeadlineExceeded",
    "ImageTooLarge",
    "ModelNotFound",
    "Overloaded",
    "ProtocolError",
    "ReplyTooLarge",
    "RequestRejected",
    "ServerError",
    "TooManyImages",
    "TransportError",
    "UnknownLayer",
    "WrongChannels",
]


class ConvscopeError(Exception):
    """Base class of this package's exceptions. Its text ends with the request id, which is also in the service's log.

    Attributes:
        code: Stable error code, in snake case.
        message: Human-readable message, without the request id.
        request_id: Id of the request that failed; None if there was none.
    """

    code: str = "error"
    request_id: str | None = None

    @property
    def message(self) -> str:
        """Human-readable message, without the request id."""
        return super().__str__()

    def __str__(self) -> str:
        return self.message if self.request_id is None else f"{self.message} (request {self.request_id})"


class TransportError(ConvscopeError):
    """No valid response was received; the request may or may not have been processed."""

    code = "transport_error"


class ConnectError(TransportError):
    """Could not connect, or the connection broke before the response was complete."""

    code = "connect_error"


class DeadlineExceeded(TransportError):
    """The response was not complete within the deadline, or a gateway timed out."""

    code = "deadline_exceeded"


class ProtocolError(TransportError):
    """The response is not from a convscope service: check the URL."""

    code = "protocol_error"


class RequestRejected(ConvscopeError):
    """The service, a gateway or this client rejected the request; sending it again will not help.

    Args:
        message: Human-readable message.
        code: The service's error code, if it has no subclass.
    """

    code = "rejected"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class AuthenticationFailed(RequestRejected):
    """The API key is missing, wrong, or lacks the permission (HTTP 401, 403)."""

    code = "unauthorized"


class BadImage(RequestRejected):
    """The picture is not a readable PNG, JPEG, WebP or .npy file, or `predict_many` could not encode it."""

    code = "bad_image"


class BadRequest(RequestRejected):
    """An option is invalid."""

    code = "bad_request"


class ImageTooLarge(RequestRejected):
    """A picture has too many bytes or pixels, or the request is over a limit of client, gateway or service."""

    code = "image_too_large"


class ReplyTooLarge(RequestRejected):
    """The requested maps do not fit into one reply; the message says what to request instead."""

    code = "reply_too_large"


class TooManyImages(RequestRejected):
    """The request contains more pictures than the model's `limits.max_images`."""

    code = "too_many_images"


class UnknownLayer(RequestRejected):
    """The model has no layer of that name; the message lists its layers."""

    code = "unknown_layer"


class WrongChannels(RequestRejected):
    """The number of channels of an array is not that of the network's input."""

    code = "wrong_channels"


class ModelNotFound(ConvscopeError):
    """The server has no model of that name, or not that version of it; the message names those there are.

    Args:
        message: Human-readable message.
        models: The models of the server, as `Client.models` lists them; None if it does not say.
    """

    code = "model_not_found"

    def __init__(self, message: str = "", *, models: Sequence[ServedModel] | None = None) -> None:
        super().__init__(message)
        self.models = models


class Overloaded(ConvscopeError):
    """The service cannot accept requests now: queue full, starting, draining, or unreachable behind a gateway.

    Args:
        message: Human-readable message.
        retry_after_s: Seconds to wait before retrying, from the server; None if it gave none, infinite if it asked for
            no retries.
        code: `overloaded`, or `draining` while the server shuts down.
    """

    code = "overloaded"

    def __init__(self, message: str = "", *, retry_after_s: float | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class ServerError(ConvscopeError):
    """The service failed while processing a valid request."""

    code = "internal"


_REJECTIONS: dict[str, type[RequestRejected]] = {
    subclass.code: subclass for subclass in RequestRejected.__subclasses__()
}


@contextmanager
def attach_request_id(request_id: str) -> Iterator[None]:
    """Set `request_id` on a ConvscopeError raised in the block, unless it has one."""
    try:
        yield
    except ConvscopeError as error:
        error.request_id = error.request_id or request_id
        raise


def error_from_code(code: str, message: str, request_id: str | None = None) -> ConvscopeError:
    """Map an `Error` of the contract to an exception to raise: with an unknown code, a plain `RequestRejected`."""
    error: ConvscopeError
    if code == ServerError.code:
        error = ServerError(message)
    elif code == "draining":
        error = Overloaded(message, code=code)
    elif code in _REJECTIONS:
        error = _REJECTIONS[code](message)
    else:
        error = RequestRejected(message, code=code)
    error.request_id = request_id or None
    return error
