"""Changed copies of pictures and maps: moved, turned, scaled, blurred. Arrays are (H, W, C); numpy only."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.float32]
Points: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]


class Grid(NamedTuple):
    """Where the cells of a map, or the pixels of a picture, lie in the picture.

    Attributes:
        first: (y, x) of the middle of cell (0, 0), in pixels; the middle of pixel (0, 0) is (0, 0).
        step: (y, x) pixels from one cell to the next.
        shape: (h, w).
    """

    first: tuple[float, float]
    step: tuple[float, float]
    shape: tuple[int, int]

    def points(self) -> Points:
        """Return y and x, each (h, w), of every cell's middle, in pixels."""
        axes = [
            first + step * np.arange(size) for first, step, size in zip(self.first, self.step, self.shape, strict=True)
        ]
        y, x = np.meshgrid(axes[0], axes[1], indexing="ij")
        return y, x

    def cells(self, points: Points) -> Points:
        """Return points of the picture counted in cells of this grid."""
        (y, x), first, step = points, self.first, self.step
        return (y - first[0]) / step[0], (x - first[1]) / step[1]


def shift(image: Values, down: int, right: int) -> Values:
    """Move a picture; what comes in is its mirror image about the edge pixels, as `reflect` of numpy's pad has it.

    Args:
        image: (H, W, C).
        down: Pixels, less than H; negative for up.
        right: Pixels, less than W; negative for left.

    Returns:
        (H, W, C): out[y, x] = image[y - down, x - right] where that is in the picture.
    """
    height, width, _ = image.shape
    rows, columns = _mirrored(np.arange(height) - down, height), _mirrored(np.arange(width) - right, width)
    return np.ascontiguousarray(image[rows][:, columns])


def turn(points: Points, middle: tuple[float, float], degrees: float, factor: float) -> Points:
    """Turn points counter-clockwise (as seen, y pointing down) about a middle, and scale their distance from it.

    Args:
        points: y and x.
        middle: (y, x).
        degrees: Of the turn.
        factor: Of the distance.

    Returns:
        y and x.
    """
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    y, x = points[0] - middle[0], points[1] - middle[1]
    return middle[0] + factor * (cosine * y - sine * x), middle[1] + factor * (sine * y + cosine * x)


def sample(values: Values, points: Points) -> Values:
    """Read values between cells, bilinear; beyond the edge stands the mirror image.

    Args:
        values: (h, w, C).
        points: y and x, in cells, each of any shape P.

    Returns:
        (*P, C), float32. At whole cells it is the cell's own value, exactly.
    """
    (y, x), (height, width, _) = points, values.shape
    # Sines of whole quarter turns are off by 1e-16: such points are whole cells.
    y, x = np.round(y, 9), np.round(x, 9)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    below, beside = (y - top)[..., np.newaxis], (x - left)[..., np.newaxis]
    rows = [_mirrored(top + offset, height) for offset in (0, 1)]
    columns = [_mirrored(left + offset, width) for offset in (0, 1)]
    upper = values[rows[0], columns[0]] * (1 - beside) + values[rows[0], columns[1]] * beside
    lower = values[rows[1], columns[0]] * (1 - beside) + values[rows[1], columns[1]] * beside
    return np.asarray(upper * (1 - below) + lower * below, np.float32)


def blurred(image: Values, sigma: float) -> Values:
    """Blur with a Gaussian, cut off at four deviations; beyond the edge stands the mirror image.

    Args:
        image: (H, W, C).
        sigma: Standard deviation in pixels; 0 for no blur.

    Returns:
        (H, W, C), float32.
    """
    if sigma == 0:
        return image
    reach = int(np.ceil(4 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        size = image.shape[axis]
        total = np.zeros(image.shape, np.float64)
        for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
            total += weight * image.take(_mirrored(np.arange(size) + offset, size), axis=axis)
        image = total.astype(np.float32)
    return image


def _mirrored(index: NDArray[np.int_], size: int) -> NDArray[np.int_]:
    """Fold indexes back into 0..size - 1, the edge itself not repeated: -1 is 1."""
    if size == 1:
        return np.zeros_like(index)
    period = 2 * (size - 1)
    folded = np.abs(index) % period
    return np.asarray(np.minimum(folded, period - folded))
