"""Filters of a convolution: their kernels as pictures, and the frequency that each lets through most.

from convscope import Client
from convscope_lens import filters

with Client("http://localhost:8080") as client:
kernels = client.filters("cifar", "conv1")
print(filters.peaks_text(filters.peaks(kernels), "conv1"))
filters.draw_spectra(kernels, title="conv1").savefig("spectra.png")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope.commands import format_table, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["Peak", "draw_kernels", "draw_spectra", "frequencies", "peaks", "peaks_text", "spectra"]

SPECTRUM_SIZE = 32  # Kernels are zero-padded to 32×32 before the Fourier transform; larger kernels keep their size.
_COLUMNS = 8
_MAX_TILES = 256


@dataclass(frozen=True)
class Peak:
    """The frequency that one filter lets through most.

    Attributes:
        filter: Number of the filter.
        frequency: Cycles per pixel, 0..0.71: 0 for a uniform area, 0.5 for stripes one pixel wide along an axis.
        orientation: Direction in which the brightness changes, in degrees, 0..180, counter-clockwise from the x axis:
            0 for vertical stripes, 90 for horizontal ones. None at frequency 0, which has no direction.
        gain: Magnitude at that frequency; at most the sum of |weights|.
        mean_gain: Magnitude at frequency 0 of the same input channel: the response to a uniform area. 0 for a pure edge
            detector.
        channel: The input channel with the largest magnitude.
    """

    filter: int
    frequency: float
    orientation: float | None
    gain: float
    mean_gain: float
    channel: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dataclasses.asdict(self)


def spectra(kernels: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the magnitude of each kernel's Fourier transform.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).

    Returns:
        (C_out, C_in, n, n): |Σ weight · exp(-2πi (v y + u x))| of the kernel zero-padded to n = 32; rows v and columns
        u are `frequencies(n)`, in cycles per pixel.
    """
    size = max(SPECTRUM_SIZE, *kernels.shape[2:])
    transformed = np.fft.fft2(kernels.astype(np.float64), s=(size, size))
    return np.asarray(np.abs(np.fft.fftshift(transformed, axes=(2, 3))))


def frequencies(size: int) -> NDArray[np.float64]:
    """Return the frequencies of a spectrum's rows and columns, in cycles per pixel, -0.5 ≤ f < 0.5."""
    return np.fft.fftshift(np.fft.fftfreq(size))


def peaks(kernels: NDArray[np.float32]) -> list[Peak]:
    """Find the frequency that each filter lets through most.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).

    Returns:
        One for each filter, of the input channel whose spectrum has the largest value.
    """
    found = spectra(kernels)
    size = found.shape[-1]
    steps = frequencies(size)
    peaks = []
    for number, spectrum in enumerate(found):
        # A spectrum is the same at f and -f. Rounding makes the two equal, and argmax takes the one with v ≤ 0.
        channel, row, column = np.unravel_index(np.argmax(np.round(spectrum, 9)), spectrum.shape)
        vertical, horizontal = steps[row], steps[column]
        frequency = float(np.hypot(vertical, horizontal))
        orientation = float(np.rad2deg(np.arctan2(-vertical, horizontal)) % 180) if frequency else None
        uniform = float(spectrum[channel, size // 2, size // 2])
        peaks.append(Peak(number, frequency, orientation, float(spectrum[channel, row, column]), uniform, int(channel)))
    return peaks


def peaks_text(found: Sequence[Peak], title: str) -> str:
    """Return peaks as a table."""
    rows = [
        [
            str(peak.filter),
            str(peak.channel),
            f"{peak.frequency:.3f}",
            "–" if peak.orientation is None else f"{peak.orientation:.0f}",
            f"{peak.gain:.3f}",
            f"{peak.mean_gain:.3f}",
        ]
        for peak in found
    ]
    header = ["filter", "input channel", "peak (cycles/px)", "orientation (°)", "gain", "gain at 0"]
    return f"{printable(title)}\n\n{format_table(header, rows, right=range(len(header)))}"


def draw_kernels(kernels: NDArray[np.float32], *, title: str) -> Figure:
    """Draw kernels as pictures.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).
        title: Stands above everything.

    Returns:
        A figure. With three input channels it has a tile in colour for each filter, 0 being mid-grey, each filter
        scaled by its largest weight; otherwise a tile for each pair of filter and input channel, blue for negative and
        red for positive weights.
    """
    names, tiles = _tiles(kernels)
    figure, places = _tile_figure(len(tiles), title)
    for place, name, tile in zip(places, names, tiles, strict=False):
        most = float(np.abs(tile).max()) or 1.0
        if tile.ndim == 3:
            place.imshow(0.5 + 0.5 * tile / most, interpolation="nearest")
        else:
            place.imshow(tile, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        place.set_title(name, fontsize="small")
    return figure


def draw_spectra(kernels: NDArray[np.float32], *, title: str) -> Figure:
    """Draw the magnitude of the kernels' Fourier transforms.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).
        title: Stands above everything.

    Returns:
        A figure with a tile for each kernel; with three input channels, for each filter their mean. Axes are in cycles
        per pixel, and white is the largest magnitude of the tile.
    """
    found = spectra(kernels)
    if found.shape[1] == 3:
        found = found.mean(axis=1, keepdims=True)
    names, tiles = _tiles(found)
    figure, places = _tile_figure(len(tiles), f"{title}: magnitude over frequency (cycles per pixel)")
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
    """Return names and tiles: (h, w, 3) for each filter with three input channels, else (h, w) for each kernel."""
    filters, channels = values.shape[:2]
    if channels == 3:
        return [str(number) for number in range(filters)], list(values.transpose(0, 2, 3, 1))[:_MAX_TILES]
    names = [
        str(number) if channels == 1 else f"{number}, {channel}"
        for number in range(filters)
        for channel in range(channels)
    ]
    return names, list(values.reshape(-1, *values.shape[2:]))[:_MAX_TILES]


def _tile_figure(count: int, title: str) -> tuple[Figure, list[Any]]:
    """Return a figure with so many places without axes, and the places."""
    from convscope.figures import new_figure  # Imported late: numbers need no matplotlib.

    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    width_inches = max(1.3 * columns, 0.1 * len(title))
    figure = new_figure(title, width_inches=width_inches, height_inches=1.5 * rows + 0.5)
    figure.suptitle(title, fontsize="medium")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in places:
        place.set_axis_off()
    return figure, places
