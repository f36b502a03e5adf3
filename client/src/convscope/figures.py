"""Figures of predictions and explanations. The only module that imports matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["NotebookFigure", "draw_explanation", "draw_map", "new_figure"]


class NotebookFigure(Figure):
    """A figure that a notebook shows although pyplot was not imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def new_figure(title: str, *, width_inches: float, height_inches: float) -> NotebookFigure:
    """Make an empty figure that is not registered with pyplot, and that a notebook shows nevertheless.

    Args:
        title: Stands above everything.
        width_inches: Width of the figure.
        height_inches: Height of the figure.

    Returns:
        The figure, with matplotlib's constrained layout.
    """
    figure = NotebookFigure(figsize=(width_inches, height_inches), layout="constrained")
    figure.suptitle(title)
    return figure


def draw_map(
    maps: NDArray[np.float32], channels: Sequence[int], *, title: str, columns: int, tile_inches: float
) -> NotebookFigure:
    """Draw a map as rows of grey tiles, each scaled to its own smallest and largest value.

    Args:
        maps: (C, h, w), float32, any range.
        channels: The number of each channel, which stands above its tile.
        title: Stands above everything.
        columns: Tiles in a row.
        tile_inches: Width of a tile.

    Returns:
        The figure.

    Raises:
        ValueError: The map has no height and width, or `columns` is below 1.
    """
    if maps.ndim != 3:
        raise ValueError("this map was pooled to one number a channel; ask without pool=1 to draw it")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    count, height, width = maps.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    tile_height = tile_inches * min(max(height / width, 0.25), 4.0) + 0.25  # The number above the tile takes 0.25.
    width_inches = max(columns * tile_inches, 0.12 * len(title))  # A map of one channel must not cut its title.
    figure = new_figure(title, width_inches=width_inches, height_inches=rows * tile_height + 0.4)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in places:
        place.set_axis_off()
    for place, tile, channel in zip(places, maps, channels, strict=False):
        place.imshow(tile, cmap="gray", interpolation="nearest")  # Scales to the tile's own range.
        place.set_title(str(channel), fontsize="small")
    return figure


def draw_explanation(
    picture: NDArray[np.float32], heat: NDArray[np.float32], overlay: NDArray[np.uint8], *, title: str
) -> NotebookFigure:
    """Draw a picture, its heat map with the scale, and the heat map over the picture, side by side.

    Args:
        picture: (C, H, W), 0..1; of three channels, or shown in grey.
        heat: (h, w), any range; white is 0, red is for and blue against the class.
        overlay: (H', W', 3).
        title: Stands above everything.

    Returns:
        The figure.
    """
    figure = new_figure(title, width_inches=9, height_inches=3.2)
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
