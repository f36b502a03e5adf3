"""Feature maps, heat maps and pictures as pixels and as PNG files. Needs only numpy and the standard library."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["encode_png", "grey_tiles", "paint_heat", "tile_grid", "to_pixels"]

GAP_PX = 2  # Between the tiles of a grid.
MIN_TILE_PX = 64  # Smaller maps are enlarged by a whole factor, so that their cells can be seen.
MIN_PICTURE_PX = 256  # Of the longer side: smaller pictures are enlarged by a whole factor.

OVERLAY = 0.75  # How much of the picture the strongest heat hides.
FOR = (0.84, 0.05, 0.05)  # Red: this place speaks for the class.
AGAINST = (0.05, 0.25, 0.84)  # Blue: against it.


def grey_tiles(maps: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale each channel of a map to grey by its own smallest and largest value.

    Args:
        maps: (C, h, w), float32, any range.

    Returns:
        (C, h, w), uint8: 0 for a channel's smallest value, 255 for its largest. A channel with a single value is
        black, and so are values that are not finite.
    """
    finite = np.where(np.isfinite(maps), maps, np.nan).astype(np.float64)
    tiles = np.zeros(maps.shape, np.uint8)
    for tile, channel in zip(tiles, finite, strict=True):
        if np.isnan(channel).all():
            continue
        smallest, largest = np.nanmin(channel), np.nanmax(channel)
        if largest > smallest:
            tile[:] = np.rint(np.nan_to_num((channel - smallest) / (largest - smallest)) * 255)
    return tiles


def tile_grid(maps: NDArray[np.float32], *, columns: int = 8) -> NDArray[np.uint8]:
    """Lay the channels of a map out as rows of grey tiles, left to right, top to bottom.

    Args:
        maps: (C, h, w), float32, any range.
        columns: Tiles in a row.

    Returns:
        (H, W), uint8: the tiles, enlarged if they are small, on white.
    """
    tiles = grey_tiles(maps)
    zoom = max(1, -(-MIN_TILE_PX // max(maps.shape[1:])))
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.full((rows * (height + GAP_PX) + GAP_PX, columns * (width + GAP_PX) + GAP_PX), 255, np.uint8)
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        top, left = GAP_PX + row * (height + GAP_PX), GAP_PX + column * (width + GAP_PX)
        grid[top : top + height, left : left + width] = tile
    return grid


def paint_heat(
    heat: NDArray[np.float32], size: tuple[int, int], picture: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Paint a heat map over a picture, or over white: red speaks for the class, blue against it.

    Args:
        heat: (h, w), any range.
        size: (H, W) that the heat is stretched to.
        picture: (C, H, W) in 0..1, shown in grey; None for white.

    Returns:
        (H', W', 3), uint8: H and W enlarged if they are small. A place without heat shows the picture unchanged, the
        place with the strongest heat is almost wholly red or blue.
    """
    flat = _stretch(heat, size)
    strength = np.abs(flat)
    strength = strength / max(strength.max(), np.finfo(np.float32).tiny)
    if picture is None:
        ground = np.ones((*size, 1))
    else:
        ground = np.clip(picture.mean(axis=0), 0, 1)[:, :, np.newaxis]
        strength = strength * OVERLAY
    colour = np.where(flat[:, :, np.newaxis] < 0, AGAINST, FOR)
    return to_pixels(ground + (colour - ground) * strength[:, :, np.newaxis])


def _stretch(heat: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Stretch (h, w) to (H, W), bilinear between the centres of the cells."""
    heat = np.nan_to_num(heat)
    for length in size:  # Rows first; each pass transposes.
        centres = (np.arange(length) + 0.5) * len(heat) / length - 0.5
        heat = np.stack([np.interp(centres, np.arange(len(heat)), column) for column in heat.T])
    return heat.astype(np.float32)


def to_pixels(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Turn values in 0..1 into a picture that is large enough to look at.

    Args:
        values: (H, W, C); values outside 0..1 are clipped.

    Returns:
        (H', W', C), uint8: enlarged by a whole factor where the longer side is below 256.
    """
    factor = max(1, -(-MIN_PICTURE_PX // max(values.shape[:2])))
    pixels: NDArray[np.uint8] = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a picture as PNG.

    Args:
        pixels: (H, W) or (H, W, 1), grey, or (H, W, 3), RGB; uint8.

    Returns:
        The bytes of the file.
    """
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    unfiltered = np.zeros((height, rows.shape[1] + 1), np.uint8)  # The first byte of a row names its filter: 0, none.
    unfiltered[:, 1:] = rows
    kind = 2 if rows.shape[1] == 3 * width and pixels.ndim == 3 else 0  # RGB or grey.
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)  # 8 bits, not interlaced.
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
