"""Limits: the largest request, and whether its response can be sent.

TorchServe kills a worker whose response is longer than its limit. So the size is estimated before the forward pass and
checked after encoding, and the request is rejected instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handlers.api import media
from handlers.api.errors import ReplyTooLarge
from handlers.api.options import Options
from handlers.images.decoding import DEFAULT_MAX_BYTES, DEFAULT_MAX_IMAGES, DEFAULT_MAX_PIXELS
from handlers.network.archive import Layer
from handlers.settings import STOCK_MAX_RESPONSE_BYTES

ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
"""Bytes per cell of a map, by dtype."""

_FRAME_BYTES = 65_536  # Room for status, headers and request ids, which count towards that size.


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        max_images: Pictures in a request.
        max_image_bytes: Bytes of one encoded picture or array.
        max_image_pixels: H·W of one picture.
        max_reply_bytes: Bytes of one response.
    """

    max_images: int = DEFAULT_MAX_IMAGES
    max_image_bytes: int = DEFAULT_MAX_BYTES
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    max_reply_bytes: int = STOCK_MAX_RESPONSE_BYTES - _FRAME_BYTES

    @property
    def max_request_pixels(self) -> int:
        """Pixels of all picture files of one request.

        A pixel takes up to 0.05 µs of a core (a JPEG of many scans, WebP with transparency), so a batch of eight such
        requests takes a minute: half of what TorchServe allows a worker.
        """
        return 10 * self.max_image_pixels

    @classmethod
    def of(
        cls, config: Mapping[str, Any], *, batch_size: int, max_response_bytes: int = STOCK_MAX_RESPONSE_BYTES
    ) -> Limits:
        """Read the archive's limits, and keep a whole batch of responses within what TorchServe may send.

        Args:
            config: The content of model-config.yaml.
            batch_size: Most requests in one call of the handler.
            max_response_bytes: TorchServe's `max_response_size`.
        """
        wanted = dict(config.get("convscope") or {})
        share = (max_response_bytes - _FRAME_BYTES) // max(1, batch_size)
        wanted["max_reply_bytes"] = min(int(wanted.get("max_reply_bytes", share)), share)
        return cls(**{name: int(value) for name, value in wanted.items()})

    def check_response(self, size: int) -> None:
        """Check the length of a response.

        Raises:
            ReplyTooLarge: The response has more than `max_reply_bytes`.
        """
        if size > self.max_reply_bytes:
            raise ReplyTooLarge(
                f"the reply would have {size:,} bytes, at most {self.max_reply_bytes:,} can be sent; ask for fewer "
                "layers or channels, for pool, for map_dtype uint8 or float16, or send fewer pictures in a request"
            )


def estimate_maps(
    layers: tuple[str, ...],
    published: Mapping[str, Layer],
    options: Options,
    media_type: str,
    scale: float = 1,
) -> int:
    """Return about how many bytes one picture's maps take in a response.

    Args:
        layers: Names of the maps asked for.
        published: The published layers.
        options: The request's options.
        media_type: The response's media type.
        scale: The picture's pixels relative to those of the layers' shapes.
    """
    cells = 0.0
    for name in layers:
        channels, *area = published[name].shape
        if isinstance(options.channels, int):
            channels = min(channels, options.channels)
        elif options.channels is not None:
            channels = min(channels, len(options.channels))
        whole = math.prod(area) * scale
        cells += channels * (whole if options.pool is None else min(whole, options.pool**2))
    size = int(cells * ITEM_BYTES[options.map_dtype])
    return size * 4 // 3 if media_type == media.JSON else size
