"""The errors a caller can meet, as exceptions that carry their code.

bytes ──request──► options, pictures ──images──► tensor ──engines──► logits, maps ──reply──► bytes
        BadRequest          BadImage                 Internal                    ReplyTooLarge
        UnknownLayer        ImageTooLarge
        TooManyImages       WrongChannels

The message is returned to the caller: it says what would be right and holds no path, no address and no secret. The same
code goes out on both transports; `status` is REST's alone, since TorchServe ignores it on gRPC. `proto/README.md`
lists the codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self


class RequestError(Exception):
    """A request, or one picture of it, that gets an error instead of a result.

    Args:
        message: For the caller.
        unexpected: The exception behind it, where that is ours to look into: the log gets its traceback.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, unexpected: Exception | None = None) -> None:
        super().__init__(message)
        self.unexpected = unexpected

    @property
    def message(self) -> str:
        """What went wrong and what would be right, for people."""
        return str(self)


class BadRequest(RequestError):
    """The request cannot be read, or an option has no meaning."""

    code = "bad_request"
    status = 400


class UnknownLayer(RequestError):
    """A layer was asked for that the model does not publish."""

    code = "unknown_layer"
    status = 400

    @classmethod
    def of(cls, name: str, published: Iterable[str]) -> Self:
        """Name the layer that is not there, and those that are."""
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
    """The reply would exceed what TorchServe may send, which would kill the worker."""

    code = "reply_too_large"
    status = 413


class Draining(RequestError):
    """The server is stopping, or still warming up; asked for readiness, it says no."""

    code = "draining"
    status = 503


class Internal(RequestError):
    """Something here is broken; the log says what."""

    code = "internal"
    status = 500


CODES = tuple(kind.code for kind in RequestError.__subclasses__())
