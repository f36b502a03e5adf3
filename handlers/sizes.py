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

_ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
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
    count: float, layers: tuple[str, ...], geometry: Mapping[str, LayerGeometry], options: Options, media_type: str
) -> int:
    """Return the bytes of the maps that a reply will hold.

    Args:
        count: Pictures of the size that the geometry is of.
        layers: Whose maps were asked for.
        geometry: Of each published layer.
        options: The caller's.
        media_type: What the reply is asked for in.
    """
    cells = 0
    for name in layers:
        channels, *area = geometry[name].shape
        if isinstance(options.channels, int):
            channels = min(channels, options.channels)
        elif options.channels is not None:
            channels = len(options.channels)
        cells += channels * (math.prod(area) if options.pool is None else options.pool**2)
    size = int(count * cells * _ITEM_BYTES[options.map_dtype])
    return size * 4 // 3 if media_type == media.JSON else size
