"""Figures of predictions and explanations. Only this module imports matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("figure() requires matplotlib: pip install 'convscope[figure]'") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["NotebookFigure", "draw_explanation", "draw_map", "new_figure"]


class NotebookFigure(Figure):
    """A figure that notebooks display without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def new_figure(title: str, *, width_inches: float, height_inches: float) -> NotebookFigure:
    """Create an empty figure that notebooks display without pyplot.

    Args:
        title: Title of the figure.
        width_inches: Width of the figure.
        height_inches: Height of the figure.

    Returns:
        The figure, with matplotlib's constrained layout.
    """
    figure = NotebookFigure(figsize=(width_inches, height_inches), layout="constrained")
    figure.suptitle(title)
    return figure


def draw_map(
    feature_map: NDArray[np.float32], channels: Sequence[int], *, title: str, columns: int, tile_inches: float
) -> NotebookFigure:
    """Draw a map as rows of grey tiles, each scaled from its minimum (black) to its maximum (white).

    Args:
        feature_map: (C, h, w), float32, any range.
        channels: The index of each channel, the title of its tile.
        title: Title of the figure.
        columns: Tiles per row.
        tile_inches: Width of a tile.

    Returns:
        The figure.

    Raises:
        ValueError: The map has no height and width, or `columns` is below 1.
    """
    if feature_map.ndim != 3:
        raise ValueError("this map was pooled to one number per channel; request it without pool=1 to draw it")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    count, height, width = feature_map.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    tile_height = tile_inches * min(max(height / width, 0.25), 4.0) + 0.25  # 0.25 for the title of the tile.
    width_inches = max(columns * tile_inches, 0.12 * len(title))  # Wide enough for the title.
    figure = new_figure(title, width_inches=width_inches, height_inches=rows * tile_height + 0.4)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    for ax, tile, channel in zip(axes, feature_map, channels, strict=False):
        ax.imshow(tile, cmap="gray", interpolation="nearest")  # Scales to the tile's own range.
        ax.set_title(str(channel), fontsize="small")
    return figure


def draw_explanation(
    picture: NDArray[np.float32], heat: NDArray[np.float32], overlay: NDArray[np.uint8], *, title: str
) -> NotebookFigure:
    """Draw a picture, its heat map with the scale, and the heat map over the picture, side by side.

    Args:
        picture: (C, H, W), float32, 0..1; shown in colour if C is 3, else in grey.
        heat: (h, w), float32, any range; red raises the class's score, blue lowers it, white is 0.
        overlay: (H', W', 3), uint8, RGB 0..255.
        title: Title of the figure.

    Returns:
        The figure.
    """
    figure = new_figure(title, width_inches=9, height_inches=3.2)
    axes = figure.subplots(1, 3)
    for ax in axes:
        ax.set_axis_off()
    clipped = np.clip(picture, 0, 1)
    colour = {"X": clipped.transpose(1, 2, 0)} if len(clipped) == 3 else {"X": clipped.mean(axis=0), "cmap": "gray"}
    axes[0].imshow(**colour, interpolation="nearest")
    maximum = float(np.abs(heat).max()) or 1.0
    heat_image = axes[1].imshow(heat, cmap="bwr", vmin=-maximum, vmax=maximum, interpolation="nearest")
    figure.colorbar(heat_image, ax=axes[1], shrink=0.8)
    axes[2].imshow(overlay, interpolation="nearest")
    return figure
