"""Convolution filters as pictures, and their frequency response.

from convscope import Client
from convscope_lens import filters

with Client("http://localhost:8080") as client:
    weights = client.filters("cifar", "conv1")
print(filters.format_peaks(filters.peaks(weights), "conv1"))
filters.draw_spectra(weights, title="conv1").savefig("spectra.png")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from convscope.commands import format_table, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = [
    "Drawn",
    "Peak",
    "draw_filters",
    "draw_spectra",
    "drawn_kernels",
    "format_peaks",
    "frequencies",
    "peaks",
    "spectra",
]

SPECTRUM_SIZE = 32  # Filters are zero-padded to 32×32 before the Fourier transform; larger ones keep their size.
_CHUNK_VALUES = 2**18  # Of spectra at a time: 2 MiB, which a core's cache holds.
_EQUAL = 1e-12  # How much less than the largest square counts as equal: rounding differs between equal values.
_MAX_TILES = 256
_MIN_CHANNELS = 16  # At least this many of each filter, where not all kernels fit.
_COLUMNS = 8
_TILE_PX = 48  # Smaller tiles are enlarged by an integer factor.
_GAP = 0.3  # Between tiles, for their names, as a share of the height of a tile.


@dataclass(frozen=True)
class Peak:
    """The peak of the filter's frequency response.

    Attributes:
        filter: Index of the filter.
        frequency: Cycles per pixel, 0..0.71: 0 for a uniform area, 0.5 for stripes one pixel wide along an axis.
        orientation: Direction in which the brightness changes, in degrees, 0..180, counter-clockwise from the x axis:
            0 for vertical stripes, 90 for horizontal ones. None at frequency 0, which has no direction.
        gain: Response at that frequency over all input channels, √(Σ over input channels of magnitude²): what the
            filter answers to a wave in the colour that suits it best.
        dc_gain: The same at frequency 0: the response to a uniform area in the colour that suits it best. 0 for a pure
            edge detector.
        channel: Input channel with the largest magnitude at that frequency.
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
    axis = _frequency_axis(filters)
    squares = _squares(filters, axis, axis)
    return np.sqrt(squares, out=squares)


def frequencies(size: int) -> NDArray[np.float64]:
    """Return the frequencies of a spectrum's rows and columns, in cycles per pixel, -0.5 ≤ f < 0.5."""
    return np.fft.fftshift(np.fft.fftfreq(size))


def _frequency_axis(filters: NDArray[np.float32]) -> NDArray[np.float64]:
    return frequencies(max(SPECTRUM_SIZE, *filters.shape[2:]))


def _squares(
    filters: NDArray[np.float32], vertical: NDArray[np.float64], horizontal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the squares of the magnitudes at these frequencies, (C_out, C_in, rows, columns).

    Kernels are small: the sum as it is defined, as one product of matrices, takes a tenth of the time of a Fourier
    transform of 32×32 values for each.
    """
    height, width = filters.shape[2:]
    y, x = np.outer(np.arange(height), vertical), np.outer(np.arange(width), horizontal)
    phases = 2 * np.pi * (y[:, None, :, None] + x[None, :, None, :]).reshape(height * width, -1)
    weights = filters.reshape(-1, height * width).astype(np.float64)
    squares, sines = weights @ np.cos(phases), weights @ np.sin(phases)
    np.square(squares, out=squares)
    squares += np.square(sines, out=sines)
    return squares.reshape(*filters.shape[:2], len(vertical), len(horizontal))


def peaks(filters: NDArray[np.float32]) -> list[Peak]:
    """Return the peak of each filter's frequency response.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.

    Returns:
        One per filter, over all of its input channels.
    """
    axis = _frequency_axis(filters)
    vertical = axis[: len(axis) // 2 + 1]  # A spectrum is the same at f and -f.
    count, _, height, width = filters.shape
    # With W = QR, W and R have the same response, summed over rows: of many input channels R keeps as many as cells.
    weights = filters.reshape(count, -1, height * width).astype(np.float64)
    factors = np.asarray(np.linalg.qr(weights, mode="r")).reshape(count, -1, height, width)
    result: list[Peak] = []
    step = max(1, _CHUNK_VALUES // (factors.shape[1] * len(vertical) * len(axis)))
    for start in range(0, count, step):
        for squares in _squares(factors[start : start + step], vertical, axis):
            # Along v = 0 and v = -0.5 values occur twice, differently rounded: the first of the largest is taken.
            total = squares.sum(axis=0)
            row, column = np.unravel_index(np.argmax(total >= total.max() * (1 - _EQUAL)), total.shape)
            v, u = vertical[row], axis[column]
            kernels = filters[len(result)]
            own = _squares(kernels[None], vertical[row : row + 1], axis[column : column + 1])[0, :, 0, 0]
            channel = int(np.argmax(own >= own.max() * (1 - _EQUAL)))
            frequency = float(np.hypot(v, u))
            orientation = float(np.rad2deg(np.arctan2(-v, u)) % 180) if frequency else None
            dc_gain = float(np.linalg.norm(kernels.sum(axis=(1, 2), dtype=np.float64)))
            result.append(Peak(len(result), frequency, orientation, math.sqrt(own.sum()), dc_gain, channel))
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


class Drawn(NamedTuple):
    """The kernels of a layer that are drawn.

    Attributes:
        kernels: (filter, input channels) of each row or tile; None for all input channels in one tile, in colour.
        text: Description of the kernels.
    """

    kernels: list[tuple[int, list[int] | None]]
    text: str


def drawn_kernels(filters: NDArray[np.float32]) -> Drawn:
    """Choose the kernels to draw: all, or of many those with the largest norm.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.

    Returns:
        At most 256 tiles: one per filter with three input channels, else one per filter and input channel.
    """
    filter_count, channel_count = filters.shape[:2]
    norms = np.sqrt(np.square(filters.astype(np.float64)).sum(axis=(2, 3)))  # (C_out, C_in)
    if channel_count == 3:
        shown_channels = 1
    elif filter_count * channel_count <= _MAX_TILES:
        shown_channels = channel_count
    else:
        shown_channels = min(channel_count, max(_MIN_CHANNELS, _MAX_TILES // filter_count))
    chosen = _largest(np.square(norms).sum(axis=1), _MAX_TILES // shown_channels)
    kernels = [(index, None if channel_count == 3 else _largest(norms[index], shown_channels)) for index in chosen]
    text = (
        "all filters"
        if len(chosen) == filter_count
        else f"the {len(chosen)} filters with the largest norm of {filter_count}"
    )
    if channel_count not in (3, shown_channels):
        text += f", and of each the {shown_channels} input channels with the largest norm of {channel_count}"
    return Drawn(kernels, text)


def _largest(values: NDArray[np.float64], count: int) -> list[int]:
    """Return the indexes of the largest values, in ascending order."""
    return sorted(np.argsort(-values, kind="stable")[:count].tolist())


def draw_filters(filters: NDArray[np.float32], *, title: str, bgr: bool = False) -> Figure:
    """Draw filters as pictures; `drawn_kernels` says which.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.
        title: Title of the figure.
        bgr: Whether the first of three input channels is blue, as `Input.bgr` in the model card says.

    Returns:
        A figure of tiles with their filter, and input channel. With three input channels they are in colour, 0 being
        mid-grey, each scaled by its largest weight; otherwise blue for negative and red for positive weights.
    """
    from matplotlib import colormaps  # Imported here: matplotlib is slow to import.

    drawn = drawn_kernels(filters)
    tiles: list[tuple[str, NDArray[np.float64]]] = []
    for index, channels in drawn.kernels:
        kernels = filters[index].astype(np.float64)
        if channels is None:
            tiles.append((str(index), 0.5 + 0.5 * _unit(kernels[:: -1 if bgr else 1].transpose(1, 2, 0))))
            continue
        for channel in channels:
            colours = colormaps["RdBu_r"](0.5 + 0.5 * _unit(kernels[channel]))[..., :3]
            tiles.append((_tile_name(index, channel, len(kernels)), colours))
    return _draw_tiles(tiles, f"{title}: {drawn.text}")


def draw_spectra(filters: NDArray[np.float32], *, title: str) -> Figure:
    """Draw the magnitude of the filters' Fourier transforms; `drawn_kernels` says which.

    Args:
        filters: (C_out, C_in, kernel height, kernel width), float32, any range.
        title: Title of the figure.

    Returns:
        A figure of tiles with their filter, and input channel; with three input channels a tile is their mean.
        Frequency 0 is in the middle of a tile, 0.5 cycles per pixel at its edges, and white is its maximum.
    """
    drawn = drawn_kernels(filters)
    tiles: list[tuple[str, NDArray[np.float64]]] = []
    for index, channels in drawn.kernels:
        [magnitudes] = spectra(filters[index : index + 1] if channels is None else filters[index : index + 1, channels])
        if channels is None:
            tiles.append((str(index), magnitudes.mean(axis=0)))
        else:
            names = [_tile_name(index, channel, filters.shape[1]) for channel in channels]
            tiles += zip(names, magnitudes, strict=True)
    grey = [(name, _unit(tile)[:, :, np.newaxis].repeat(3, axis=2)) for name, tile in tiles]
    return _draw_tiles(grey, f"{title}: magnitude over frequency, ±0.5 cycles per pixel; {drawn.text}")


def _tile_name(index: int, channel: int, channel_count: int) -> str:
    return str(index) if channel_count == 1 else f"{index}, {channel}"


def _unit(tile: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale a tile by its largest absolute value."""
    return tile / (float(np.abs(tile).max()) or 1.0)


def _draw_tiles(tiles: Sequence[tuple[str, NDArray[np.float64]]], title: str) -> Figure:
    """Draw named tiles, (h, w, 3), RGB 0..1, as one picture: an axes for each takes seconds."""
    from convscope.figures import new_figure  # Imported here: matplotlib is slow to import.

    height, width = tiles[0][1].shape[:2]
    zoom = -(-_TILE_PX // max(height, width))
    height, width, gap = height * zoom, width * zoom, int(_GAP * _TILE_PX)
    is_large = len(tiles) > 8 * _COLUMNS
    columns, inches = min(_COLUMNS * (1 + is_large), len(tiles)), 0.7 if is_large else 1.0
    rows = -(-len(tiles) // columns)
    picture = np.ones((rows * (height + gap), columns * (width + gap), 3))
    figure = new_figure(
        title,
        width_inches=max(inches * columns, 0.1 * len(title)),
        height_inches=inches * rows * (height + gap) / (width + gap) + 0.5,
    )
    figure.suptitle(title, fontsize="medium")
    ax = figure.subplots()
    ax.set_axis_off()
    for position, (name, tile) in enumerate(tiles):
        row, column = divmod(position, columns)
        top, left = row * (height + gap) + gap, column * (width + gap)
        picture[top : top + height, left : left + width] = tile.repeat(zoom, axis=0).repeat(zoom, axis=1)
        ax.text(left, top - 2, name, fontsize="xx-small", va="bottom", in_layout=False)
    ax.imshow(np.rint(picture * 255).astype(np.uint8), interpolation="nearest")  # Bytes are drawn faster.
    return figure
