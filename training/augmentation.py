"""Augmentation: training pictures as they might also have been taken.

Functions on whole batches; every choice is drawn from one CPU generator, so a run can be repeated and resumed. Axes:
`N` batch, `C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def mirror(images: Tensor, draw: torch.Generator) -> Tensor:
    """Turn left and right around in half of the pictures.

    Args:
        images: (N, C, H, W), any dtype, on any device.
        draw: A CPU generator.

    Returns:
        The same shape and dtype, on the same device.
    """
    chosen = (torch.rand(len(images), generator=draw) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def shift(images: Tensor, pixels: int, draw: torch.Generator) -> Tensor:
    """Move each picture by up to so many pixels up or down and left or right; what is uncovered is 0.

    Args:
        images: (N, C, H, W), uint8, 0..255, on any device.
        pixels: The largest move along each axis; every move is equally likely.
        draw: A CPU generator.

    Returns:
        The same shape and dtype, on the same device.
    """
    count, _, height, width = images.shape
    moves = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=draw).to(images.device)
    rows = moves[0] + torch.arange(height, device=images.device)  # (N, H), in the padded picture
    columns = moves[1] + torch.arange(width, device=images.device)  # (N, W)
    padded = pad(images, (pixels, pixels, pixels, pixels)).permute(0, 2, 3, 1)  # (N, H+2p, W+2p, C)
    numbers = torch.arange(count, device=images.device)[:, None, None]
    return padded[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
