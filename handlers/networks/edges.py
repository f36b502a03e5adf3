"""`edges`: one convolution whose kernel is set by hand, so that what it finds is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from handlers.networks.network import Network

KERNEL = ((-1.0, -1.0, -1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Below minus above: positive where a picture brightens downwards, negative where it darkens."""


class Edges(Network):
    """Find horizontal edges; there is nothing to train and there are no classes."""

    description = "A hand-set 3×3 kernel that finds horizontal edges, in a grey picture of any size; no classes."
    layers: ClassVar[Mapping[str, str]] = {"conv1": "conv1"}
    pictures = (1, None, None)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, kernel_size=3, padding=1).requires_grad_(False)
        self.conv1.weight.copy_(torch.tensor(KERNEL))
        self.conv1.bias.zero_()  # type: ignore[union-attr]  # A convolution has a bias unless told otherwise.

    def forward(self, images: Tensor) -> Tensor:
        """Return the map itself.

        Args:
            images: (N, 1, H, W), float32, 0..1, of any size.

        Returns:
            (N, 1, H, W), float32, -3..3.
        """
        edges: Tensor = self.conv1(images)
        return edges
