"""Pictures as the network takes them, and changed copies: moved, rotated, scaled, blurred. Arrays are (H, W, C)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from convscope import Input

Image: TypeAlias = NDArray[np.float32]  # (H, W, C), 0..1.
Cells: TypeAlias = NDArray[np.float32]  # (h, w, C): a map, or a picture, whose cells are its pixels.
Source: TypeAlias = str | os.PathLike[str] | NDArray[Any]
Points: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]  # y and x.

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".npy"})


def list_pictures(sources: Source | Iterable[Source], *, limit: int | None, seed: int) -> list[Source]:
    """List pictures, those in folders among them.

    Args:
        sources: A picture, a folder, or an iterable of them. A folder stands for every PNG, JPEG, WebP and .npy file in
            it and its sub-folders, sorted by name.
        limit: Choose so many of them at random, in their order; None for all.
        seed: Seed of that choice.

    Raises:
        ValueError: There is no picture.
    """
    if isinstance(sources, str | os.PathLike) or (isinstance(sources, np.ndarray) and sources.ndim < 4):
        sources = [sources]
    found: list[Source] = []
    for source in sources:
        if isinstance(source, np.ndarray) or not Path(source).is_dir():
            found.append(source)
        else:
            found += sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError("there is no picture to probe with: no PNG, JPEG, WebP or .npy file")
    if limit is not None and limit < len(found):
        chosen = np.random.default_rng(seed).choice(len(found), size=limit, replace=False)
        found = [found[index] for index in sorted(chosen.tolist())]
    return found


def read_pictures(sources: Iterable[Source], wanted: Input) -> Iterator[Image]:
    """Read pictures, and bring them to the network's size and channels.

    Args:
        sources: Paths, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        wanted: The network's input. The picture of a file is resized to it, bilinear with antialiasing, which differs
            by at most one level of 255 from what the service does.

    Yields:
        (H, W, C), float32, 0..1.

    Raises:
        OSError: A file cannot be read as a picture.
        ValueError: An array does not fit the network.
    """
    for source in sources:
        if not isinstance(source, np.ndarray) and Path(source).suffix.lower() == ".npy":
            source = np.load(source, allow_pickle=False)
        image = _from_array(source) if isinstance(source, np.ndarray) else _from_file(source, wanted)
        height, width, channels = image.shape
        if channels != wanted.channels or (wanted.height and (height, width) != (wanted.height, wanted.width)):
            size = f"{wanted.height}×{wanted.width}" if wanted.height else "any size"
            raise ValueError(
                f"the network takes {size} with {wanted.channels} channels; this array is {height}×{width} with "
                f"{channels}, and arrays are not resized here"
            )
        yield image


def _from_array(array: NDArray[Any]) -> Image:
    if array.dtype not in (np.uint8, np.float32) or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"an array to probe with is (H, W) or (H, W, C) of uint8 or float32, not {array.shape} {array.dtype}"
        )
    image = array.astype(np.float32) / np.float32(255) if array.dtype == np.uint8 else array.astype(np.float32)
    return image if image.ndim == 3 else image[:, :, np.newaxis]


def _from_file(path: str | os.PathLike[str], wanted: Input) -> Image:
    from PIL import Image as Pillow  # Imported late: arrays need no Pillow.
    from PIL import ImageOps

    with Pillow.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Pillow.alpha_composite(Pillow.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if wanted.channels == 1 else "RGB")
        if wanted.height and wanted.width:
            picture = picture.resize((wanted.width, wanted.height), Pillow.Resampling.BILINEAR)
        return _from_array(np.asarray(picture))


class Grid(NamedTuple):
    """Where the cells of a map, or the pixels of a picture, lie in the picture.

    Attributes:
        first: (y, x) of the centre of cell (0, 0), in pixels; the centre of pixel (0, 0) is (0, 0).
        step: (y, x) pixels from one cell to the next.
        shape: (h, w).
    """

    first: tuple[float, float]
    step: tuple[float, float]
    shape: tuple[int, int]

    def points(self) -> Points:
        """Return y and x, each (h, w), of the centre of every cell, in pixels."""
        axes = [
            first + step * np.arange(size) for first, step, size in zip(self.first, self.step, self.shape, strict=True)
        ]
        y, x = np.meshgrid(axes[0], axes[1], indexing="ij")
        return y, x

    def to_cells(self, points: Points) -> Points:
        """Convert points from pixels of the picture to cells of this grid."""
        (y, x), first, step = points, self.first, self.step
        return (y - first[0]) / step[0], (x - first[1]) / step[1]


def shift_image(image: Image, down: int, right: int) -> Image:
    """Move a picture. What comes in at the edge is its mirror image, as in numpy's `pad(mode="reflect")`.

    Args:
        image: (H, W, C).
        down: Pixels, less than H; negative for up.
        right: Pixels, less than W; negative for left.

    Returns:
        (H, W, C): out[y, x] = image[y - down, x - right] where that lies in the picture.
    """
    height, width, _ = image.shape
    rows, columns = _reflect(np.arange(height) - down, height), _reflect(np.arange(width) - right, width)
    return np.ascontiguousarray(image[rows][:, columns])


def transform_points(points: Points, centre: tuple[float, float], degrees: float, factor: float) -> Points:
    """Rotate points counter-clockwise (as seen, y pointing down) about a centre, and scale their distance from it.

    Args:
        points: y and x.
        centre: (y, x).
        degrees: Angle of the rotation.
        factor: The distance from the centre is multiplied by it.

    Returns:
        y and x.
    """
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    y, x = points[0] - centre[0], points[1] - centre[1]
    return centre[0] + factor * (cosine * y - sine * x), centre[1] + factor * (sine * y + cosine * x)


def interpolate(cells: Cells, points: Points) -> Cells:
    """Read values between cells, bilinear. Beyond the edge the mirror image continues.

    Args:
        cells: (h, w, C).
        points: y and x, in cells, each of any shape P.

    Returns:
        (*P, C), float32. At a whole cell it is the value of the cell, exactly.
    """
    (y, x), (height, width, _) = points, cells.shape
    # The sine of a quarter turn is off by 1e-16; points so close to a whole cell count as whole.
    y, x = np.round(y, 9), np.round(x, 9)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    below, beside = (y - top)[..., np.newaxis], (x - left)[..., np.newaxis]
    rows = [_reflect(top + offset, height) for offset in (0, 1)]
    columns = [_reflect(left + offset, width) for offset in (0, 1)]
    upper = cells[rows[0], columns[0]] * (1 - beside) + cells[rows[0], columns[1]] * beside
    lower = cells[rows[1], columns[0]] * (1 - beside) + cells[rows[1], columns[1]] * beside
    return np.asarray(upper * (1 - below) + lower * below, np.float32)


def blur_image(image: Image, sigma: float) -> Image:
    """Blur with a Gaussian that is cut off at four standard deviations. Beyond the edge the mirror image continues.

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
            total += weight * image.take(_reflect(np.arange(size) + offset, size), axis=axis)
        image = total.astype(np.float32)
    return image


def _reflect(index: NDArray[np.int_], size: int) -> NDArray[np.int_]:
    """Reflect indexes into 0..size - 1 without repeating the edge: -1 becomes 1."""
    if size == 1:
        return np.zeros_like(index)
    period = 2 * (size - 1)
    folded = np.abs(index) % period
    return np.asarray(np.minimum(folded, period - folded))
