"""Resizing without torch: its bilinear filter of bytes, to the level, and filters without antialiasing.

Axes: `H, W` picture pixels, `C` channels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.uint8]
Values = NDArray[Any]

_MOST_BITS = 22  # Bits of a weight's fraction, as in torch.
_ROWS = 64  # Rows at a time, so that sums stay in the processor's cache.


def bilinear(picture: Levels, size: tuple[int, int]) -> Levels:
    """Resize bytes with the antialiased bilinear filter, in the integers that torch computes with.

    From torch's `aten/src/ATen/native/cpu/UpSampleKernel.cpp`: first across, then down, with levels in between; weights
    are int16, with as many bits of fraction as the largest of them leaves.

    Args:
        picture: (H, W, C).
        size: (H, W) wanted.

    Returns:
        (H, W, C) of that size: equal to `torch.nn.functional.interpolate` in every level.
    """
    if picture.shape[1] != size[1]:
        rows = range(0, picture.shape[0], _ROWS)
        picture = np.concatenate([_across(picture[row : row + _ROWS], size[1]) for row in rows])
    if picture.shape[0] != size[0]:
        picture = _across(picture.swapaxes(0, 1), size[0]).swapaxes(0, 1)
    return np.ascontiguousarray(picture)


def _across(picture: Levels, width: int) -> Levels:
    first, weights, bits = _integer_weights(picture.shape[1], width)
    total = np.full((picture.shape[0], width, picture.shape[2]), 1 << (bits - 1), np.int32)
    for tap in range(weights.shape[1]):
        pixels = np.take(picture, first + tap, axis=1, mode="clip")  # Beyond the edge, the weight is 0.
        total += pixels * weights[:, tap, None]
    levels: Levels = np.clip(total >> bits, 0, 255).astype(np.uint8)
    return levels


@lru_cache(maxsize=64)
def _integer_weights(before: int, after: int) -> tuple[NDArray[np.intp], NDArray[np.int32], int]:
    """Return, for each pixel after, the first pixel that counts and the weights from there on; and bits of fraction."""
    scale = before / after
    reach = max(scale, 1.0)
    centers = scale * (np.arange(after) + 0.5)
    first = np.maximum((centers - reach + 0.5).astype(np.intp), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.intp), before)
    places = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1 - np.abs((places - centers[:, None] + 0.5) / reach), 0) * (places < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < _MOST_BITS and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return first, (0.5 + weights * (1 << bits)).astype(np.int32), bits


def without_antialiasing(picture: Values, size: tuple[int, int], interpolation: str) -> Values:
    """Resize bilinear or bicubic with a filter that does not widen, as torch's `align_corners=False` places it.

    Args:
        picture: (H, W, C), uint8 or float32.
        size: (H, W) wanted.
        interpolation: `bilinear` or `bicubic`; the latter is Keys's, with a = -0.75, as in torch.

    Returns:
        (H, W, C) of that size, in the same dtype; bytes are rounded.
    """
    values = picture.astype(np.float32)
    for axis in (1, 0):
        if picture.shape[axis] != size[axis]:
            values = _sample(values, axis, size[axis], interpolation)
    if picture.dtype == np.uint8:
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return values.astype(picture.dtype)


def _sample(values: Values, axis: int, after: int, interpolation: str) -> Values:
    before = values.shape[axis]
    scale = np.float64(np.float32(before) / np.float32(after))  # torch's float32; it then rounds once.
    places = (scale * (np.arange(after) + 0.5) - 0.5).astype(np.float32)
    if interpolation == "bilinear":
        places = np.maximum(places, 0)
    first = np.floor(places).astype(np.intp)
    t = (places - np.floor(places)).astype(np.float32)
    taps = {0: 1 - t, 1: t}
    if interpolation == "bicubic":
        taps = {-1: _outer(t + 1), 0: _inner(t), 1: _inner(1 - t), 2: _outer(2 - t)}
    shape = (-1, 1, 1) if axis == 0 else (-1, 1)
    parts = [np.take(values, first + tap, axis=axis, mode="clip") * w.reshape(shape) for tap, w in taps.items()]
    return np.asarray(np.add.reduce(parts))


_KEYS = -0.75


def _inner(x: Values) -> Values:
    """Keys's kernel, for 0 <= x <= 1."""
    return ((_KEYS + 2) * x - (_KEYS + 3)) * x * x + 1


def _outer(x: Values) -> Values:
    """Keys's kernel, for 1 < x < 2."""
    return ((_KEYS * x - 5 * _KEYS) * x + 8 * _KEYS) * x - 4 * _KEYS
