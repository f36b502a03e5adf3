"""Feature maps: choosing channels, pooling, and the cells they travel as.

It knows tensors and nothing of requests or formats. Axes: `C` channels, `h, w` map cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from handlers.errors import BadImage, BadRequest
from handlers.options import Options


@dataclass(frozen=True)
class FeatureMap:
    """One layer's map of one picture, ready to travel.

    Attributes:
        layer: Public name.
        cells: (C, h, w), (C, p, p) when pooled to p × p, (C,) when p = 1; float32, float16 or uint8; C-contiguous.
        scale: uint8 only: float32 (C,); value = offset[c] + scale[c] · cell.
        offset: uint8 only: float32 (C,).
        channels: Which channels these are, when a selection was asked for.
    """

    layer: str
    cells: NDArray[Any]
    scale: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None
    channels: tuple[int, ...] | None = None

    @property
    def dtype(self) -> str:
        """`float32`, `float16` or `uint8`."""
        return str(self.cells.dtype)


def prepare(layer: str, values: Tensor, options: Options) -> FeatureMap:
    """Turn one picture's map into what was asked for.

    Args:
        layer: Public name.
        values: (C, h, w), float32, on the CPU. Another shape passes as it is, unless an option needs channels.
        options: The caller's.

    Raises:
        BadRequest: An option does not fit this map.
        BadImage: The map holds values that the asked-for dtype cannot carry.
    """
    chosen: tuple[int, ...] | None = None
    if options.channels is not None:
        _need_channels(layer, values, "channels")
        chosen = _choose(layer, values, options.channels)
        values = values[list(chosen)]
    if options.pool is not None:
        _need_channels(layer, values, "pool")
        values = _pool(layer, values, options.pool)
    if options.map_dtype == "uint8":
        cells, scale, offset = _quantise(layer, values)
        return FeatureMap(layer, cells, scale, offset, chosen)
    if options.map_dtype == "float16":
        values = values.half()
        if not torch.isfinite(values).all():
            raise BadImage(f"the map of {layer} holds values beyond float16's ±65504; ask for float32")
    return FeatureMap(layer, values.contiguous().numpy(), channels=chosen)


def _need_channels(layer: str, values: Tensor, option: str) -> None:
    if values.ndim != 3:
        raise BadRequest(f"{option} needs a map of shape (C, h, w); {layer} has {tuple(values.shape)}")


def _choose(layer: str, values: Tensor, channels: tuple[int, ...] | int) -> tuple[int, ...]:
    """Return the indexes of the channels asked for: as listed, or the n of largest mean activation."""
    count = values.shape[0]
    if isinstance(channels, int):
        strongest = values.mean(dim=(1, 2)).sort(descending=True, stable=True).indices
        return tuple(strongest[:channels].tolist())
    if max(channels) >= count:
        raise BadRequest(f"layer {layer} has channels 0 to {count - 1}, not {max(channels)}")
    return channels


def _pool(layer: str, values: Tensor, pool: int) -> Tensor:
    """Average (C, h, w) down to (C, pool, pool), or (C,) for 1, as torch's adaptive average pooling cuts it."""
    height, width = values.shape[1:]
    if pool > min(height, width):
        raise BadRequest(f"pool is {pool}, but the map of {layer} has only {height}×{width} cells")
    pooled = functional.adaptive_avg_pool2d(values, pool)
    return pooled[:, 0, 0] if pool == 1 else pooled


def _quantise(layer: str, values: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Map each channel's own range onto 0..255; the error of a cell is at most half a step, scale[c] / 2."""
    flat = values.reshape(values.shape[0], -1)
    offset, largest = flat.aminmax(dim=1)
    scale = (largest - offset) / 255
    if not torch.isfinite(scale).all():
        raise BadImage(f"the map of {layer} holds values that are not finite; uint8 cannot carry them")
    step = torch.where(scale > 0, scale, 1)  # A constant channel is its offset.
    cells = ((flat - offset[:, None]) / step[:, None]).round_().clamp_(0, 255).to(torch.uint8)
    return cells.reshape(values.shape).numpy(), scale.numpy(), offset.numpy()
