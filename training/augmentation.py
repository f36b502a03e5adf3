"""Augmentation: random changes of the training pictures.

Functions on whole batches; every choice is drawn from one CPU generator, so a run can be repeated and resumed. Axes:
`N` batch, `C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

_GREY = 128  # Near the mean of natural pictures, so a covered place carries no information.


def mirror(images: Tensor, draw: torch.Generator) -> Tensor:
    """Mirror half of the pictures, left to right.

    Args:
        images: (N, C, H, W), any dtype, on any device.
        draw: A CPU generator.

    Returns:
        The same shape and dtype, on the same device.
    """
    chosen = (torch.rand(len(images), generator=draw) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def shift(images: Tensor, pixels: int, draw: torch.Generator, *, reflect: bool = False) -> Tensor:
    """Move each picture by up to `pixels` up or down and left or right.

    Args:
        images: (N, C, H, W), uint8, 0..255, on any device.
        pixels: The largest move along each axis; every move is equally likely.
        draw: A CPU generator.
        reflect: Continue the picture beyond its edge as in a mirror; otherwise uncovered pixels are 0.

    Returns:
        The same shape and dtype, on the same device.
    """
    count, _, height, width = images.shape
    moves = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=draw).to(images.device)
    rows = moves[0] + torch.arange(height, device=images.device)  # (N, H), in the padded picture
    columns = moves[1] + torch.arange(width, device=images.device)  # (N, W)
    padded = pad(images, (pixels, pixels, pixels, pixels), mode="reflect" if reflect else "constant")
    padded = padded.permute(0, 2, 3, 1)  # (N, H+2p, W+2p, C)
    numbers = torch.arange(count, device=images.device)[:, None, None]
    return padded[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def turn(images: Tensor, degrees: float, scale: float, draw: torch.Generator) -> Tensor:
    """Turn each picture about its middle and scale it, each by its own angle and factor, in one bilinear resampling.

    torchvision.transforms.v2.RandomAffine draws one angle and one factor for a whole batch, hence torch's own sampling.

    Args:
        images: (N, C, H, W), uint8, 0..255, on any device.
        degrees: The largest angle either way, ≥ 0; every angle is equally likely.
        scale: The largest factor, ≥ 1; its logarithm is drawn evenly, so that halving is as likely as doubling.
        draw: A CPU generator.

    Returns:
        The same shape and dtype, on the same device; beyond its edge a picture continues as in a mirror.
    """
    count, _, height, width = images.shape
    angle, power = 2 * torch.rand(2, count, generator=draw) - 1
    angle, shrink = torch.deg2rad(angle * degrees), torch.exp(-power * math.log(scale))
    cos, sin = shrink * torch.cos(angle), shrink * torch.sin(angle)
    aside = torch.zeros(count)
    # From a place in the result to its place in the picture, both in -1..1 along each axis, whatever its length.
    places = torch.stack((cos, -sin * height / width, aside, sin * width / height, cos, aside), 1).view(-1, 2, 3)
    grid = affine_grid(places.to(images.device), list(images.shape), align_corners=False)
    turned = grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return turned.round().clamp(0, 255).to(images.dtype)


def cover(images: Tensor, pixels: int, draw: torch.Generator) -> Tensor:
    """Cover a square of each picture with grey, anywhere inside it.

    Args:
        images: (N, C, H, W), uint8, 0..255, on any device.
        pixels: Side of the square; every place is equally likely.
        draw: A CPU generator.

    Returns:
        The same shape and dtype, on the same device.
    """
    count, _, height, width = images.shape
    covered = [_stretch(count, side, pixels, draw).to(images.device) for side in (height, width)]
    return images.masked_fill((covered[0][:, :, None] & covered[1][:, None, :])[:, None], _GREY)


def _stretch(count: int, side: int, pixels: int, draw: torch.Generator) -> Tensor:
    """Return (N, side), bool: a run of `pixels` at a random place in each row."""
    place = torch.arange(side) - torch.randint(0, side - pixels + 1, (count, 1), generator=draw)
    return (place >= 0) & (place < pixels)
