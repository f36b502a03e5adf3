"""Pictures and arrays for tests of every room."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FIVE_BY_FIVE = np.array(
    [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], np.float32
)
FIVE_BY_FIVE_EDGES = np.array(
    [[1, 2, 3, 2, 1], [1, 1, 2, 1, 1], [0, 0, 0, 0, 0], [-1, -1, -2, -1, -1], [-1, -2, -3, -2, -1]], np.float32
)


def colours(seed: int = 0, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """Return random colours (H, W, 3), uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photograph(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return what photographs are made of, (H, W, 3): soft and sharp shapes of every size, edges, texture and noise."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cell in (97, 29, 11, 3):
        rough = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        smooth = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
        picture += (np.asarray(smooth) - 127.5) * (cell / 97) ** 0.5
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    picture[(rows - 0.3) ** 2 + (columns - 0.4) ** 2 < 0.04] += 90
    picture += 30 * np.sin(60 * (rows + 2 * columns))[:, :, np.newaxis] + rng.normal(0, 5, picture.shape)
    return np.clip(picture + 127.5, 0, 255).astype(np.uint8)


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    """Return the image as a file of the named format."""
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return buffer.getvalue()


def png(array: NDArray[Any], **options: Any) -> bytes:
    """Return the array as a PNG file."""
    return saved(Image.fromarray(array), "PNG", **options)


def npy(array: NDArray[Any], **options: Any) -> bytes:
    """Return the array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()
