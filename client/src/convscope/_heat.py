"""Heat maps as pictures. Red speaks for the class, blue against it. Needs numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_PX = 256  # Of the longer side: smaller pictures are enlarged by a whole factor.
OVERLAY = 0.75  # How much of the picture the strongest heat hides.
FOR = (0.84, 0.05, 0.05)
AGAINST = (0.05, 0.25, 0.84)


def paint_heat(
    heat: NDArray[np.float32], size: tuple[int, int], picture: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Lay heat over a picture, or over white.

    Args:
        heat: (h, w), any range.
        size: (H, W) that the heat is stretched to.
        picture: (C, H, W) in 0..1, shown in grey; None for white.

    Returns:
        (H', W', 3), uint8: H and W enlarged if small. A place without heat shows the picture as it is, one with the
        strongest heat its colour.
    """
    flat = stretch_heat(heat, size)
    strength = np.abs(flat)
    strength = strength / max(strength.max(), np.finfo(np.float32).tiny)
    if picture is None:
        ground = np.ones((*size, 1))
    else:
        ground = np.clip(picture.mean(axis=0), 0, 1)[:, :, np.newaxis]
        strength = strength * OVERLAY
    colour = np.where(flat[:, :, np.newaxis] < 0, AGAINST, FOR)
    return enlarge(ground + (colour - ground) * strength[:, :, np.newaxis])


def stretch_heat(heat: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Stretch a heat map, bilinear between the middles of its cells.

    Args:
        heat: (h, w).
        size: (H, W).

    Returns:
        (H, W), float32.
    """
    heat = np.nan_to_num(heat)
    for length in size:  # Rows first; each pass turns the picture.
        middles = (np.arange(length) + 0.5) * len(heat) / length - 0.5
        heat = np.stack([np.interp(middles, np.arange(len(heat)), column) for column in heat.T])
    return heat.astype(np.float32)


def enlarge(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Turn values in 0..1 into pixels that a person can see.

    Args:
        values: (H, W, C); what is outside 0..1 is cut off.

    Returns:
        (H', W', C), uint8: enlarged by a whole factor where the longer side is below 256.
    """
    factor = max(1, -(-LEAST_PX // max(values.shape[:2])))
    pixels: NDArray[np.uint8] = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
