"""A layer's map, or an explanation, as a matplotlib figure. The only module that knows matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class MapFigure(Figure):
    """A figure that a notebook shows without pyplot having been imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def draw_map(
    cells: NDArray[np.float32], channels: Sequence[int], *, title: str, columns: int, tile_inches: float
) -> Figure:
    """Draw a map as rows of grey tiles, each scaled to its own least and greatest value.

    Args:
        cells: (C, h, w), float32, any range.
        channels: The number of each channel, to stand above its tile.
        title: Stands above all.
        columns: Tiles in a row.
        tile_inches: Width of a tile.

    Returns:
        The figure.

    Raises:
        ValueError: The map has no height and width, or `columns` is below 1.
    """
    if cells.ndim != 3:
        raise ValueError("this map was pooled to one number a channel; ask without pool=1 to draw it")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    count, height, width = cells.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    tile_height = tile_inches * min(max(height / width, 0.25), 4.0) + 0.25  # Room for the number above.
    width_inches = max(columns * tile_inches, 0.12 * len(title))  # A map of one channel must not cut its title.
    figure = MapFigure(figsize=(width_inches, rows * tile_height + 0.4), layout="constrained")
    figure.suptitle(title)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in places:
        place.set_axis_off()
    for place, tile, channel in zip(places, cells, channels, strict=False):
        place.imshow(tile, cmap="gray", interpolation="nearest")  # Scales to the tile's own range by itself.
        place.set_title(str(channel), fontsize="small")
    return figure


def draw_explanation(
    picture: NDArray[np.float32], heat: NDArray[np.float32], overlay: NDArray[np.uint8], *, title: str
) -> Figure:
    """Draw a picture, its heat map with the scale, and both in one, side by side.

    Args:
        picture: (C, H, W), 0..1; grey, or of three channels.
        heat: (h, w), any range; white is nothing, red is for and blue against.
        overlay: (H', W', 3).
        title: Stands above all.

    Returns:
        The figure.
    """
    figure = MapFigure(figsize=(9, 3.2), layout="constrained")
    figure.suptitle(title)
    places = figure.subplots(1, 3)
    for place in places:
        place.set_axis_off()
    shown = np.clip(picture, 0, 1)
    colour = {"X": shown.transpose(1, 2, 0)} if len(shown) == 3 else {"X": shown.mean(axis=0), "cmap": "gray"}
    places[0].imshow(**colour, interpolation="nearest")
    most = float(np.abs(heat).max()) or 1.0
    drawn = places[1].imshow(heat, cmap="bwr", vmin=-most, vmax=most, interpolation="nearest")
    figure.colorbar(drawn, ax=places[1], shrink=0.8)
    places[2].imshow(overlay, interpolation="nearest")
    return figure
