"""Photographs to send: JPEG files of three sizes, generated, the same on every machine with the same libraries.

None can be downloaded here. What decides the cost of decoding is the number of pixels, the chroma subsampling (4:2:0,
as cameras write it) and the bytes of the file: 2.6 bits a pixel, which is usual for cameras and phones. Octaves of
smooth noise, hard edges and sensor noise bring about those bits.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = {"0.3 MP": (640, 480), "3 MP": (2048, 1536), "12 MP": (4032, 3024)}
COUNT = 4  # Number of photographs of each size: a request with more repeats them.

_NOISE, _QUALITY = 7.0, 93  # Standard deviation of sensor noise in levels; of the JPEG file.


def photographs(size: str, folder: Path) -> tuple[bytes, ...]:
    """Return the files of a size, a key of `SIZES`; they are kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for seed in range(COUNT):
        path = folder / f"{size.replace(' ', '-')}-{seed}.jpg"
        if not path.exists():
            path.write_bytes(_photograph(*SIZES[size], seed))
        files.append(path.read_bytes())
    return tuple(files)


def _photograph(width: int, height: int, seed: int) -> bytes:
    random = np.random.default_rng(seed)

    def smooth(cells: int) -> Any:
        """Return a field (H, W) of noise without detail below a cell, of which `cells` lie side by side."""
        small = random.standard_normal((cells * height // width + 2, cells + 2)).astype(np.float32)
        return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))

    light = sum(50 / 2**octave * smooth(4 * 2**octave) for octave in range(6)) + 60 * (smooth(6) > 0.3)
    pixels = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        values = 110 + light + 20 * smooth(5) + _NOISE * random.standard_normal((height, width), np.float32)
        pixels[:, :, channel] = values.clip(0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, subsampling="4:2:0")
    return file.getvalue()
