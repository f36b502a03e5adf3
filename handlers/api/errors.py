"""The errors that a caller can get, as exceptions that carry their code.

bytes ──request──► options, pictures ──images──► tensor ──engines──► logits, maps ──formats──► bytes
        BadRequest          BadImage                 Internal                    ReplyTooLarge
        UnknownLayer        ImageTooLarge
        TooManyImages       WrongChannels

The message is sent to the caller: it explains what is valid, and holds no path, no address and no secret. The code is
the same on both transports; only REST has the `status`, since TorchServe ignores it on gRPC. `proto/README.md` lists
the codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self


class RequestError(Exception):
    """A request, or one picture of it, gets an error instead of a result.

    Args:
        message: The message to the caller.
        unexpected: The exception behind it, if it is a fault of the server: its traceback is logged.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, unexpected: Exception | None = None) -> None:
        super().__init__(message)
        self.unexpected = unexpected

    @property
    def message(self) -> str:
        """What went wrong and what is valid, for people."""
        return str(self)


class BadRequest(RequestError):
    """The request cannot be read, or an option has no meaning."""

    code = "bad_request"
    status = 400


class UnknownLayer(RequestError):
    """The model does not publish a layer of that name."""

    code = "unknown_layer"
    status = 400

    @classmethod
    def of(cls, name: str, published: Iterable[str]) -> Self:
        """Return the error for a layer, naming the published layers."""
        return cls(f"there is no layer {name[:40]!r}; this model publishes {', '.join(published)}")


class BadImage(RequestError):
    """The picture cannot be decoded, or the network cannot take it."""

    code = "bad_image"
    status = 400


class ImageTooLarge(RequestError):
    """The picture has more bytes or pixels than the model allows."""

    code = "image_too_large"
    status = 413


class WrongChannels(RequestError):
    """An array does not have the network's channels."""

    code = "wrong_channels"
    status = 400


class TooManyImages(RequestError):
    """The request holds more pictures than the model allows."""

    code = "too_many_images"
    status = 413


class ReplyTooLarge(RequestError):
    """The response would be longer than TorchServe may send, which would kill the worker."""

    code = "reply_too_large"
    status = 413


class Draining(RequestError):
    """The server is stopping, or still warming up, and so is not ready."""

    code = "draining"
    status = 503


class Internal(RequestError):
    """The server has a fault; the log has the reason."""


CODES = tuple(kind.code for kind in RequestError.__subclasses__())
