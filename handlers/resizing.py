"""Resizing: a picture to the size that a network takes, bilinear with antialiasing; the aspect ratio is not kept.

torch's filter is Pillow's, gives at most one level of 255 more or less, and takes a sixth to four fifths of the time
for colour (`benchmarks/engines.md`). Axes: `C` channels, `H, W` pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

if TYPE_CHECKING:
    from handlers.images import Picture

# torch resizes across first: of a column of 16 million pixels, to 224 pixels across, it would hold 11 GB in between.
# A picture with more pixels than this in between is resized down the columns first.
_MOST_BETWEEN = 2**24


def resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """Resize on the CPU.

    Args:
        picture: (H, W, C).
        size: (H, W) wanted.

    Returns:
        (H, W, C) of that size, in the same dtype.
    """
    if picture.dtype == np.uint8 and picture.shape[2] == 1:  # Of grey bytes torch's takes up to three times as long.
        grey = Image.fromarray(picture[:, :, 0]).resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(grey)[:, :, np.newaxis]
    return resize_by_torch(picture, size)


def resize_by_torch(picture: Picture, size: tuple[int, int]) -> Picture:
    """Do as `resize`, always with torch's filter."""
    height, width, _ = picture.shape
    if height * size[1] > _MOST_BETWEEN and height != size[0]:
        picture = resize_by_torch(picture, (size[0], width))
    own = picture if picture.flags.writeable else picture.copy()  # torch warns of what it may not write to.
    images = torch.from_numpy(own).permute(2, 0, 1)[None]  # (1, C, H, W), of which channels lie side by side.
    resized = functional.interpolate(images, size, mode="bilinear", antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())
