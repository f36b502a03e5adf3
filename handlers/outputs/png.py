"""PNG: a layer's channels as a grid of grey tiles, or an explanation over its picture.

In an explanation, red is evidence for the class and blue against it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.api.errors import BadRequest, RequestError
from handlers.api.options import Options
from handlers.outputs.response import Explanation, Result

NO_PNG = "image/png shows one layer of one picture, and no comparison; name exactly one in layers"

_TILE_PIXELS = 64  # A tile of the grid is enlarged by a whole factor to at least this.
_TILES_PER_ROW = 8
_LEAST_PIXELS = 256  # Longer side: smaller pictures are enlarged by a whole factor.
_OVERLAY = np.float32(0.75)  # How much of the picture the strongest heat hides.
_FOR = np.array([0.84, 0.05, 0.05], np.float32)
_AGAINST = np.array([0.05, 0.25, 0.84], np.float32)


def fits(pictures: Sequence[object], layers: Sequence[str], options: Options) -> bool:
    """Tell whether one PNG can show the response: one picture's explanation or layer, or its error.

    Args:
        pictures: Decoded pictures, or their errors.
        layers: Public names of the layers asked for.
        options: The request's options.
    """
    if len(pictures) != 1 or options.compare:
        return False
    is_one_layer = len(layers) == 1 and options.pool != 1
    return is_one_layer or options.explain is not None or isinstance(pictures[0], RequestError)


def encode(results: Sequence[Result | RequestError]) -> bytes:
    """Draw one layer of one picture as grey tiles, one per channel, each scaled by its own minimum and maximum.

    Draw the explanation instead if one was asked for.

    Raises:
        BadRequest: The response is not one picture with one layer of shape (C, h, w), or with an explanation.
    """
    result = results[0] if len(results) == 1 else None
    if isinstance(result, Result) and result.explanation is not None:
        return _draw(_painted(result.explanation))
    if not isinstance(result, Result) or len(result.maps) != 1:
        raise BadRequest(NO_PNG)
    cells = result.maps[0].cells.astype(np.float32)
    if cells.ndim != 3:
        raise BadRequest("image/png shows maps of shape (C, h, w); leave out pool, or ask for at least 2")
    return _draw(tile(cells))


def _draw(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _painted(explanation: Explanation) -> NDArray[np.uint8]:
    """Return an explanation as a picture (H, W, 3); it comes with the picture explained."""
    if explanation.picture is None:
        raise BadRequest("image/png shows an explanation over its picture, which is not there")
    picture = explanation.picture.values()
    size = picture.shape[1], picture.shape[2]
    if explanation.heat is None:
        return paint(None, size, picture)
    return paint(explanation.heat.values(), size, None if explanation.view == "heat" else picture)


def tile(cells: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay out maps as rows of grey tiles.

    Args:
        cells: (C, h, w), any range.

    Returns:
        Grey picture, uint8: up to eight tiles per row with one white pixel between, each enlarged by a whole factor.
    """
    count, height, width = cells.shape
    cells = cells.astype(np.float64)  # What is between two float32 may be more than float32 holds.
    least = cells.min(axis=(1, 2), keepdims=True)
    span = cells.max(axis=(1, 2), keepdims=True) - least
    grey = np.rint((cells - least) / np.where(span > 0, span, 1) * 255).astype(np.uint8)
    factor = max(1, -(-_TILE_PIXELS // max(height, width)))
    grey = grey.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = min(count, _TILES_PER_ROW)
    rows = -(-count // columns)
    step_y, step_x = height * factor + 1, width * factor + 1
    grid = np.full((rows * step_y - 1, columns * step_x - 1), 255, np.uint8)
    for number in range(count):
        y, x = number // columns * step_y, number % columns * step_x
        grid[y : y + step_y - 1, x : x + step_x - 1] = grey[number]
    return grid


def paint(
    heat: NDArray[np.float32] | None, size: tuple[int, int], picture: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Lay heat over a picture, or over white.

    Args:
        heat: (C, h, w), any range. Several channels are summed. None for no heat.
        size: (H, W) that the heat is stretched to, bilinear.
        picture: (C, H, W) in 0..1, shown in grey; None for white.

    Returns:
        (H', W', 3), uint8: H and W enlarged. A pixel without heat shows the picture as it is, a pixel with the
        strongest heat its colour.
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
