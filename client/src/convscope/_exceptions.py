"""Every exception the client raises, and which error code becomes which.

The same on REST and gRPC; what httpx or grpc raised is kept as `__cause__`.

    ConvscopeError                    .code, .message, .request_id
    ├── TransportError                no answer of the service came back
    │   ├── ConnectError
    │   ├── DeadlineExceeded
    │   └── ProtocolError
    ├── RequestRejected               the service answered: this cannot be done
    │   ├── AuthenticationFailed      unauthorized
    │   ├── BadImage                  bad_image
    │   ├── BadRequest                bad_request
    │   ├── ImageTooLarge             image_too_large
    │   ├── ReplyTooLarge             reply_too_large
    │   ├── TooManyImages             too_many_images
    │   ├── UnknownLayer              unknown_layer
    │   └── WrongChannels             wrong_channels
    ├── ModelNotFound
    ├── Overloaded                    .retry_after_s
    └── ServerError                   internal
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    """Base class of this package's exceptions. Its text ends with the request's id, which is in the service's log, too.

    Attributes:
        code: The kind of error, for programs: snake case, stable.
        request_id: The id of the request that failed; None if there was none.
    """

    code: str = "error"
    request_id: str | None = None

    @property
    def message(self) -> str:
        """The text for people, without the request's id."""
        return super().__str__()

    def __str__(self) -> str:
        return self.message if self.request_id is None else f"{self.message} (request {self.request_id})"


class TransportError(ConvscopeError):
    """No reply of the service came back; whether it did the work is not known."""

    code = "transport_error"


class ConnectError(TransportError):
    """No connection could be made, or it broke before the response was complete."""

    code = "connect_error"


class DeadlineExceeded(TransportError):
    """The response was not complete within the deadline, or a gateway gave up waiting for it."""

    code = "deadline_exceeded"


class ProtocolError(TransportError):
    """The response is not one of this service: another program sent it, or another version."""

    code = "protocol_error"


class RequestRejected(ConvscopeError):
    """The service rejected the request, and will reject the same request again.

    Args:
        message: For people, as the service put it.
        code: The service's error code, if it has no subclass.
    """

    code = "rejected"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class AuthenticationFailed(RequestRejected):
    """The API key is missing, wrong, or not allowed to do this (HTTP 401, 403)."""

    code = "unauthorized"


class BadImage(RequestRejected):
    """The picture's bytes are not a PNG, JPEG, WebP or .npy file that can be read."""

    code = "bad_image"


class BadRequest(RequestRejected):
    """An option has a value the service does not take."""

    code = "bad_request"


class ImageTooLarge(RequestRejected):
    """A picture has too many bytes or pixels, or the whole request is over the size limit."""

    code = "image_too_large"


class ReplyTooLarge(RequestRejected):
    """The maps asked for do not fit into one reply; the message says what to ask for instead."""

    code = "reply_too_large"


class TooManyImages(RequestRejected):
    """The request holds more pictures than the model's `limits.max_images`."""

    code = "too_many_images"


class UnknownLayer(RequestRejected):
    """The model has no layer of that name; the message lists those it has."""

    code = "unknown_layer"


class WrongChannels(RequestRejected):
    """An array has another number of channels than the network takes."""

    code = "wrong_channels"


class ModelNotFound(ConvscopeError):
    """The server serves no model of that name, or not that version of it."""

    code = "model_not_found"


class Overloaded(ConvscopeError):
    """The server takes no more work now: its queue is full, it is starting or draining, or a gateway cannot reach it.

    Args:
        message: For people.
        retry_after_s: Seconds after which the server asks to be tried again, if it said so;
            infinite if it asked for no more tries.
        code: `overloaded`, or `draining` while the server shuts down.
    """

    code = "overloaded"

    def __init__(self, message: str = "", *, retry_after_s: float | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class ServerError(ConvscopeError):
    """The service failed at its own work; the request was in order."""

    code = "internal"


_REJECTIONS: dict[str, type[RequestRejected]] = {kind.code: kind for kind in RequestRejected.__subclasses__()}


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Give a request's id to each ConvscopeError raised in the context, unless it has one.

    Args:
        request_id: The id.
    """
    try:
        yield
    except ConvscopeError as error:
        error.request_id = error.request_id or request_id
        raise


def error_from_code(code: str, message: str, request_id: str | None = None) -> ConvscopeError:
    """Make the exception for an `Error` of the contract.

    Args:
        code: The error's code; one this client does not know makes a plain `RequestRejected` of that code.
        message: The error's message.
        request_id: The id of the request.

    Returns:
        The exception, not raised.
    """
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
