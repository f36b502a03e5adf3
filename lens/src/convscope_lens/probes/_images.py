"""Loads pictures as network inputs, and shifts, rotates, scales and blurs them. Arrays are (H, W, C).

Beyond its edges a picture continues mirrored, without repeating the edge: `mode="mirror"` of scipy.ndimage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from convscope import commands
from numpy.typing import NDArray
from scipy import ndimage

from convscope_lens._arrays import load_npy

if TYPE_CHECKING:
    from convscope import Input

PictureArray: TypeAlias = NDArray[np.float32]  # (H, W, C), 0..1.
MapArray: TypeAlias = NDArray[np.float32]  # (h, w, C), any range: a map, or a picture, whose cells are its pixels.
File: TypeAlias = str | os.PathLike[str] | bytes
Source: TypeAlias = str | os.PathLike[str] | bytes | NDArray[Any]
_MAX_FILES, _MAX_FILE_BYTES = 16, 4_000_000  # Converted by one request.
Points: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]  # y and x.


def list_pictures(sources: Source | Iterable[Source], *, limit: int | None, seed: int) -> list[Source]:
    """List pictures, including those in folders.

    Args:
        sources: A picture, a folder, or an iterable of them. A folder stands for the picture files in it and its
            sub-folders, sorted by name.
        limit: Use a random sample of this size, in order; None for all.
        seed: Seed of the sample.

    Raises:
        ValueError: There is no picture.
    """
    if isinstance(sources, str | os.PathLike | bytes) or (isinstance(sources, np.ndarray) and sources.ndim < 4):
        sources = [sources]
    pictures: list[Source] = []
    for source in sources:
        if isinstance(source, str | os.PathLike):
            pictures += commands.list_pictures([os.fspath(source)])
        else:
            pictures.append(source)
    if not pictures:
        raise ValueError("no picture found")
    if limit is not None and limit < len(pictures):
        sample = np.random.default_rng(seed).choice(len(pictures), size=limit, replace=False)
        pictures = [pictures[index] for index in sorted(sample.tolist())]
    return pictures


def load_network_inputs(
    sources: Iterable[Source],
    input_spec: Input,
    convert: Callable[[list[File]], list[NDArray[np.float32]]],
) -> Iterator[PictureArray]:
    """Load pictures as the network's input.

    Args:
        sources: Paths, or arrays (H, W) or (H, W, C) of the network's size, uint8 0..255 or float32 0..1.
        input_spec: The network's input.
        convert: Returns the network's inputs for picture files, each (C, H, W), float32, 0..1.

    Yields:
        (H, W, C), float32, 0..1.

    Raises:
        ConvscopeError: The service rejects a file.
        OSError: A file cannot be read.
        ValueError: An array does not fit the network.
    """
    files: list[File] = []  # Not yet converted: a request for each would cost more than the probe itself.
    for source in sources:
        if isinstance(source, str | os.PathLike) and Path(source).suffix.lower() == ".npy":
            source = Path(source).read_bytes()
        if isinstance(source, bytes):
            array = load_npy(source)
            source = source if array is None else array
        if not isinstance(source, np.ndarray):
            files.append(source)
            if len(files) == _MAX_FILES or sum(map(_file_bytes, files)) > _MAX_FILE_BYTES:
                yield from _converted(files, convert)
            continue
        yield from _converted(files, convert)
        picture = _from_array(source)
        height, width, channels = picture.shape
        expected = f"{input_spec.height}×{input_spec.width}"
        fits = (height, width) == (input_spec.height, input_spec.width)
        if input_spec.height is None:
            expected = f"{input_spec.resize[0]} on the shorter side" if input_spec.resize else "any size"
            fits = not input_spec.resize or min(height, width) == input_spec.resize[0]
        if channels != input_spec.channels or not fits:
            raise ValueError(
                f"the network's input is {expected} with {input_spec.channels} channels; this array is {height}×{width}"
                f" with {channels} (arrays are not resized)"
            )
        yield picture
    yield from _converted(files, convert)


def _converted(files: list[File], convert: Callable[[list[File]], list[NDArray[np.float32]]]) -> Iterator[PictureArray]:
    """Yield the converted files and empty the list."""
    if files:
        yield from (picture.transpose(1, 2, 0) for picture in convert(files))
        files.clear()


def _file_bytes(file: File) -> int:
    return len(file) if isinstance(file, bytes) else Path(file).stat().st_size


def _from_array(array: NDArray[Any]) -> PictureArray:
    if array.dtype not in (np.uint8, np.float32) or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"picture arrays must be (H, W) or (H, W, C), uint8 or float32, not {array.shape} {array.dtype}"
        )
    picture = array.astype(np.float32) / np.float32(255) if array.dtype == np.uint8 else array.astype(np.float32)
    return picture if picture.ndim == 3 else picture[:, :, np.newaxis]


class Grid(NamedTuple):
    """The positions of a map's cells, or of a picture's pixels, in the picture.

    Attributes:
        first: (y, x) of the centre of cell (0, 0), in pixels; the centre of pixel (0, 0) is (0, 0).
        spacing: (y, x) distance between cells, in pixels.
        shape: (h, w).
    """

    first: tuple[float, float]
    spacing: tuple[float, float]
    shape: tuple[int, int]

    def points(self) -> Points:
        """Return y and x, each (h, w), float64, of the centre of every cell, in pixels."""
        axes = [
            first + spacing * np.arange(size)
            for first, spacing, size in zip(self.first, self.spacing, self.shape, strict=True)
        ]
        y, x = np.meshgrid(axes[0], axes[1], indexing="ij")
        return y, x

    def to_cells(self, points: Points) -> Points:
        """Convert points from pixels of the picture to cells of this grid."""
        (y, x), first, spacing = points, self.first, self.spacing
        return (y - first[0]) / spacing[0], (x - first[1]) / spacing[1]


def shift_picture(picture: PictureArray, down: int, right: int) -> PictureArray:
    """Shift a picture.

    Args:
        picture: (H, W, C), float32, 0..1.
        down: Pixels, less than H; negative for up.
        right: Pixels, less than W; negative for left.

    Returns:
        (H, W, C), float32, 0..1: out[y, x] = picture[y - down, x - right] inside the picture.
    """
    return np.asarray(ndimage.shift(picture, (down, right, 0), order=0, mode="mirror"))


def transform_points(points: Points, centre: tuple[float, float], degrees: float, factor: float) -> Points:
    """Rotate points counter-clockwise (as seen, y pointing down) about a centre, and scale their distance from it.

    Args:
        points: y and x, float64, of equal shape.
        centre: (y, x).
        degrees: Angle of the rotation.
        factor: Factor of the distance from the centre.

    Returns:
        y and x, float64.
    """
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    y, x = points[0] - centre[0], points[1] - centre[1]
    return centre[0] + factor * (cosine * y - sine * x), centre[1] + factor * (sine * y + cosine * x)


def interpolate(values: MapArray, points: Points) -> MapArray:
    """Interpolate bilinearly between cells.

    Args:
        values: (h, w, C), float32, any range.
        points: y and x, float64, in cells, each of any shape P.

    Returns:
        (*P, C), float32. At the centre of a cell it is exactly the cell's value.
    """
    cells = np.round(points, 9)  # Rounding hides floating-point error at exact quarter turns.
    channels = [ndimage.map_coordinates(one, cells, order=1, mode="mirror") for one in np.moveaxis(values, -1, 0)]
    return np.stack(channels, axis=-1)


def blur_picture(picture: PictureArray, sigma: float) -> PictureArray:
    """Blur with a Gaussian, truncated at four standard deviations.

    Args:
        picture: (H, W, C), float32, 0..1.
        sigma: Standard deviation in pixels; 0 for no blur.

    Returns:
        (H, W, C), float32, 0..1.
    """
    return np.asarray(ndimage.gaussian_filter(picture, sigma, mode="mirror", axes=(0, 1)))
