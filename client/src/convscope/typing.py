"""Type aliases for annotations, and the transport interfaces."""

from __future__ import annotations

from convscope._options import (
    Channels,
    EditedChannels,
    ExplainOptions,
    MapDtype,
    Method,
    Operation,
    PredictManyOptions,
    PredictOptions,
)
from convscope._pictures import EncodablePicture, Picture
from convscope._transport import AsyncTransport, Backend, Transport

__all__ = [
    "AsyncTransport",
    "Backend",
    "Channels",
    "EditedChannels",
    "EncodablePicture",
    "ExplainOptions",
    "MapDtype",
    "Method",
    "Operation",
    "Picture",
    "PredictManyOptions",
    "PredictOptions",
    "Transport",
]
