"""Feature maps: choosing channels, pooling, and converting to the type that is sent.

Encoding is done elsewhere. Axes: `N` batch, `C` channels, `h, w` map cells.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from handlers import optional_torch
from handlers.api.errors import BadImage, BadRequest
from handlers.api.options import Options
from handlers.network.engines import Cells

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {np.dtype(name): name for name in ("float32", "float16", "uint8")}  # numpy takes 4 µs to spell one.
_LEAST_SCALE = np.finfo(np.float32).tiny  # The least number with all its digits.
_HALF_MAGNITUDE = np.uint16(0x7FFF)  # float16's bits without the sign.
_HALF_INFINITY = np.uint16(0x7C00)  # Anything above is NaN.


@dataclass(frozen=True)
class FeatureMap:
    """One layer's map of one picture, ready to be sent.

    Attributes:
        layer: Public name.
        cells: (C, h, w), (C, p, p) when pooled to p × p, (C,) when p = 1; float32, float16 or uint8; C-contiguous.
        scale: uint8 only: float32 (C,); value = offset[c] + scale[c] · cell.
        offset: uint8 only: float32 (C,).
        channels: Indexes of these channels, if a selection was asked for.
    """

    layer: str
    cells: NDArray[Any]
    scale: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None
    channels: tuple[int, ...] | None = None

    @property
    def dtype(self) -> str:
        """`float32`, `float16` or `uint8`."""
        return _NAMES[self.cells.dtype]

    def values(self) -> NDArray[np.float32]:
        """Return the values of the cells, float32."""
        if self.scale is None or self.offset is None:
            return self.cells.astype(np.float32)
        shape = (-1, *(1 for _ in self.cells.shape[1:]))  # (C, 1, 1)
        values: NDArray[np.float32] = self.offset.reshape(shape) + self.scale.reshape(shape) * self.cells
        return values


def cell_bytes(cells: NDArray[Any]) -> memoryview:
    """Return numbers as bytes, little-endian and in C order."""
    cells = np.ascontiguousarray(cells)
    if sys.byteorder == "big":
        cells = cells.astype(cells.dtype.newbyteorder("<"))
    return cells.reshape(-1).view(np.uint8).data


def prepare(layer: str, values: Cells, options: Options) -> list[FeatureMap | BadImage]:
    """Convert the maps of several pictures to the type and cells asked for, all at once.

    Args:
        layer: Public name.
        values: (N, C, h, w), float32, contiguous, an array, or a tensor on any device. Maps of another shape are
            returned as they are, unless an option needs channels.
        options: The options of all N pictures.

    Returns:
        For each picture its map, or an error if the dtype cannot hold that map's values. Cells of unconverted maps are
        a view of `values`.

    Raises:
        BadRequest: An option does not fit these maps.
    """
    chosen: Sequence[tuple[int, ...] | None] = [None] * len(values)
    if options.channels is not None:
        _need_channels(layer, values, "channels")
        values, chosen = _choose(layer, values, options.channels)
    if options.pool is not None:
        _need_channels(layer, values, "pool")
        values = _pool(layer, values, options.pool)
    if options.map_dtype == "float16":
        values = _half(values)
    if options.map_dtype == "uint8":
        if not isinstance(values, np.ndarray):
            import torch

            whole, scales, offsets = quantise_in_torch(values)
            both = torch.stack([scales, offsets]).cpu().numpy()
            return _bytes(layer, to_host(whole).numpy(), both[0], both[1], chosen)
        return _bytes(layer, *quantise(_array(values)), chosen)
    cells = _array(values)
    found = [FeatureMap(layer, item, channels=selected) for item, selected in zip(cells, chosen, strict=True)]
    if options.map_dtype == "float16":
        bits = cells.reshape(len(cells), -1).view(np.uint16)
        carried = (bits & _HALF_MAGNITUDE).max(axis=1) < _HALF_INFINITY
        return _carried(found, carried, f"the map of {layer} holds values beyond float16's ±65504; ask for float32")
    return list(found)


def _half(values: Cells) -> Cells:
    """Return the values as float16: in torch where it is imported, twenty times as fast as numpy."""
    if not isinstance(values, np.ndarray):
        return values.half()
    torch = optional_torch.imported()
    if torch is None:
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    found: Cells = torch.from_numpy(values).half().numpy()
    return found


def _array(values: Cells) -> NDArray[Any]:
    return values if isinstance(values, np.ndarray) else to_host(values.contiguous()).numpy()


def _carried(found: list[FeatureMap], carried: NDArray[np.bool_], failure: str) -> list[FeatureMap | BadImage]:
    return [item if fine else BadImage(failure) for item, fine in zip(found, carried.tolist(), strict=True)]


def _need_channels(layer: str, values: Cells, option: str) -> None:
    if values.ndim != 4:
        raise BadRequest(f"{option} needs a map of shape (C, h, w); {layer} has {tuple(values.shape[1:])}")


def _choose(layer: str, values: Cells, channels: tuple[int, ...] | int) -> tuple[Cells, list[tuple[int, ...]]]:
    """Return the channels asked for, as listed or the n of largest mean activation, and each picture's indexes."""
    count = values.shape[1]
    if not isinstance(channels, int):
        if max(channels) >= count:
            raise BadRequest(f"layer {layer} has channels 0 to {count - 1}, not {max(channels)}")
        indexes = list(channels)
        picked = values.take(indexes, axis=1) if isinstance(values, np.ndarray) else values[:, indexes]
        return picked, [channels] * len(values)
    if isinstance(values, np.ndarray):
        means = values.reshape(*values.shape[:2], -1).mean(axis=2)
        best = np.argsort(-means, axis=1, kind="stable")[:, :channels]
        return values[np.arange(len(values))[:, None], best], [tuple(one) for one in best.tolist()]
    import torch

    order = values.mean(dim=(2, 3)).sort(dim=1, descending=True, stable=True).indices[:, :channels]
    picked = values[torch.arange(len(values), device=values.device)[:, None], order]
    return picked, [tuple(one) for one in order.tolist()]


def _pool(layer: str, values: Cells, pool: int) -> Cells:
    """Average (N, C, h, w) down to (N, C, pool, pool), or (N, C) for 1, as torch's adaptive average pooling cuts it."""
    height, width = values.shape[2:]
    if pool > min(height, width):
        raise BadRequest(f"pool is {pool}, but the map of {layer} has only {height}×{width} cells")
    if isinstance(values, np.ndarray):
        return average(values, pool)
    from torch.nn import functional

    pooled = functional.adaptive_avg_pool2d(values, pool)
    return pooled[:, :, 0, 0] if pool == 1 else pooled


def average(values: NDArray[np.float32], pool: int) -> NDArray[np.float32]:
    """Average the cells of maps, each way in `pool` parts that overlap by a cell where the sizes do not divide.

    Args:
        values: (N, C, h, w), float32.
        pool: At most h and w.

    Returns:
        (N, C, pool, pool), or (N, C) for 1, float32.
    """
    if pool == 1:
        mean: NDArray[np.float32] = values.reshape(*values.shape[:2], -1).mean(axis=2)
        return mean
    for axis in (2, 3):
        size = values.shape[axis]
        parts = [slice(part * size // pool, -(-(part + 1) * size // pool)) for part in range(pool)]
        cut = [values[:, :, part] if axis == 2 else values[..., part] for part in parts]
        values = np.stack([one.mean(axis=axis) for one in cut], axis=axis)
    return values


def to_host(values: Tensor) -> Tensor:
    """Return a tensor on the CPU, itself if it is there; from a GPU through pinned memory, which copies faster."""
    if values.device.type != "cuda":
        return values.cpu()
    import torch

    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # Not yet run on a GPU.
    return host.copy_(values)


def quantise(cells: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Map each channel's own range onto 0..255; the error of a cell is at most half a step, scale[c] / 2.

    Args:
        cells: (N, C, h, w) or (N, C), float32, C-contiguous.

    Returns:
        Steps of the shape of `cells`, uint8; scale and offset, each (N, C), float32. A channel with values that are
        not finite has a scale that is not.
    """
    flat = cells.reshape(*cells.shape[:2], -1)  # (N, C, h·w)
    offset = flat.min(axis=2, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = flat.max(axis=2, keepdims=True)
        scale -= offset
        scale /= np.float32(255)
        # A constant channel is its offset at any scale but 0. A scale below this has fewer digits, and might leave the
        # largest cell beyond 255.
        np.maximum(scale, _LEAST_SCALE, out=scale)
        steps = flat - offset
        steps /= scale
        whole = np.rint(steps, out=steps).astype(np.uint8).reshape(cells.shape)
    return whole, scale[:, :, 0], offset[:, :, 0]


def quantise_in_torch(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise as `quantise` does, on the device of the values, so that bytes and not floats are copied from it.

    Every operation is numpy's in float32, in its order: the results are the same.

    Args:
        values: (N, C, h, w) or (N, C), float32.

    Returns:
        As for `quantise`, on the device.
    """
    import torch

    flat = values.reshape(*values.shape[:2], -1)  # (N, C, h·w)
    offset = flat.amin(dim=2)
    # A tensor, as CUDA divides by a number by multiplying with its inverse, which rounds otherwise.
    scale = ((flat.amax(dim=2) - offset) / flat.new_full((1,), 255.0)).clamp_(min=float(_LEAST_SCALE))
    steps = (flat - offset[:, :, None]).div_(scale[:, :, None])
    whole = steps.round_().to(torch.uint8)
    return whole.reshape(values.shape), scale, offset


def _bytes(
    layer: str,
    whole: NDArray[np.uint8],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    chosen: Sequence[tuple[int, ...] | None],
) -> list[FeatureMap | BadImage]:
    found = [FeatureMap(layer, *item) for item in zip(whole, scale, offset, chosen, strict=True)]
    failure = f"the map of {layer} holds values that are not finite; uint8 cannot carry them"
    return _carried(found, np.asarray(np.isfinite(scale).all(axis=1)), failure)
