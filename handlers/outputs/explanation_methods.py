"""Explanation methods that take no gradients: from a class's score back to the picture.

Each takes one picture and returns a heat map. torch is not needed. Axes: `N` batch,
`C` channels, `H, W` picture pixels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Scores = Callable[[Array], Array]
"""Images (N, C, H, W), float32, normalised → logits (N, K)."""

_CHUNK_BYTES = 2**20  # Of input in one run: with gradients, every operation's output is kept, many times its input.


def cam(maps: Array, weight: Array, target: int) -> Array:
    """Weigh each channel as the last linear layer does.

    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, equation 2. The mean over the
    cells is the logit without its bias.

    Args:
        maps: (1, C, h, w), which the network averages to (1, C).
        weight: (K, C), the weight of the linear layer after the mean.
        target: The class's index.

    Returns:
        (1, h, w).
    """
    heat: Array = np.einsum("c,nchw->nhw", weight[target], maps)
    return heat


def occlusion(network: Scores, image: Array, target: int, window: int, step: int, check: Callable[[], None]) -> Array:
    """Return how much the logit falls when a square around each pixel is set to zero, the mean colour.

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014; a pixel under several squares
    gets their mean, as in captum.

    Args:
        network: The network's scores.
        image: (1, C, H, W).
        target: The class's index.
        window: Pixels of the square, each way; the last of a row may stick out.
        step: Pixels from one square to the next, at most `window`.
        check: Called between runs; may raise to end the work.

    Returns:
        (1, H, W).
    """
    height, width = image.shape[2:]
    squares = [
        (slice(y, y + window), slice(x, x + window))
        for y in range(0, _starts(height, window, step) * step, step)
        for x in range(0, _starts(width, window, step) * step, step)
    ]
    whole = float(network(image)[0, target])
    total, covered = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    chunk = pictures_at_once(image.nbytes)
    for start in range(0, len(squares), chunk):
        some = squares[start : start + chunk]
        images = np.repeat(image, len(some), axis=0)
        for covering, (rows, columns) in zip(images, some, strict=True):
            covering[:, rows, columns] = 0
        for score, (rows, columns) in zip(network(images)[:, target].tolist(), some, strict=True):
            total[rows, columns] += whole - score
            covered[rows, columns] += 1
        check()
    return (total / covered)[None]


def occlusion_runs(height: int, width: int, window: int, step: int) -> int:
    """Return how many squares cover a picture of H × W pixels."""
    return _starts(height, window, step) * _starts(width, window, step)


def pictures_at_once(image_bytes: int) -> int:
    """Return how many images of so many bytes go into one run."""
    return max(1, _CHUNK_BYTES // image_bytes)


def _starts(length: int, window: int, step: int) -> int:
    return math.ceil((length - window) / step) + 1
