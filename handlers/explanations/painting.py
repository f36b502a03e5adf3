"""Painting: a heat map as a picture that a person can read. Red speaks for the class, blue against it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LEAST_PIXELS = 256  # Of the longer side: smaller pictures are enlarged by a whole factor.
_OVERLAY = np.float32(0.75)  # How much of the picture the strongest heat hides.
_FOR = np.array([0.84, 0.05, 0.05], np.float32)
_AGAINST = np.array([0.05, 0.25, 0.84], np.float32)


def paint(
    heat: NDArray[np.float32] | None, size: tuple[int, int], picture: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Lay heat over a picture, or over white.

    Args:
        heat: (C, h, w), any range. Of several channels each place shows the sum. None for no heat anywhere.
        size: (H, W) that the heat is stretched to, bilinear.
        picture: (C, H, W) in 0..1, shown in grey; None for white.

    Returns:
        (H', W', 3), uint8: H and W enlarged. A place without heat shows the picture as it is, one with the strongest
        heat its colour.
    """
    if picture is None:
        painted = np.ones((*size, 1), np.float32)
    else:
        painted = np.clip(picture.mean(axis=0), 0, 1)[:, :, np.newaxis].astype(np.float32)
    if heat is not None:
        flat = stretch(np.nan_to_num(heat.sum(axis=0)), size)[:, :, np.newaxis]  # (H, W, 1)
        strength = np.abs(flat)
        strength = strength / max(strength.max(), np.finfo(np.float32).tiny)
        if picture is not None:
            strength = strength * _OVERLAY
        painted = painted + (np.where(flat < 0, _AGAINST, _FOR) - painted) * strength
    factor = max(1, -(-_LEAST_PIXELS // max(size)))
    cells: NDArray[np.uint8] = np.rint(painted * 255).astype(np.uint8)
    cells = cells.repeat(factor, axis=0).repeat(factor, axis=1)
    return cells.repeat(3 // cells.shape[2], axis=2)


def stretch(heat: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Stretch a heat map, bilinear between the middles of its cells.

    Args:
        heat: (h, w).
        size: (H, W).

    Returns:
        (H, W), float32.
    """
    for length in size:  # Rows first; each pass turns the picture.
        middles = np.clip((np.arange(length) + 0.5) * len(heat) / length - 0.5, 0, len(heat) - 1)
        before = middles.astype(np.int64)
        after = np.minimum(before + 1, len(heat) - 1)
        share = (middles - before)[:, np.newaxis]
        heat = (heat[before] * (1 - share) + heat[after] * share).T.astype(np.float32)
    return heat
