"""Tells the service's errors from those of pictures: they end a run over many pictures, and say how far it came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convscope import (
    AuthenticationFailed,
    ConvscopeError,
    ModelNotFound,
    Overloaded,
    ServerError,
    TransportError,
    UnknownLayer,
)

if TYPE_CHECKING:
    from convscope import Client

SERVICE_ERRORS = (TransportError, Overloaded, ModelNotFound, AuthenticationFailed, UnknownLayer)


def raise_if_of_service(
    error: ConvscopeError | None, client: Client, model: str, version: str | None, so_far: str
) -> None:
    """Raise the error of a picture if it is the service's, since the pictures behind it would fail too.

    Args:
        error: The picture's error; None if it has none.
        client: An open client, which asks whether the network still runs after a `ServerError`.
        model: Name of the model.
        version: Version of the model; None for the server's default.
        so_far: How far the run came, such as `12 of 40 pictures were measured`: a note of the error.

    Raises:
        ConvscopeError: The service failed.
    """
    try:
        if isinstance(error, SERVICE_ERRORS):
            raise error
        if isinstance(error, ServerError):
            client.model_card(model, version)  # For which the service runs the network once.
    except ConvscopeError as failure:
        failure.add_note(so_far)
        raise
