"""Feature maps, heat maps and pictures as pixels and as PNG files. Needs only numpy and the standard library."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["encode_png", "grey_tiles", "html_image", "render_heat", "tile_grid", "to_display_pixels"]

GAP_PX = 2  # Between the tiles of a grid.
MIN_TILE_PX = 64  # Smaller maps are enlarged by an integer factor, so that their cells are visible.
MIN_PICTURE_PX = 256  # Longer side; smaller pictures are enlarged by an integer factor.

COMPRESSION = 1  # Level of zlib, for pictures and arrays: level 6 takes two to four times as long and saves 5 %.

OVERLAY_OPACITY = 0.75  # Opacity of the strongest heat over the picture.
POSITIVE_COLOUR = (0.84, 0.05, 0.05)  # Red raises the class's score.
NEGATIVE_COLOUR = (0.05, 0.25, 0.84)  # Blue lowers it.


def grey_tiles(maps: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale each channel of a map to grey, from its minimum (black) to its maximum (white).

    Args:
        maps: (C, h, w), float32, any range.

    Returns:
        (C, h, w), uint8, 0..255. A channel with a single value is black, and so are values that are not finite.
    """
    finite = np.where(np.isfinite(maps), maps, np.nan).astype(np.float64)
    cells = finite.reshape(len(maps), -1)
    minimum, maximum = (extreme.reduce(cells, axis=1, initial=np.nan)[:, None, None] for extreme in (np.fmin, np.fmax))
    spread = np.where(maximum > minimum, maximum - minimum, np.inf)
    tiles: NDArray[np.uint8] = np.rint(np.nan_to_num((finite - minimum) / spread) * 255).astype(np.uint8)
    return tiles


def tile_grid(maps: NDArray[np.float32], *, columns: int = 8) -> NDArray[np.uint8]:
    """Arrange the channels of a map as rows of grey tiles, left to right, top to bottom.

    Args:
        maps: (C, h, w), float32, any range.
        columns: Tiles per row.

    Returns:
        (H, W), uint8, 0..255: the tiles, enlarged if they are small, on white.
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


def render_heat(
    heat: NDArray[np.float32],
    size: tuple[int, int],
    picture: NDArray[np.float32] | None,
    region: tuple[float, float, float, float] | None = None,
) -> NDArray[np.uint8]:
    """Draw a heat map over a picture, or on white: red raises the class's score, blue lowers it.

    Args:
        heat: (h, w), float32, any range.
        size: (H, W) that the heat is interpolated to.
        picture: (C, H, W), float32, 0..1, shown in grey; None for white.
        region: (top, left, bottom, right) of the part of the size that the heat covers; None for all of it.

    Returns:
        (H', W', 3), uint8, RGB 0..255: H and W enlarged if they are small. Where the heat is 0 the picture is
        unchanged; the strongest heat has the opacity `OVERLAY_OPACITY`.
    """
    flat = _interpolate(heat, size, region or (0, 0, *size))
    strength = np.abs(flat)
    strength = strength / max(strength.max(), np.finfo(np.float32).tiny)
    if picture is None:
        background = np.ones((*size, 1))
    else:
        background = np.clip(picture.mean(axis=0), 0, 1)[:, :, np.newaxis]
        strength = strength * OVERLAY_OPACITY
    colour = np.where(flat[:, :, np.newaxis] < 0, NEGATIVE_COLOUR, POSITIVE_COLOUR)
    return to_display_pixels(background + (colour - background) * strength[:, :, np.newaxis])


def _interpolate(
    heat: NDArray[np.float32], size: tuple[int, int], region: tuple[float, float, float, float]
) -> NDArray[np.float32]:
    """Interpolate (h, w) to a region of (H, W), bilinear between the centres of the cells; 0 around the region."""
    heat = np.nan_to_num(heat)
    top, left, bottom, right = region
    for length, first, end in zip(size, (top, left), (bottom, right), strict=True):  # Rows first; each pass transposes.
        centres = (np.arange(length) + 0.5 - first) * len(heat) / (end - first) - 0.5
        inside = (centres >= -0.5) & (centres <= len(heat) - 0.5)
        heat = np.stack([np.interp(centres, np.arange(len(heat)), column) * inside for column in heat.T])
    return heat.astype(np.float32)


def to_display_pixels(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Convert values in 0..1 to pixels for display.

    Args:
        values: (H, W, C), floating point; values outside 0..1 are clipped.

    Returns:
        (H', W', C), uint8, enlarged to at least 256 pixels on the longer side, by an integer factor.
    """
    factor = -(-MIN_PICTURE_PX // max(values.shape[:2]))  # At least 1: it is rounded up.
    pixels: NDArray[np.uint8] = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a picture as PNG.

    Args:
        pixels: (H, W) or (H, W, 1), grey, or (H, W, 3), RGB; uint8.

    Returns:
        The content of the file.
    """
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    unfiltered = np.zeros((height, rows.shape[1] + 1), np.uint8)  # PNG filter type 0 (none) precedes each row.
    unfiltered[:, 1:] = rows
    colour_type = 2 if rows.shape[1] == 3 * width and pixels.ndim == 3 else 0  # RGB or grey.
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)  # 8 bits, not interlaced.
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes(), COMPRESSION)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", zlib.crc32(chunk_type + data))
        for chunk_type, data in chunks
    )


def html_image(pixels: NDArray[np.uint8], alternative: str) -> str:
    """Return an HTML element that contains a picture.

    Args:
        pixels: (H, W) or (H, W, 3), uint8.
        alternative: The alternative text; it is escaped.

    Returns:
        An `img` element.
    """
    png = base64.b64encode(encode_png(pixels)).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{png}">'
