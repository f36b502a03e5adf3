"""Convolution filters as pictures, and their frequency response.

from convscope import Client
from convscope_lens import filters

with Client("http://localhost:8080") as client:
    weights = client.filters("cifar", "conv1")
print(filters.format_peaks(filters.peaks(weights), "conv1"))
filters.draw_spectra(weights, title="conv1").savefig("spectra.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope.commands import format_table, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["Peak", "draw_filters", "draw_spectra", "format_peaks", "frequencies", "peaks", "spectra"]

SPECTRUM_SIZE = 32  # Filters are zero-padded to 32×32 before the Fourier transform; larger ones keep their size.
_COLUMNS = 8
_MAX_TILES = 256


@dataclass(frozen=True)
class Peak:
    """The peak of the filter's frequency response.

    Attributes:
        filter: Index of the filter.
        frequency: Cycles per pixel, 0..0.71: 0 for a uniform area, 0.5 for stripes one pixel wide along an axis.
        orientation: Direction in which the brightness changes, in degrees, 0..180, counter-clockwise from the x axis:
            0 for vertical stripes, 90 for horizontal ones. None at frequency 0, which has no direction.
        gain: Magnitude at that frequency; at most the sum of |weights|.
        dc_gain: Magnitude at frequency 0 of the same input channel: the response to a uniform area. 0 for a pure edge
            detector.
        channel: Input channel with the largest magnitude.
    """

    filter: int
    frequency: float
    orientation: float | None
    gain: float
    dc_gain: float
    channel: int


def spectra(filters: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the magnitude of the Fourier transform of each filter and input channel.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.

    Returns:
        (C_out, C_in, n, n), float64, at least 0: |Σ weight · exp(-2πi (v y + u x))|, zero-padded to n = 32; rows v and
        columns u are `frequencies(n)`, in cycles per pixel.
    """
    size = max(SPECTRUM_SIZE, *filters.shape[2:])
    transformed = np.fft.fft2(filters.astype(np.float64), s=(size, size))
    return np.asarray(np.abs(np.fft.fftshift(transformed, axes=(2, 3))))


def frequencies(size: int) -> NDArray[np.float64]:
    """Return the frequencies of a spectrum's rows and columns, in cycles per pixel, -0.5 ≤ f < 0.5."""
    return np.fft.fftshift(np.fft.fftfreq(size))


def peaks(filters: NDArray[np.float32]) -> list[Peak]:
    """Return the peak of each filter's frequency response.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.

    Returns:
        One per filter, of the input channel whose spectrum has the largest value.
    """
    magnitudes = spectra(filters)
    size = magnitudes.shape[-1]
    frequency_axis = frequencies(size)
    result = []
    for index, spectrum in enumerate(magnitudes):
        # A spectrum is the same at f and -f. Rounding makes the two equal, and argmax returns the one with v ≤ 0.
        channel, row, column = np.unravel_index(np.argmax(np.round(spectrum, 9)), spectrum.shape)
        vertical, horizontal = frequency_axis[row], frequency_axis[column]
        frequency = float(np.hypot(vertical, horizontal))
        orientation = float(np.rad2deg(np.arctan2(-vertical, horizontal)) % 180) if frequency else None
        gain, dc_gain = float(spectrum[channel, row, column]), float(spectrum[channel, size // 2, size // 2])
        result.append(Peak(index, frequency, orientation, gain, dc_gain, int(channel)))
    return result


def format_peaks(peaks: Sequence[Peak], title: str) -> str:
    """Format peaks as a table."""
    rows = [
        [
            str(peak.filter),
            str(peak.channel),
            f"{peak.frequency:.3f}",
            "–" if peak.orientation is None else f"{peak.orientation:.0f}",
            f"{peak.gain:.3f}",
            f"{peak.dc_gain:.3f}",
        ]
        for peak in peaks
    ]
    header = ["filter", "input channel", "peak (cycles/px)", "orientation (°)", "gain", "DC gain"]
    return f"{printable(title)}\n\n{format_table(header, rows, right_aligned=range(len(header)))}"


def draw_filters(filters: NDArray[np.float32], *, title: str, bgr: bool = False) -> Figure:
    """Draw filters as pictures.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.
        title: Title of the figure.
        bgr: Whether the first of three input channels is blue, as `Input.bgr` in the model card says.

    Returns:
        A figure. With three input channels it has a colour tile per filter, 0 being mid-grey, each filter scaled by its
        largest weight; otherwise a tile per filter and input channel, blue for negative and red for positive weights.
    """
    names, tiles = _tiles(filters)
    if bgr:
        tiles = [tile[..., ::-1] if tile.ndim == 3 else tile for tile in tiles]
    figure, axes = _tile_figure(len(tiles), title)
    for ax, name, tile in zip(axes, names, tiles, strict=False):
        maximum = float(np.abs(tile).max()) or 1.0
        if tile.ndim == 3:
            ax.imshow(0.5 + 0.5 * tile / maximum, interpolation="nearest")
        else:
            ax.imshow(tile, cmap="RdBu_r", vmin=-maximum, vmax=maximum, interpolation="nearest")
        ax.set_title(name, fontsize="small")
    return figure


def draw_spectra(filters: NDArray[np.float32], *, title: str) -> Figure:
    """Draw the magnitude of the filters' Fourier transforms.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.
        title: Title of the figure.

    Returns:
        A figure with a tile per filter and input channel; with three input channels, one per filter: their mean. Axes
        are in cycles per pixel, and white is the maximum of the tile.
    """
    magnitudes = spectra(filters)
    if magnitudes.shape[1] == 3:
        magnitudes = magnitudes.mean(axis=1, keepdims=True)
    names, tiles = _tiles(magnitudes)
    figure, axes = _tile_figure(len(tiles), f"{title}: magnitude over frequency (cycles per pixel)")
    size = magnitudes.shape[-1]
    frequency_axis, half = frequencies(size), 0.5 / size
    low, high = frequency_axis[0] - half, frequency_axis[-1] + half
    extent = (low, high, high, low)
    for ax, name, tile in zip(axes, names, tiles, strict=False):
        ax.set_axis_on()
        ax.imshow(tile, cmap="gray", vmin=0, extent=extent, interpolation="nearest")
        ax.set_xticks([-0.5, 0, 0.5])
        ax.set_yticks([-0.5, 0, 0.5])
        ax.set(xlim=extent[:2], ylim=extent[2:])  # Ticks at 0.5 would widen them.
        ax.tick_params(labelsize="xx-small")
        ax.set_title(name, fontsize="small")
    return figure


def _tiles(values: NDArray[Any]) -> tuple[list[str], list[NDArray[Any]]]:
    """Return names and tiles: (h, w, 3) per filter with three input channels, else (h, w) per filter and channel."""
    filter_count, channel_count = values.shape[:2]
    if channel_count == 3:
        return [str(index) for index in range(filter_count)], list(values.transpose(0, 2, 3, 1))[:_MAX_TILES]
    names = [
        str(index) if channel_count == 1 else f"{index}, {channel}"
        for index in range(filter_count)
        for channel in range(channel_count)
    ]
    return names, list(values.reshape(-1, *values.shape[2:]))[:_MAX_TILES]


def _tile_figure(count: int, title: str) -> tuple[Figure, list[Any]]:
    """Return a figure, and at least `count` of its axes, without axis lines."""
    from convscope.figures import new_figure  # Imported here: matplotlib is slow to import.

    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    width_inches = max(1.3 * columns, 0.1 * len(title))
    figure = new_figure(title, width_inches=width_inches, height_inches=1.5 * rows + 0.5)
    figure.suptitle(title, fontsize="medium")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    return figure, axes
