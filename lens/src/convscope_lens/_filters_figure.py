"""Kernels and their spectra as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from convscope._figure import MapFigure

from convscope_lens.filters import frequencies, spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_COLUMNS = 8
_MOST = 256  # Tiles of a figure.


def draw_kernels(kernels: NDArray[np.float32], *, title: str) -> Figure:
    """Draw kernels as pictures.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).
        title: Stands above all.

    Returns:
        A tile a filter: in colour for three input channels, 0 being mid-grey and each filter scaled by its largest
        weight; otherwise a tile for each pair of filter and input channel, blue for negative, red for positive.
    """
    names, tiles = _tiles(kernels)
    figure, places = _figure(len(tiles), title)
    for place, name, tile in zip(places, names, tiles, strict=False):
        most = float(np.abs(tile).max()) or 1.0
        if tile.ndim == 3:
            place.imshow(0.5 + 0.5 * tile / most, interpolation="nearest")
        else:
            place.imshow(tile, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        place.set_title(name, fontsize="small")
    return figure


def draw_spectra(kernels: NDArray[np.float32], *, title: str) -> Figure:
    """Draw what kernels let through of each frequency.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).
        title: Stands above all.

    Returns:
        A tile for each kernel, the mean over input channels where there are three; axes in cycles per pixel, white for
        the filter's largest magnitude.
    """
    found = spectra(kernels)
    if found.shape[1] == 3:
        found = found.mean(axis=1, keepdims=True)
    names, tiles = _tiles(found)
    figure, places = _figure(len(tiles), f"{title}: magnitude over frequency (cycles per pixel)")
    size = found.shape[-1]
    steps, half = frequencies(size), 0.5 / size
    extent = (steps[0] - half, steps[-1] + half, steps[-1] + half, steps[0] - half)
    for place, name, tile in zip(places, names, tiles, strict=False):
        place.set_axis_on()
        place.imshow(tile, cmap="gray", vmin=0, extent=extent, interpolation="nearest")
        place.set_xticks([-0.5, 0, 0.5])
        place.set_yticks([-0.5, 0, 0.5])
        place.set(xlim=extent[:2], ylim=extent[2:])  # Ticks at 0.5 would widen them.
        place.tick_params(labelsize="xx-small")
        place.set_title(name, fontsize="small")
    return figure


def _tiles(values: NDArray[Any]) -> tuple[list[str], list[NDArray[Any]]]:
    """Return names and tiles: (h, w, 3) a filter for three input channels, else (h, w) a kernel."""
    filters, channels = values.shape[:2]
    if channels == 3:
        return [str(number) for number in range(filters)], list(values.transpose(0, 2, 3, 1))[:_MOST]
    names = [
        str(number) if channels == 1 else f"{number}, {channel}"
        for number in range(filters)
        for channel in range(channels)
    ]
    return names, list(values.reshape(-1, *values.shape[2:]))[:_MOST]


def _figure(count: int, title: str) -> tuple[Figure, list[Any]]:
    """Return a figure of so many places without axes, with the title."""
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = MapFigure(figsize=(max(1.3 * columns, 0.1 * len(title)), 1.5 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in places:
        place.set_axis_off()
    return figure, places
