"""Kernels in frequency: the magnitude of their Fourier transform, and where it is largest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from convscope._table import format_table, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 32  # Cells of a spectrum along each axis: kernels are zero-padded to it, larger ones keep their own size.


@dataclass(frozen=True)
class Peak:
    """What one filter answers to most.

    Attributes:
        filter: Its number.
        frequency: Cycles per pixel, 0..0.71: 0 for an even area, 0.5 for stripes one pixel wide along an axis.
        orientation: Degrees, 0..180, in which the brightness changes, counter-clockwise from the x axis: 0 for
            upright stripes, 90 for level ones. None at frequency 0, which has none.
        gain: Magnitude there, Σ of |weights| at most, of the input channel where it is largest.
        mean_gain: Magnitude at frequency 0, of the same channel: what an even area gives. 0 for a pure edge detector.
        channel: That input channel.
    """

    filter: int
    frequency: float
    orientation: float | None
    gain: float
    mean_gain: float
    channel: int

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in JSON's types."""
        return dataclasses.asdict(self)


def spectra(kernels: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what each kernel lets through of each frequency.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).

    Returns:
        (C_out, C_in, n, n): |Σ weight · exp(-2πi (v y + u x))|, the magnitude of the two-dimensional Fourier transform
        of the kernel zero-padded to n = 32; row v and column u are `frequencies`, in cycles per pixel.
    """
    size = max(SIZE, *kernels.shape[2:])
    transformed = np.fft.fft2(kernels.astype(np.float64), s=(size, size))
    return np.asarray(np.abs(np.fft.fftshift(transformed, axes=(2, 3))))


def frequencies(size: int) -> NDArray[np.float64]:
    """Return the frequencies of a spectrum's rows and columns, in cycles per pixel, -0.5 ≤ f < 0.5."""
    return np.fft.fftshift(np.fft.fftfreq(size))


def peaks(kernels: NDArray[np.float32]) -> list[Peak]:
    """Find the frequency that each filter answers to most.

    Args:
        kernels: (C_out, C_in, kernel height, kernel width).

    Returns:
        One a filter, of that of its input channels whose spectrum has the largest value.
    """
    found = spectra(kernels)
    size = found.shape[-1]
    steps = frequencies(size)
    peaks = []
    for number, spectrum in enumerate(found):
        # A spectrum is the same at f and -f; of the two, and of rounding's differences, the one with v ≤ 0 first.
        channel, row, column = np.unravel_index(np.argmax(np.round(spectrum, 9)), spectrum.shape)
        vertical, horizontal = steps[row], steps[column]
        frequency = float(np.hypot(vertical, horizontal))
        orientation = float(np.rad2deg(np.arctan2(-vertical, horizontal)) % 180) if frequency else None
        even = float(spectrum[channel, size // 2, size // 2])
        peaks.append(Peak(number, frequency, orientation, float(spectrum[channel, row, column]), even, int(channel)))
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
