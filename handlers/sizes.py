"""Sizes: whether a reply can be sent, foreseen before the forward pass and checked after encoding.

TorchServe kills a worker whose reply is longer than it may send, so such a request is refused instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from handlers import media
from handlers.errors import ReplyTooLarge
from handlers.networks.geometry import LayerGeometry
from handlers.options import Options

ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
"""Of a map's cell, by dtype."""
_TOO_LARGE = (
    "the reply would have {size:,} bytes, at most {limit:,} can be sent; ask for fewer layers or channels, "
    "for pool, for map_dtype uint8 or float16, or send fewer pictures in a request"
)


def check(size: int, limit: int) -> None:
    """Refuse a reply that is too long.

    Args:
        size: Its bytes.
        limit: Most bytes.

    Raises:
        ReplyTooLarge: It is.
    """
    if size > limit:
        raise ReplyTooLarge(_TOO_LARGE.format(size=size, limit=limit))


def foresee(
    layers: tuple[str, ...],
    geometry: Mapping[str, LayerGeometry],
    options: Options,
    media_type: str,
    scale: float = 1,
) -> int:
    """Return the bytes of one picture's maps in a reply.

    Args:
        layers: Whose maps were asked for.
        geometry: Of each published layer.
        options: The caller's.
        media_type: What the reply is asked for in.
        scale: The picture's pixels in terms of those that the geometry is of.
    """
    cells = 0.0
    for name in layers:
        channels, *area = geometry[name].shape
        if isinstance(options.channels, int):
            channels = min(channels, options.channels)
        elif options.channels is not None:
            channels = min(channels, len(options.channels))
        whole = math.prod(area) * scale
        cells += channels * (whole if options.pool is None else min(whole, options.pool**2))
    size = int(cells * ITEM_BYTES[options.map_dtype])
    return size * 4 // 3 if media_type == media.JSON else size
