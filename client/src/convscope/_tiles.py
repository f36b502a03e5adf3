"""Grey tiles: feature maps as pictures, and pictures as PNG files. Needs numpy and the standard library only."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

GAP_PX = 2
LEAST_TILE_PX = 64  # Smaller maps are enlarged, by whole numbers, so that a person sees their cells.


def grey_tiles(cells: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale each channel of a map to grey by its own least and greatest value.

    Args:
        cells: (C, h, w), float32, any range.

    Returns:
        (C, h, w), uint8: 0 for a channel's least value, 255 for its greatest; a channel of one value is black, and so
        are values that are not finite.
    """
    finite = np.where(np.isfinite(cells), cells, np.nan).astype(np.float64)
    tiles = np.zeros(cells.shape, np.uint8)
    for tile, channel in zip(tiles, finite, strict=True):
        if np.isnan(channel).all():
            continue
        least, greatest = np.nanmin(channel), np.nanmax(channel)
        if greatest > least:
            tile[:] = np.rint(np.nan_to_num((channel - least) / (greatest - least)) * 255)
    return tiles


def tile_grid(cells: NDArray[np.float32], *, columns: int = 8) -> NDArray[np.uint8]:
    """Lay a map's channels out as rows of grey tiles, left to right, top to bottom.

    Args:
        cells: (C, h, w), float32, any range.
        columns: Tiles in a row.

    Returns:
        (H, W), uint8: the tiles, enlarged if small, on white.
    """
    tiles = grey_tiles(cells)
    zoom = max(1, -(-LEAST_TILE_PX // max(cells.shape[1:])))
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


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a picture as PNG.

    Args:
        pixels: (H, W) or (H, W, 1), grey, or (H, W, 3), red, green and blue; uint8.

    Returns:
        The file's bytes.
    """
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    unfiltered = np.zeros((height, rows.shape[1] + 1), np.uint8)  # A row's first byte names its filter: 0, none.
    unfiltered[:, 1:] = rows
    kind = 2 if rows.shape[1] == 3 * width and pixels.ndim == 3 else 0  # Colour or grey.
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)  # 8 bits, not interlaced.
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
