"""Python client for a convscope server: class scores and feature maps of a served image network, over REST or gRPC.

    from convscope import Client

    with Client("http://localhost:8080") as client:
        prediction = client.predict("cat.png", model="cifar", layers=["conv1", "conv2"])

Imports are lazy: numpy loads with the first name used, httpx or grpc with the first client, matplotlib with the first
figure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convscope import _exceptions
from convscope._exceptions import (
    AuthenticationFailed,
    BadImage,
    BadRequest,
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    ImageTooLarge,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ReplyTooLarge,
    RequestRejected,
    ServerError,
    TooManyImages,
    TransportError,
    UnknownLayer,
    WrongChannels,
)
from convscope._version import __version__

if TYPE_CHECKING:
    from convscope._async_client import AsyncClient
    from convscope._card import Input, Layer, Limits, ModelCard, Source, Training
    from convscope._client import Client
    from convscope._explanation import Explanation
    from convscope._options import Edit, ServedModel
    from convscope._pictures import encode_pictures
    from convscope._prediction import Change, ClassScore, Prediction, Timing

__all__ = [
    "AsyncClient",
    "AuthenticationFailed",
    "BadImage",
    "BadRequest",
    "Change",
    "ClassScore",
    "Client",
    "ConnectError",
    "ConvscopeError",
    "DeadlineExceeded",
    "Edit",
    "Explanation",
    "ImageTooLarge",
    "Input",
    "Layer",
    "Limits",
    "ModelCard",
    "ModelNotFound",
    "Overloaded",
    "Prediction",
    "ProtocolError",
    "ReplyTooLarge",
    "RequestRejected",
    "ServedModel",
    "ServerError",
    "Source",
    "Timing",
    "TooManyImages",
    "Training",
    "TransportError",
    "UnknownLayer",
    "WrongChannels",
    "__version__",
    "encode_pictures",
]

_LAZY = {
    "AsyncClient": "_async_client",
    "Change": "_prediction",
    "ClassScore": "_prediction",
    "Client": "_client",
    "Edit": "_options",
    "Explanation": "_explanation",
    "Input": "_card",
    "Layer": "_card",
    "Limits": "_card",
    "ModelCard": "_card",
    "Prediction": "_prediction",
    "ServedModel": "_options",
    "Source": "_card",
    "Timing": "_prediction",
    "Training": "_card",
    "encode_pictures": "_pictures",
}

for _name in _exceptions.__all__:
    getattr(_exceptions, _name).__module__ = __name__  # Tracebacks show the name that users import.


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    value.__module__ = __name__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
